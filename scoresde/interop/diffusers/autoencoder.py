"""Autoencoders of the library: folders of its ``AutoencoderKL``.

They have a normal encoder and no likelihood of the data, since they were trained with other
losses. As codecs they have no log-determinant, and the scale of their latents is measured on the
current data. The ``scaling_factor`` of the configuration belongs to one data set and is not used.

References:
    Rombach et al. 2022, https://arxiv.org/abs/2112.10752 (section 3.1).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from scoresde.interop.diffusers.files import Values
from scoresde.interop.diffusers.tensors import change_of, layers_of, level_of, places_of
from scoresde.interop.score_sde.tensors import Place
from scoresde.recipe import build

NAME = "AutoencoderKL"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def describe_autoencoder(given: Values) -> dict[str, Any]:
    """Returns the codec that a configuration describes, as plain values.

    Raises:
        InputError: If a value is not supported.
    """
    config = Values(given.path, {**_DEFAULTS, **given.values})
    channels, latents = config.count("in_channels"), config.count("latent_channels")
    config.one_of("out_channels", (channels,))
    config.one_of("act_fn", ("silu", "swish"))
    config.one_of("mid_block_add_attention", (True,))
    for key, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        if {*config.items(f"{key}_block_types")} != {kind}:
            raise config.error(f"{key}_block_types", f"must all be {kind}")
    size = config.count("sample_size")
    groups = config.count("norm_num_groups")
    common = {
        "shape": [channels, size, size],
        "widths": config.counts("block_out_channels"),
        "blocks": config.count("layers_per_block"),
        "norm": {"_target_": "scoresde.nn.Groups", "most": groups, "least": 1},
    }
    encoder = {
        "_target_": "scoresde.nn.ImageEncoder",
        "channels": 2 * latents,
        "mixed": config.flag("use_quant_conv"),
        **common,
    }
    decoder = {
        "_target_": "scoresde.nn.ImageDecoder",
        "channels": latents,
        "mixed": config.flag("use_post_quant_conv"),
        **common,
    }
    return {
        "_target_": "scoresde.codec.Autoencoder",
        "encoder": {
            "_target_": "scoresde.codec.GaussianEncoder",
            "network": encoder,
            "log_variance": True,
        },
        "decoder": decoder,
    }


def autoencoder_places(recipe: dict[str, Any]) -> list[Place]:
    """Returns all tensors of the library for the recipe of a codec."""
    with torch.device("meta"):
        codec = build(recipe)
    return [
        place for layer in layers_of(codec, _listed(codec)) for place in places_of(None, layer)
    ]


def _listed(codec: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yields our modules, each with the name of its counterpart."""
    encoder, decoder = codec.encoder.network, codec.decoder
    for name, network, way in (("encoder", encoder, "down"), ("decoder", decoder, "up")):
        yield f"{name}.conv_in", network.conv_in
        for i, level in enumerate(getattr(network, way)):
            place = f"{name}.{way}_blocks.{i}"
            yield from level_of(place, level.blocks, [])
            yield from change_of(place, way, level.downsample if way == "down" else level.upsample)
        middle = network.middle
        yield from level_of(
            f"{name}.mid_block", [middle.block_in, middle.block_out], [middle.attention]
        )
        yield f"{name}.conv_norm_out", network.head.norm
        yield f"{name}.conv_out", network.head.conv
    for name, network in (("quant_conv", encoder), ("post_quant_conv", decoder)):
        if not isinstance(network.mix, nn.Identity):
            yield name, network.mix
