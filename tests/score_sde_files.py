"""Files in the reference's format, made for tests: configurations, tensors, whole contents."""

import copy
import math

import numpy as np
import torch

from scoresde.interop.score_sde import describe
from scoresde.interop.score_sde.tensors import places

CONFIG = {
    "data": {"image_size": 8, "num_channels": 3, "centered": True},
    "training": {"sde": "vpsde", "continuous": True},
    "model": {
        "name": "ncsnpp",
        "nf": 8,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.1,
        "resamp_with_conv": True,
        "conditional": True,
        "fir": False,
        "fir_kernel": [1, 3, 3, 1],
        "skip_rescale": True,
        "resblock_type": "biggan",
        "progressive": "none",
        "progressive_input": "none",
        "progressive_combine": "sum",
        "embedding_type": "positional",
        "fourier_scale": 16,
        "init_scale": 0.0,
        "scale_by_sigma": False,
        "nonlinearity": "swish",
        "beta_min": 0.1,
        "beta_max": 20.0,
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "num_scales": 1000,
    },
}


def config(**changes):
    """The small configuration with other values, each in the section that has it."""
    result = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        section = next(s for s in result.values() if key in s)
        section[key] = value
    return result


def tensors(config, seed=0):
    """Random tensors of the reference by name, in its order, in float32."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for place in places(describe(config)["network"]):
        value = torch.randn(place.shape, generator=generator)
        is_vector = len(place.shape) == 1
        if place.theirs.endswith(".weight") and is_vector:
            value = 1 + 0.2 * value
        elif is_vector and not place.theirs.endswith(".W"):
            value = 0.2 * value
        elif not is_vector:
            inputs = place.shape[0] if place.turned else math.prod(place.shape[1:])
            value = value / inputs**0.5
        values[place.theirs] = value
    return values


def content(config, seed=0, prefix="module."):
    """What a file of the reference holds; its averages are other numbers than its weights."""
    raw, average = tensors(config, seed), tensors(config, seed + 1)
    frozen = [name for name in raw if name.endswith(".0.W")]
    n = config["model"]["num_scales"]
    model = {prefix + "sigmas": torch.linspace(1, 0, n, dtype=torch.float64)}
    return {
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(2e-4), "params": [0]}]},
        "model": {**model, **{prefix + name: value for name, value in raw.items()}},
        "ema": {
            "decay": 0.999,
            "num_updates": 7,
            "shadow_params": [value for name, value in average.items() if name not in frozen],
        },
        "step": 7,
    }
