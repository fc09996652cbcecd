"""Maps every tensor of the reference to one of ours, by iterating our modules in its order.

Its networks are lists of modules without names, ``all_modules.4.Conv_0.weight``. The order of the
list is the order in which the network is built: embedding, first convolution, down, middle, up,
last convolution.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn import Attention, DDPMTransition, FourierEmbedding, ResidualBlock, UNet
from scoresde.nn.blocks import Between
from scoresde.nn.pyramids import (
    InputResidualLayer,
    InputSkipLayer,
    OutputResidualLayer,
    OutputSkipLayer,
    OutputStart,
)
from scoresde.nn.resampling import Filter, ResamplingConv
from scoresde.recipe import build


@dataclass(frozen=True)
class Place:
    """A tensor of the reference and its counterpart.

    Arguments:
        theirs: Name in the reference.
        shape: Shape in the reference.
        ours: Name of our tensor, or None if the tensor has no effect and is omitted.
        target: Shape of our tensor.
        part: Index of its part of the rows of our tensor, and the number of parts.
        turned: Whether it is the transpose of our tensor.
        trained: Whether it is trained.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: str | None
    target: tuple[int, ...]
    part: tuple[int, int]
    turned: bool
    trained: bool


@dataclass(frozen=True)
class _Source:
    """A tensor of one module: its name in the reference, and ours within the module."""

    theirs: str
    ours: str
    part: tuple[int, int] = (0, 1)
    turned: bool = False
    trained: bool = True


def places(recipe: Mapping[str, Any]) -> list[Place]:
    """Returns all tensors of the reference, in its order, for the recipe of a network."""
    with torch.device("meta"):
        ours = nn.ModuleDict({"network": build(recipe)})
        conditional = any(".conditioning." in name for name, _ in ours.named_modules())
        # A network without a label input still has layers for it.
        told = ours if conditional else nn.ModuleDict({"network": build(_told(recipe))})
    kept = ours.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in told.state_dict().items()}
    prefixes = {module: name for name, module in told.named_modules()}
    network = next(module for module in told.modules() if isinstance(module, UNet))
    return [
        _place(f"all_modules.{i}.{source.theirs}", source, name, shapes[name], name in kept)
        for i, module in enumerate(_listed(network, conditional))
        for source in _sources(module, isinstance(network.architecture.transition, DDPMTransition))
        for name in [f"{prefixes[module]}.{source.ours}"]
    ]


def convert(
    weights: Mapping[str, Tensor], where: list[Place], path: str | Path
) -> dict[str, Tensor]:
    """Returns the tensors of the reference under our names.

    Arguments:
        weights: Tensors by name.
        where: Places of the tensors.
        path: File, for the error message.

    Raises:
        InputError: If a tensor is missing, unexpected, or of another shape.
    """
    _check_names(weights, where, path)
    _check_shapes(weights, where, path)  # before anything of a wrong size is allocated
    state = {place.ours: torch.empty(place.target) for place in where if place.ours}
    for place in where:
        if place.ours:
            value, (i, parts) = weights[place.theirs], place.part
            target = state[place.ours].chunk(parts)[i]
            target.copy_((value.T if place.turned else value).reshape(target.shape))
    return state


