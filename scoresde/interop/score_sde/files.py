"""Reader of the reference's files, which executes no code in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scoresde.errors import InputError
from scoresde.interop._messages import kind_of
from scoresde.recipe import brief
from scoresde.tensors import read_tensors

# The learning rate in these files is a NumPy number, whose type is named differently in old and
# new releases.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8")),
]
_PREFIX = "module."


@dataclass(frozen=True)
class Content:
    """Contents of a checkpoint that are used.

    Arguments:
        path: The file.
        weights: Tensors by name, without ``module.`` and without the noise levels.
        average: Averages of the trained tensors in their order, or None.
        step: Number of updates done.
    """

    path: Path
    weights: dict[str, Tensor]
    average: list[Tensor] | None
    step: int


def read_checkpoint(path: str | Path) -> Content:
    """Reads a file.

    Raises:
        InputError: If the file is missing, cannot be read without executing code in it, or is not
            a checkpoint of the reference.
    """
    file = Path(path)
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise InputError(f"{file} {reason}; pass a .pth file of score_sde_pytorch.")
    content = _load(file)
    parts = content if isinstance(content, Mapping) else {}
    if not isinstance(parts.get("model"), Mapping):
        if "model" in parts:
            found = kind_of(parts["model"])
        else:
            found = f"the keys {brief(list(parts))}" if parts else kind_of(content)
        raise InputError(
            f"{file} must be a checkpoint of score_sde_pytorch with a dictionary 'model', got "
            f"{found}."
        )
    weights = {str(name).removeprefix(_PREFIX): value for name, value in content["model"].items()}
    weights.pop("sigmas", None)  # follows from the configuration
    _check_tensors(file, weights)
    step = content.get("step", 0)
    return Content(file, weights, _average(file, content), step if isinstance(step, int) else 0)


def _load(file: Path) -> Any:
    try:
        return read_tensors(file, _SAFE)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"Cannot read {file} without executing code in it ({brief(error)}); it is damaged or "
            "not a checkpoint of score_sde_pytorch."
        ) from error


def _average(file: Path, content: Mapping[str, Any]) -> list[Tensor] | None:
    """Returns the averaged tensors, if the file has any."""
    ema = content.get("ema")
    if ema is None:
        return None
    average = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(average, list | tuple):
        raise InputError(
            f"{file} is damaged: ema.shadow_params must be a list, got {type(average).__name__}."
        )
    _check_tensors(file, {f"ema.shadow_params[{i}]": value for i, value in enumerate(average)})
    return list(average)


def _check_tensors(file: Path, tensors: Mapping[str, Any]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(
                f"{file} is damaged: {name} must be a floating-point tensor, got {kind_of(value)}."
            )
