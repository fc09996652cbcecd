"""Maps every tensor of the library to one of ours, by iterating our modules.

Its tensors have names, ``down_blocks.0.resnets.1.conv1.weight``, and all but the frequencies of
Fourier features are the weight or the bias of a layer.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.interop.score_sde.tensors import Place
from scoresde.nn import Attention, FourierEmbedding, ResidualBlock, UNet
from scoresde.nn.blocks import Between
from scoresde.recipe import build

_BLOCK = {
    "norm1": "norm_in",
    "conv1": "conv_in",
    "time_emb_proj": "shift",
    "norm2": "norm_out",
    "conv2": "conv_out",
}
_ATTENTION = ("to_q", "to_k", "to_v")
# Names of the parts of attentions in the library before version 0.13.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_WHOLE = (0, 1)


@dataclass(frozen=True)
class Layer:
    """A layer of the library, and its counterpart.

    Arguments:
        theirs: Name in the library.
        ours: Name of the counterpart in the U-Net.
        module: The counterpart.
        part: Index of its part of the counterpart's rows, and the number of parts.
    """

    theirs: str
    ours: str
    module: nn.Module
    part: tuple[int, int]


def places(recipe: Mapping[str, Any]) -> list[Place]:
    """Returns all tensors of the library for the recipe of a network."""
    with torch.device("meta"):
        model = nn.ModuleDict({"network": build(recipe)})
    name, network = next((n, m) for n, m in model.named_modules() if isinstance(m, UNet))
    return [place for layer in layers(network) for place in places_of(name, layer)]


def layers(network: UNet) -> Iterator[Layer]:
    """Yields all layers of the library for one of our networks."""
    return layers_of(network, _listed(network))


def layers_of(root: nn.Module, listed: Iterable[tuple[str, nn.Module]]) -> Iterator[Layer]:
    """Yields the layers of modules in a root, listed with the names of their counterparts."""
    names = {module: name for name, module in root.named_modules()}
    for theirs, module in listed:
        for inner, ours, part in _parts(module):
            yield Layer(
                theirs=f"{theirs}.{inner}".rstrip("."),
                ours=f"{names[module]}.{ours}".rstrip("."),
                module=module.get_submodule(ours),
                part=part,
            )


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with the parts of attentions under their present names."""

    def present(name: str) -> str:
        path, _, rest = name.rpartition("attentions.")
        number, _, part = rest.partition(".")
        layer, _, last = part.rpartition(".")
        new = f"{path}attentions.{number}.{_OLD.get(layer, layer)}.{last}"
        return new if layer in _OLD and new not in weights else name

    return {present(name): value for name, value in weights.items()}


def swap_sines(state: dict[str, Tensor]) -> None:
    """Converts a layer of cosines and sines to one of sines and cosines."""
    name = "network.conditioning.hidden.weight"
    state[name] = state[name].roll(state[name].shape[1] // 2, dims=1)


def add_none(state: dict[str, Tensor]) -> None:
    """Adds the row for no class, which the library lacks; a row of zeros counts as untrained."""
    for name in state:
        if name.endswith("conditioning.classes.weight"):
            state[name] = nn.functional.pad(state[name], (0, 0, 0, 1))


def places_of(network: str | None, layer: Layer) -> Iterator[Place]:
    """Yields the tensors of one layer; ``network`` is the prefix of our names, if any."""
    path = layer.ours if network is None else f"{network}.{layer.ours}"
    for name, tensor in layer.module.state_dict().items():
        classes = isinstance(layer.module, nn.Embedding)
        target = (len(tensor) - classes, *tensor.shape[1:])  # without the row for no class
        rows = target[0] // layer.part[1]
        yield Place(
            theirs=f"{layer.theirs}.{'weight' if name == 'W' else name}",
            shape=(rows, *target[1:]),
            ours=f"{path}.{name}",
            target=target,
            part=layer.part,
            turned=False,
            trained=True,
        )


def _listed(network: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yields our modules, each with the name of its counterpart."""
    conditioning = network.conditioning
    if isinstance(conditioning.embedding, FourierEmbedding):
        yield "time_proj", conditioning.embedding
    yield "time_embedding.linear_1", conditioning.hidden
    yield "time_embedding.linear_2", conditioning.out
    if conditioning.classes is not None:
        yield "class_embedding", conditioning.classes
    yield "conv_in", network.conv_in
    for i, level in enumerate(network.down):
        name = f"down_blocks.{i}"
        yield from level_of(name, level.blocks, level.attentions)
        yield from change_of(name, "down", level.downsample)
        if level.pyramid is not None:
            yield f"{name}.skip_conv", level.pyramid.conv
    middle = network.middle
    yield from level_of("mid_block", [middle.block_in, middle.block_out], [middle.attention])
    for i, level in enumerate(network.up):
        name = f"up_blocks.{i}"
        yield from level_of(name, level.blocks, [*level.early_attentions, level.attention])
        yield from change_of(name, "up", level.upsample)
        if level.pyramid is not None:
            last = level is network.up[-1]
            yield "conv_norm_out" if last else f"{name}.skip_norm", level.pyramid.head.norm
            yield "conv_out" if last else f"{name}.skip_conv", level.pyramid.head.conv
    if not network.paints:
        yield "conv_norm_out", network.norm_out
        yield "conv_out", network.conv_out


def level_of(
    name: str, blocks: Iterable[nn.Module], attentions: Iterable[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yields the blocks of a level and any attentions."""
    for i, block in enumerate(blocks):
        yield f"{name}.resnets.{i}", block
    there = [module for module in attentions if isinstance(module, Attention)]
    for i, attention in enumerate(there):
        yield f"{name}.attentions.{i}", attention


def change_of(name: str, way: str, module: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers between one level and the next."""
    if isinstance(module, Between):
        yield f"{name}.{way}samplers.0.conv", module.layer.get_submodule("conv")
    elif module is not None:
        yield f"{name}.resnet_{way}", module


def _parts(module: nn.Module) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yields the layers in a module: their name, our name, and their part of ours."""
    match module:
        case ResidualBlock():
            there = {t: o for t, o in _BLOCK.items() if getattr(module, o) is not None}
            yield from ((theirs, ours, _WHOLE) for theirs, ours in there.items())
            if isinstance(module.shortcut, nn.Conv2d):
                yield "conv_shortcut", "shortcut", _WHOLE
        case Attention():
            yield "group_norm", "norm", _WHOLE
            yield from ((name, "qkv", (i, 3)) for i, name in enumerate(_ATTENTION))
            yield "to_out.0", "out", _WHOLE
        case _:
            yield "", "", _WHOLE
