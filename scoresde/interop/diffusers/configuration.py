"""Converts the configurations of the library to recipes of our models."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from scoresde.interop.diffusers.files import Values
from scoresde.interop.diffusers.tensors import layers
from scoresde.recipe import build

Recipe = dict[str, Any]

# Defaults of UNet2DModel.
_DEFAULTS: Recipe = {
    "_class_name": "UNet2DModel",
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# Settings common to all networks of this family.
_FAMILY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "time_embedding_type": ("positional", "fourier"),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# Schedulers of the same chain, which differ only in their sampling steps.
_CHAINS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"),
    *("DDPMParallelScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
)
_PREDICTIONS = {
    "epsilon": "scoresde.NoiseParametrisation",
    "sample": "scoresde.DataParametrisation",
    "v_prediction": "scoresde.VParametrisation",
}


def describe(config: Values, scheduler: Values) -> Recipe:
    """Returns the model that two configurations describe, as plain values.

    Arguments:
        config: Configuration of the network.
        scheduler: Configuration of the scheduler; missing values are the library's defaults.

    Raises:
        InputError: If a value is not supported; the message names it.
    """
    config = _complete(config)
    for key, known in _FAMILY.items():
        config.one_of(key, known)
    process = _ve if _is_fourier(config) else _chain
    return {
        "_target_": "scoresde.ScoreModel",
        "network": _network(config),
        **process(scheduler),
    }


def swaps_sines(config: Values) -> bool:
    """Returns whether cosines come first in the embedding of the label."""
    config = _complete(config)
    return not _is_fourier(config) and config.flag("flip_sin_to_cos")


def _complete(config: Values) -> Values:
    return Values(config.path, {**_DEFAULTS, **config.values})


def _is_fourier(config: Values) -> bool:
    return config.get("time_embedding_type") == "fourier"


# --- The process, the label, and what the output means -------------------------------------------


def _chain(scheduler: Values) -> Recipe:
    scheduler.one_of("_class_name", _CHAINS, "DDPMScheduler")
    scheduler.one_of("rescale_betas_zero_snr", (False,), False)
    prediction = scheduler.one_of("prediction_type", tuple(_PREDICTIONS), "epsilon")
    return {
        "sde": {"_target_": "scoresde.DiscreteVP", "betas": _betas(scheduler)},
        "parametrisation": {"_target_": _PREDICTIONS[prediction], "sigma_data": None},
        "noise_label": {"_target_": "scoresde.model.ChainIndex"},
    }


def _betas(scheduler: Values) -> Recipe:
    if scheduler.get("trained_betas", None) is not None:
        values = scheduler.numbers("trained_betas")
        return {"_target_": "scoresde.sde.ListedBetas", "values": values}
    steps = scheduler.count("num_train_timesteps", 1000)
    known = ("linear", "squaredcos_cap_v2")
    if scheduler.one_of("beta_schedule", known, "linear") == "squaredcos_cap_v2":
        return {"_target_": "scoresde.sde.CosineBetas", "steps": steps}
    return {
        "_target_": "scoresde.sde.LinearBetas",
        "beta_min": steps * scheduler.number("beta_start", 1e-4),
        "beta_max": steps * scheduler.number("beta_end", 0.02),
        "steps": steps,
    }


def _ve(scheduler: Values) -> Recipe:
    scheduler.one_of("_class_name", ("ScoreSdeVeScheduler",), "ScoreSdeVeScheduler")
    levels = {
        "sigma_min": scheduler.number("sigma_min", 0.01),
        "sigma_max": scheduler.number("sigma_max", 1348.0),
    }
    return {
        "sde": {"_target_": "scoresde.VESDE", **levels},
        "parametrisation": {"_target_": "scoresde.ScoreParametrisation", "sigma_data": None},
        "noise_label": {"_target_": "scoresde.model.Sigma"},
    }


# --- The network ---------------------------------------------------------------------------------


def _network(config: Values) -> Recipe:
    widths = config.counts("block_out_channels")
    attention, architecture = _levels(config, len(widths))
    image = config.count("in_channels")
    config.one_of("out_channels", (image,))
    config.one_of("time_embedding_dim", (None, 4 * widths[0]))
    uneven = [n for n in widths if n % widths[0]]
    if uneven:
        raise config.error("block_out_channels", f"must be multiples of {widths[0]}")
    network: Recipe = {
        "_target_": "scoresde.nn.UNet",
        "shape": [image, *_size(config, 2 ** (len(widths) - 1))],
        "width": widths[0],
        "multipliers": [n // widths[0] for n in widths],
        "blocks": config.count("layers_per_block"),
        "attention": {
            "_target_": "scoresde.nn.AttentionLayout",
            "levels": attention,
            "head_width": _head_width(config, [*(widths[i] for i in attention), widths[-1]]),
            "after_each": architecture is _ddpm,
        },
        "dropout": config.number("dropout"),
        "embedding": _embedding(config, widths[0]),
        "architecture": {"_target_": "scoresde.nn.Architecture", **architecture(config)},
        "centre": config.flag("center_input_sample"),
        **_classes(config),
    }
    network["architecture"]["norm"]["exceptions"] = _exceptions(config, network, widths)
    if not _is_fourier(config):
        return network
    return {"_target_": "scoresde.nn.ScaledBySigma", "network": network}


def _classes(config: Values) -> Recipe:
    if config.get("num_class_embeds") is None:
        return {}
    return {"classes": config.count("num_class_embeds")}


def _size(config: Values, divisor: int) -> list[int]:
    """Returns the height and width of the images, which must be multiples of ``divisor``."""
    size = config.get("sample_size")
    if size is None:
        raise config.error("sample_size", "must be the size of the images")
    sizes = config.counts("sample_size") if isinstance(size, list) else []
    sizes = sizes if len(sizes) == 2 else [config.count("sample_size")] * 2
    if any(n % divisor for n in sizes):
        raise config.error("sample_size", f"must be divisible by {divisor}")
    return sizes


def _embedding(config: Values, width: int) -> Recipe:
    if _is_fourier(config):
        fourier = {"_target_": "scoresde.nn.FourierEmbedding", "width": 2 * width}
        return {**fourier, "scale": 16.0, "log": True}
    half, shift = width // 2, config.number("freq_shift")
    if shift >= half:
        raise config.error("freq_shift", f"must be less than {half}")
    # Their frequencies 10000^(-k / (n - shift)) are ours, period^(-k / (n - 1)).
    period = 10000.0 ** ((half - 1) / (half - shift))
    return {"_target_": "scoresde.nn.PositionalEmbedding", "width": width, "max_period": period}


def _head_width(config: Values, widths: Sequence[int]) -> int | None:
    """Returns the number of channels of each head, or None for a single head."""
    if config.get("attention_head_dim") is None:
        return None
    head = config.count("attention_head_dim")
    uneven = [n for n in widths if n % head]
    if uneven:
        raise config.error("attention_head_dim", f"must divide {uneven[0]} channels")
    return head


def _levels(config: Values, count: int) -> tuple[list[int], Callable[[Values], Recipe]]:
    """Returns the levels with attention, and a function that describes the architecture."""
    down, up = ([str(n) for n in config.items(f"{way}_block_types")] for way in ("down", "up"))
    known = {
        ("DownBlock2D", "AttnDownBlock2D"): _ddpm,
        ("SkipDownBlock2D", "AttnSkipDownBlock2D"): _ncsnpp,
    }
    architecture = next((known[names] for names in known if {*down} <= {*names}), None)
    if architecture is None:
        choices = ", or all ".join(" or ".join(names) for names in known)
        raise config.error("down_block_types", f"must all be {choices}")
    if len(down) != count:
        raise config.error(
            "down_block_types", f"must have {count} entries, one per entry of block_out_channels"
        )
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    if up != mirrored:
        raise config.error("up_block_types", f"must mirror down_block_types: {mirrored}")
    return [i for i, name in enumerate(down) if name.startswith("Attn")], architecture


def _ddpm(config: Values) -> Recipe:
    _check_scale(config, 1.0)
    both_sides = bool(config.one_of("downsample_padding", (0, 1)))
    return {
        "transition": {"_target_": "scoresde.nn.DDPMTransition"},
        "resampling": {"_target_": "scoresde.nn.BoxResampling", "both_sides": both_sides},
        "norm": _norm(config, config.count("norm_num_groups"), 1),
        "rescale": False,
    }


def _ncsnpp(config: Values) -> Recipe:
    _check_scale(config, math.sqrt(2))
    return {
        "resampling": {"_target_": "scoresde.nn.FIRResampling"},
        "input_pyramid": {"_target_": "scoresde.nn.InputSkip"},
        "output_pyramid": {"_target_": "scoresde.nn.OutputSkip"},
        "norm": _norm(config, 32, 4),
    }


def _check_scale(config: Values, wanted: float) -> None:
    """Checks that the middle block divides its sums by the same number as all other blocks."""
    if not math.isclose(config.number("mid_block_scale_factor"), wanted, rel_tol=1e-6):
        raise config.error("mid_block_scale_factor", f"must be {wanted:.12g} with these blocks")


def _norm(config: Values, most: int, least: int) -> Recipe:
    eps = config.number("norm_eps")
    return {"_target_": "scoresde.nn.Groups", "most": most, "least": least, "eps": eps}


# --- The groups of its normalisations ------------------------------------------------------------


def _exceptions(config: Values, recipe: Recipe, widths: Sequence[int]) -> dict[str, int]:
    """Returns the number of groups of each normalisation whose groups differ from ours."""
    with torch.device("meta"):
        network = build(recipe)
    exceptions = {}
    for layer in layers(network):
        if isinstance(layer.module, nn.GroupNorm):
            channels, groups = layer.module.num_channels, layer.module.num_groups
            wanted = _groups(config, layer.theirs, channels, widths)
            if wanted < 1 or channels % wanted:
                raise config.error(
                    "block_out_channels",
                    f"must allow {wanted} groups in the {channels} channels of {layer.theirs}",
                )
            if wanted != groups:
                exceptions[layer.ours] = wanted
    return exceptions


def _groups(config: Values, name: str, channels: int, widths: Sequence[int]) -> int:
    """Returns the number of groups of a normalisation, by its name in the library."""
    usual, fixed = min(channels // 4, 32), config.get("norm_num_groups")
    fixed = usual if fixed is None else config.count("norm_num_groups")
    if name.startswith("mid_block.attentions") and config.get("attn_norm_num_groups") is not None:
        return config.count("attn_norm_num_groups")
    down = config.items("down_block_types")
    if "Skip" not in down[0] or name.startswith(("mid_block", "conv_norm_out")):
        return fixed
    if ".attentions." in name:
        return 32
    place = re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(\d+)\.norm1", name)
    level = len(widths) - 1 - int(place[1]) if place else 0
    if place and down[level].startswith("Attn"):
        # There the library divides only the channels from the down path by four.
        last = int(place[2]) == config.count("layers_per_block")
        skip = widths[max(level - 1, 0) if last else level]
        return min(channels - skip + skip // 4, 32)
    return usual
