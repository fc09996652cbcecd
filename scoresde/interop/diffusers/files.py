"""Reader of the library's files, which executes no code in them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.errors import InputError
from scoresde.interop._messages import either, kind_of
from scoresde.recipe import brief
from scoresde.tensors import read_tensors

_CONFIG = "config.json"
_SCHEDULER = "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_MISSING = object()


@dataclass(frozen=True)
class Values:
    """A configuration; errors contain the file, the key and the value.

    Arguments:
        path: The file.
        values: Values by key.
    """

    path: Path
    values: Mapping[str, Any]

    def error(self, key: str, constraint: str) -> InputError:
        """Returns the error for the value of a key, with a constraint such as "must be 1"."""
        value = json.dumps(self.values.get(key))
        return InputError(f"{self.path}: {key} {constraint}, got {brief(value)}.")

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Returns any value."""
        return self.values[key] if default is _MISSING else self.values.get(key, default)

    def one_of(self, key: str, known: Sequence[Any], default: Any = _MISSING) -> Any:
        """Returns a value that must be in ``known``."""
        value = self.get(key, default)
        if not any(value == k and isinstance(value, bool) == isinstance(k, bool) for k in known):
            raise self.error(key, f"must be {either(json.dumps(k) for k in known)}")
        return value

    def flag(self, key: str) -> bool:
        """Returns a value that must be true or false."""
        return self.one_of(key, (True, False))

    def count(self, key: str, default: Any = _MISSING) -> int:
        """Returns a value that must be a positive integer."""
        return self._count(key, self.get(key, default))

    def counts(self, key: str) -> list[int]:
        """Returns a value that must be a list of positive integers."""
        words = "must be a list of positive integers"
        return [self._count(key, n, words) for n in self.items(key)]

    def number(self, key: str, default: Any = _MISSING) -> float:
        """Returns a value that must be a finite number."""
        return self._number(key, self.get(key, default))

    def numbers(self, key: str) -> list[float]:
        """Returns a value that must be a list of finite numbers."""
        words = "must be a list of finite numbers"
        return [self._number(key, x, words) for x in self.items(key)]

    def items(self, key: str) -> list[Any]:
        """Returns a value that must be a non-empty list."""
        values = self.get(key)
        if not isinstance(values, list) or not values:
            raise self.error(key, "must be a non-empty list")
        return values

    def _count(self, key: str, value: Any, constraint: str = "must be a positive integer") -> int:
        if type(value) is not int or value < 1:
            raise self.error(key, constraint)
        return value

    def _number(self, key: str, value: Any, constraint: str = "must be a finite number") -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, constraint)
        return float(value)


@dataclass(frozen=True)
class Content:
    """Contents of a folder that are used.

    Arguments:
        config: Configuration of the network.
        scheduler: Configuration of the scheduler, empty without a scheduler.
        path: File of the weights.
        weights: Tensors by name.
    """

    config: Values
    scheduler: Values
    path: Path
    weights: dict[str, Tensor]


def read_folder(folder: str | Path) -> Content:
    """Reads the folder of a network or of a pipeline.

    Raises:
        InputError: If a file is missing, damaged, or cannot be read without executing code in it.
    """
    home = _network_folder(Path(folder))
    config = Values(home / _CONFIG, _read_json(home / _CONFIG))
    path = _weights_file(home)
    return Content(config, _scheduler(home), path, _read_weights(path))


def _network_folder(folder: Path) -> Path:
    """Returns the folder of the network itself; in a pipeline, its model rather than its codec."""
    for home in (folder / "unet", folder, folder / "vae"):
        if (home / _CONFIG).is_file():
            return home
    raise InputError(
        f"{folder} must contain {_CONFIG}, or a folder unet or vae with it; use the folder of a "
        "UNet2DModel, an AutoencoderKL or a pipeline saved by diffusers."
    )


def _scheduler(home: Path) -> Values:
    """Returns the configuration of the scheduler that goes with a network."""
    whole = home.resolve()
    pipeline = whole.parent if whole.name == "unet" else home
    for place in (pipeline / "scheduler", pipeline):
        path = place / _SCHEDULER
        if path.is_file():
            return Values(path, _read_json(path))
    return Values(home / _SCHEDULER, {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Cannot read {path} as JSON: {brief(error)}.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} is damaged: the content must be a dictionary, got {brief(values)}."
        )
    return values


def _weights_file(home: Path) -> Path:
    files = [home / f"{_WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
    for path in files:
        if path.is_file():
            return path
    names = " or ".join(path.name for path in files)
    raise InputError(f"{home} must contain the weights, {names}, got neither.")


def _read_weights(path: Path) -> dict[str, Tensor]:
    weights = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    if not isinstance(weights, Mapping):
        raise InputError(
            f"{path} is damaged: the content must be a dictionary of tensors, got "
            f"{type(weights).__name__}."
        )
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(
                f"{path} is damaged: {name} must be a floating-point tensor, got {kind_of(value)}."
            )
    return {str(name): value for name, value in weights.items()}


def _safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(
            f"{path} requires the package safetensors, which is not installed; run pip install "
            "scoresde[interop]."
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is damaged: {brief(error)}.") from error


def _pickled(path: Path) -> Any:
    try:
        return read_tensors(path)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"Cannot read {path} without executing code in it ({brief(error)}); it is damaged or "
            "not a file of weights."
        ) from error
