"""Converts the reference's configurations to recipes of our models."""

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from scoresde.errors import InputError
from scoresde.interop._messages import either
from scoresde.recipe import brief

Recipe = dict[str, Any]

_ACTIVATIONS: dict[str, Recipe] = {
    "swish": {"_target_": "torch.nn.SiLU"},
    "elu": {"_target_": "torch.nn.ELU"},
    "relu": {"_target_": "torch.nn.ReLU"},
    "lrelu": {"_target_": "torch.nn.LeakyReLU", "negative_slope": 0.2},
}
_COMBINATIONS = {
    "sum": {"_target_": "scoresde.nn.Sum"},
    "cat": {"_target_": "scoresde.nn.Concatenation"},
}
_MISSING = object()


def names() -> list[str]:
    """Returns the names of the reference's own configurations."""
    return list(_published())


def read_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Returns a configuration as a nested dictionary.

    Arguments:
        config: Nested dictionary, name of one of the reference's own configurations, or a
            ``.json`` or ``.yaml`` file.

    Raises:
        InputError: If there is no such name or file, or the file contains no configuration.
    """
    if isinstance(config, str | Path):
        config = _published().get(str(config)) or _read_file(Path(config))
    if isinstance(config, Mapping) and "model" not in config:
        config = config.get("config", config)
    if not isinstance(config, Mapping) or "model" not in config:
        raise InputError(
            f"config must be a nested dictionary with a section model, got {brief(config)}; pass "
            "the dictionary of the reference, config.to_dict()."
        )
    return config


def describe(config: Mapping[str, Any] | str | Path) -> Recipe:
    """Returns the model that a configuration describes, as plain values.

    Arguments:
        config: As for :func:`read_config`.

    Returns:
        A tree for :func:`scoresde.recipe.build`, or for a recipe's sections ``network``, ``sde``,
        ``parametrisation`` and ``label``.

    Raises:
        InputError: If a value is missing or not supported; the message names it.
    """
    values = _Values(read_config(config))
    return {
        "_target_": "scoresde.ScoreModel",
        "network": _scaled(values, _network(values)),
        **values.choice("training.sde", _SDES)(values),
    }


# --- The process, the label, and what the output means -------------------------------------------


def _rates(values: "_Values") -> Recipe:
    numbers = values.number("model.beta_min", 0.1), values.number("model.beta_max", 20.0)
    return dict(zip(("beta_min", "beta_max"), numbers, strict=True))


def _vp(values: "_Values") -> Recipe:
    if values.flag("training.continuous"):
        return _noise({"_target_": "scoresde.VPSDE", **_rates(values)}, 999.0)
    scales = values.scales()
    betas = {"_target_": "scoresde.sde.LinearBetas", **_rates(values), "steps": scales}
    return _noise({"_target_": "scoresde.DiscreteVP", "betas": betas}, scales - 1.0)


def _subvp(values: "_Values") -> Recipe:
    return _noise({"_target_": "scoresde.SubVPSDE", **_rates(values)}, 999.0)


def _ve(values: "_Values") -> Recipe:
    label: Recipe = {"_target_": "scoresde.model.Sigma"}
    if not values.flag("training.continuous"):
        label = {"_target_": "scoresde.model.ReversedIndex", "scales": values.scales()}
    return {
        "sde": {"_target_": "scoresde.VESDE", **_levels(values)},
        "parametrisation": {"_target_": "scoresde.ScoreParametrisation", "sigma_data": None},
        "noise_label": label,
    }


_SDES: dict[str, Callable[["_Values"], Recipe]] = {"vpsde": _vp, "subvpsde": _subvp, "vesde": _ve}


def _noise(sde: Recipe, scale: float) -> Recipe:
    """Returns the recipe of a noise prediction network with a scaled time as its label."""
    return {
        "sde": sde,
        "parametrisation": {"_target_": "scoresde.NoiseParametrisation", "sigma_data": None},
        "noise_label": {"_target_": "scoresde.ScaledTime", "scale": scale},
    }


def _levels(values: "_Values") -> Recipe:
    numbers = values.number("model.sigma_min", 0.01), values.number("model.sigma_max", 50.0)
    return dict(zip(("sigma_min", "sigma_max"), numbers, strict=True))


def _scaled(values: "_Values", network: Recipe) -> Recipe:
    """Returns the recipe of the network, divided by the noise level if configured."""
    if not values.flag("model.scale_by_sigma"):
        return network
    scaled = {"_target_": "scoresde.nn.ScaledBySigma", "network": network}
    if "Fourier" in network["embedding"]["_target_"]:
        return {**scaled, "sigmas": None}
    scales = values.scales()
    sigmas = {"_target_": "scoresde.nn.GeometricSigmas", **_levels(values), "scales": scales}
    largest = _largest_label(values)
    if largest >= scales:
        raise InputError(
            f"model.num_scales must be greater than {largest:.4g}, the largest label by which the "
            f"reference looks up its noise levels, got {scales}; use the configuration that the "
            "network was trained with."
        )
    return {**scaled, "sigmas": sigmas}


def _largest_label(values: "_Values") -> float:
    if values.text("training.sde") == "subvpsde":
        return 999.0
    if not values.flag("training.continuous"):
        return values.scales() - 1.0
    return _levels(values)["sigma_max"] if values.text("training.sde") == "vesde" else 999.0


# --- The network ---------------------------------------------------------------------------------


def _network(values: "_Values") -> Recipe:
    name = {"ddpm": (_positional, _ddpm), "ncsnpp": (_embedding, _ncsnpp)}
    embedding, architecture = values.choice("model.name", name)
    factors = values.counts("model.ch_mult")
    size = _size(values, 2 ** (len(factors) - 1))
    seen = values.counts("model.attn_resolutions")
    return {
        "_target_": "scoresde.nn.UNet",
        "shape": [values.count("data.num_channels"), size, size],
        "width": values.count("model.nf"),
        "multipliers": factors,
        "blocks": values.count("model.num_res_blocks"),
        "attention": [i for i in range(len(factors)) if size // 2**i in seen],
        "dropout": values.number("model.dropout", 0.1),
        "embedding": embedding(values),
        "architecture": {
            "_target_": "scoresde.nn.Architecture",
            "activation": values.choice("model.nonlinearity", _ACTIVATIONS),
            "conditional": values.flag("model.conditional"),
            **architecture(values),
        },
        "centre": not values.flag("data.centered"),
    }


def _size(values: "_Values", divisor: int) -> int:
    """Returns the size of the images; the reference does not pad them to a multiple."""
    size = values.count("data.image_size")
    if size % divisor:
        raise InputError(
            f"data.image_size must be divisible by {divisor} with this model.ch_mult, got {size}; "
            "the reference has no other models."
        )
    return size


def _ddpm(values: "_Values") -> Recipe:
    return {
        "transition": _between(values),
        "norm": {"_target_": "scoresde.nn.Groups", "most": 32, "least": 1},
        "rescale": False,
    }


def _ncsnpp(values: "_Values") -> Recipe:
    transition = {"biggan": _inside, "ddpm": _between}
    shown = {"none": _nothing, "input_skip": _input_skip, "residual": _input_residual}
    painted = {
        "none": None,
        "output_skip": {"_target_": "scoresde.nn.OutputSkip"},
        "residual": {"_target_": "scoresde.nn.OutputResidual"},
    }
    return {
        "transition": values.choice("model.resblock_type", transition)(values),
        "resampling": _resampling(values),
        "input_pyramid": values.choice("model.progressive_input", shown)(values),
        "output_pyramid": values.choice("model.progressive", painted),
        "rescale": values.flag("model.skip_rescale"),
        "init_scale": values.number("model.init_scale", 0.0),
    }


def _embedding(values: "_Values") -> Recipe:
    embedding = {"fourier": _fourier, "positional": _positional}
    return values.choice("model.embedding_type", embedding)(values)


def _positional(values: "_Values") -> Recipe:
    width = values.count("model.nf")
    if width % 2:
        raise InputError(
            f"model.nf must be even, because half of the embedding is sines, got {width}."
        )
    return {"_target_": "scoresde.nn.PositionalEmbedding", "width": width}


def _fourier(values: "_Values") -> Recipe:
    if not values.flag("training.continuous"):
        raise InputError(
            "training.continuous must be true for model.embedding_type='fourier', which embeds a "
            "continuous label, got false; the reference has no such models."
        )
    return {
        "_target_": "scoresde.nn.FourierEmbedding",
        "width": 2 * values.count("model.nf"),
        "scale": values.number("model.fourier_scale", 16.0),
        "log": True,
    }


def _inside(values: "_Values") -> Recipe:
    return {"_target_": "scoresde.nn.BigGANTransition"}


def _between(values: "_Values") -> Recipe:
    convolution = values.flag("model.resamp_with_conv")
    return {"_target_": "scoresde.nn.DDPMTransition", "convolution": convolution}


def _resampling(values: "_Values") -> Recipe:
    if not values.flag("model.fir"):
        return {"_target_": "scoresde.nn.BoxResampling"}
    kernel = values.get("model.fir_kernel", [1, 3, 3, 1])
    return {"_target_": "scoresde.nn.FIRResampling", "kernel": _plain(kernel)}


def _nothing(values: "_Values") -> None:
    return None


def _input_skip(values: "_Values") -> Recipe:
    combine = values.choice("model.progressive_combine", _COMBINATIONS)
    return {"_target_": "scoresde.nn.InputSkip", "combine": combine}


def _input_residual(values: "_Values") -> Recipe:
    return {"_target_": "scoresde.nn.InputResidual"}


# --- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """A configuration, read by dotted names; errors contain the name of an invalid value."""

    config: Mapping[str, Any]

    def get(self, key: str, default: Any = _MISSING) -> Any:
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING and default is _MISSING:
            raise InputError(f"The configuration lacks {key}; set it to the reference's value.")
        return default if value is _MISSING else value

    def text(self, key: str) -> str:
        return str(self.get(key)).lower()

    def choice(self, key: str, options: Mapping[str, Any]) -> Any:
        if self.text(key) not in options:
            raise InputError(f"{key} must be {either(options)}, got {self.get(key)!r}.")
        return options[self.text(key)]

    def flag(self, key: str) -> bool:
        return self._checked(key, self.get(key), bool, "true or false")

    def count(self, key: str) -> int:
        return self._checked(key, self.get(key), int, "a positive integer", least=1)

    def scales(self) -> int:
        value = self.get("model.num_scales", 1000)
        return self._checked("model.num_scales", value, int, "an integer of at least 2", least=2)

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        value = float(value) if type(value) is int else value
        return self._checked(key, value, float, "a number")

    def counts(self, key: str) -> list[int]:
        values = self.get(key)
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        if not listed or any(type(n) is not int or n < 1 for n in values):
            raise InputError(f"{key} must be a list of positive integers, got {values!r}.")
        return list(values)

    @staticmethod
    def _checked(key: str, value: Any, kind: Any, words: str, least: float = -math.inf) -> Any:
        if type(value) is not kind or value < least:
            raise InputError(f"{key} must be {words}, got {value!r}.")
        return value


def _published() -> dict[str, Mapping[str, Any]]:
    text = files("scoresde.interop.score_sde").joinpath("configurations.json").read_text("utf-8")
    return json.loads(text)


def _read_file(file: Path) -> Any:
    if not file.is_file():
        near = difflib.get_close_matches(str(file), names(), 3, 0.3)
        raise InputError(
            "config must be a file or one of the reference's configurations, such as "
            f"{', '.join(near or names()[:3])}, got {file}."
        )
    try:
        text = file.read_text("utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"Cannot read {file} as JSON or YAML: {brief(error)}.") from error


def _plain(value: Any) -> Any:
    """Converts tuples to lists, at any depth."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