def _check_names(weights: Mapping[str, Tensor], where: list[Place], path: str | Path) -> None:
    wanted = {place.theirs: None for place in where}
    for problem, names in (
        ("lacks the tensors", [name for name in wanted if name not in weights]),
        ("has the unexpected tensors", [name for name in weights if name not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{path} {problem} {', '.join(names[:3])}{more}; use the configuration that the "
                "network was trained with."
            )


def _check_shapes(weights: Mapping[str, Tensor], where: list[Place], path: str | Path) -> None:
    for place in where:
        shape = tuple(weights[place.theirs].shape)
        if shape != place.shape:
            raise InputError(
                f"{place.theirs} in {path} must have shape {place.shape} by the configuration, "
                f"got {shape}; use the configuration that the network was trained with."
            )


def _told(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe of the same network with a label input."""
    if "network" in recipe:
        return {**recipe, "network": _told(recipe["network"])}
    return {**recipe, "architecture": {**recipe["architecture"], "conditional": True}}


def _place(theirs: str, source: _Source, ours: str, target: tuple[int, ...], used: bool) -> Place:
    rows = (target[0] // source.part[1], *target[1:])
    return Place(
        theirs=theirs,
        shape=rows[1::-1] if source.turned else rows,
        ours=ours if used else None,
        target=target,
        part=source.part,
        turned=source.turned,
        trained=source.trained,
    )


def _listed(network: Any, conditional: bool) -> Iterator[nn.Module]:
    """Yields the modules of a U-Net in the order of the reference's list."""
    conditioning = network.conditioning
    if isinstance(conditioning.embedding, FourierEmbedding):
        yield conditioning.embedding
    if conditional:
        yield from (conditioning.hidden, conditioning.out)
    yield network.conv_in
    for level in network.down:
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            yield from _present(block, attention)
        yield from _present(level.downsample, level.pyramid)
    middle = network.middle
    yield from (middle.block_in, middle.attention, middle.block_out)
    for level in network.up:
        yield from level.blocks
        yield from _present(level.attention)
        if isinstance(level.pyramid, OutputStart | OutputSkipLayer):
            yield from (level.pyramid.head.norm, level.pyramid.head.conv)
        else:
            yield from _present(level.pyramid)
        yield from _present(level.upsample)
    if not network.paints:
        yield from (network.norm_out, network.conv_out)


def _present(*modules: nn.Module | None) -> Iterator[nn.Module]:
    """Yields the modules that are not None."""
    for module in modules:
        if module is not None and not isinstance(module, nn.Identity):
            yield module


def _sources(module: nn.Module, plain: bool) -> Iterator[_Source]:
    """Yields the tensors of a module in the reference's order.

    Arguments:
        module: Module of our network.
        plain: Whether residual blocks are those of DDPM, whose shortcut is a matrix.
    """
    match module:
        case FourierEmbedding():
            yield _Source("W", "W", trained=False)
        case nn.Linear() | nn.Conv2d() | nn.GroupNorm():
            yield from _affine("", "")
        case ResidualBlock():
            for theirs, ours in _BLOCK.items():
                yield from _affine(f"{theirs}.", f"{ours}.")
            if isinstance(module.shortcut, nn.Conv2d):
                yield from (
                    _matrix("NIN_0", "shortcut") if plain else _affine("Conv_2.", "shortcut.")
                )
        case Attention():
            yield from _affine("GroupNorm_0.", "norm.")
            for i in range(3):
                yield from _matrix(f"NIN_{i}", "qkv", (i, 3))
            yield from _matrix("NIN_3", "out")
        case Between():
            yield from _resampling(module.layer, "layer")
        case InputSkipLayer():
            yield from _affine("Conv_0.", "conv.")
        case InputResidualLayer():
            yield from _resampling(module.down, "down")
        case OutputResidualLayer():
            yield from _resampling(module.up, "up")


_BLOCK = {
    "GroupNorm_0": "norm_in",
    "Conv_0": "conv_in",
    "Dense_0": "shift",
    "GroupNorm_1": "norm_out",
    "Conv_1": "conv_out",
}


def _affine(theirs: str, ours: str) -> Iterator[_Source]:
    for name in ("weight", "bias"):
        yield _Source(theirs + name, ours + name)


def _matrix(theirs: str, ours: str, part: tuple[int, int] = (0, 1)) -> Iterator[_Source]:
    """Yields the tensors of the reference's NIN: a matrix from rows to columns, and a bias."""
    yield _Source(f"{theirs}.W", f"{ours}.weight", part, turned=True)
    yield _Source(f"{theirs}.b", f"{ours}.bias", part)


def _resampling(layer: nn.Module, ours: str) -> Iterator[_Source]:
    """Yields the convolution of a resampling layer, if it has one."""
    if isinstance(layer, ResamplingConv):
        filtered = isinstance(layer.before, Filter)
        yield from _affine("Conv2d_0." if filtered else "Conv_0.", f"{ours}.conv.")
