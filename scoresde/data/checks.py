"""Checks of raw data: real numbers in float32 or float64, or integers 0 to L-1."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.codec.levels import check_levels, integer_type
from scoresde.errors import InputError


def as_path(path: Any) -> Path:
    """Returns a path, with the home folder in place of ``~``."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"path must be the path of a file or a folder, got {type(path).__name__}; for values "
            "in memory, use Dataset.of('mine', make_splits(torch.as_tensor(x)))."
        )
    return Path(path).expanduser()


def as_raw(
    values: np.ndarray, levels: int | None = None, first: int | None = None
) -> tuple[Tensor, int | None]:
    """Converts an array to the data type of raw data.

    ==============  ======================  ==========================
    array           raw tensor              levels
    ==============  ======================  ==========================
    float64         float64                 None
    other floats    float32                 None
    bool            uint8                   2
    uint8           uint8                   256, unless given
    other integers  uint8 or int16          must be given
    ==============  ======================  ==========================

    Arguments:
        values: An array of numbers, with shape ``(N, *)``.
        levels: Number of levels L of integers, in [2, 32768].
        first: Index of the first row, if the array is a part of a larger one.

    Returns:
        The raw tensor, with shape ``(N, *)``, and its levels (None for real numbers).

    Raises:
        InputError: If the array is empty, is not numeric, or has a NaN, an infinity or an integer
            outside 0 to L-1; or if the levels are missing, or are set for real numbers.
    """
    if values.ndim == 0 or values.size == 0:
        raise InputError(f"The data must have a non-empty shape (N, ...), got {values.shape}.")
    if values.dtype.kind == "f":
        if levels is not None:
            raise InputError(
                f"levels must not be set for real-valued data ({values.dtype}), got {levels}; "
                "remove it, or convert the data to integers."
            )
        with np.errstate(over="ignore"):
            raw = torch.from_numpy(values.astype(np.float32))
        check_finite(raw, first)  # also for float64: values beyond float32 have no finite variance
        wide = values.dtype.itemsize >= 8
        return torch.from_numpy(values.astype(np.float64)) if wide else raw, None
    if values.dtype.kind not in "bui":
        raise InputError(
            f"The data must be real numbers, integers or booleans, got type {values.dtype}."
        )
    levels = check_levels(_default_levels(values.dtype) if levels is None else levels)
    if values.dtype == np.uint8 and levels == 256:
        return torch.from_numpy(values.copy()), levels
    check_range(values, levels, first)
    return torch.from_numpy(values.astype(np.int16)).to(integer_type(levels)), levels


def _default_levels(dtype: np.dtype) -> int:
    if dtype == np.bool_:
        return 2
    if dtype == np.uint8:
        return 256
    raise InputError(
        f"levels must be set for data of type {dtype}, got None; use levels=L (on the command "
        "line data.levels=L) for integers 0 to L-1 (the brightest level may be absent from the "
        "data), or convert them to float32."
    )


def check_range(values: np.ndarray, levels: int, first: int | None = None) -> None:
    """Checks that integers are 0 to L-1; arguments as for :func:`as_raw`."""
    outside = (values < 0) | (values >= levels)
    if outside.any():
        place = tuple(map(int, np.unravel_index(int(outside.argmax()), outside.shape)))
        raise InputError(
            f"The data must be in [0, {levels - 1}], got {_count(int(outside.sum()), first)} "
            f"values outside, the first at index {_index(place, first)}: {values[place]}; pass "
            "the number of levels of the data, or shift the data."
        )


def check_finite(values: Tensor, first: int | None = None) -> None:
    """Checks that values are finite; arguments as for :func:`as_raw`."""
    bad = ~values.isfinite()
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        share = f" of {values.numel()}" if first is None else ""
        raise InputError(
            f"The data must be finite in float32, got {_count(int(bad.sum()), first)}{share} "
            f"values that are NaN or infinite, the first at index {_index(place, first)}: "
            f"{values[place]}; remove or replace them."
        )


def _count(found: int, first: int | None) -> str:
    return f"{found}" if first is None else f"at least {found}"


def _index(place: tuple[int, ...], first: int | None) -> tuple[int, ...]:
    return (place[0] + (first or 0), *place[1:])


def check_integer(name: str, value: int, most: int | None = None, least: int = 1) -> int:
    """Returns an integer that is at least ``least``, and at most ``most``."""
    if not _is_integer(value) or value < least or (most is not None and value > most):
        kind = "a positive integer" if least == 1 else f"an integer >= {least}"
        kind = kind if most is None else f"an integer in [{least}, {most}]"
        raise InputError(f"{name} must be {kind}, got {value}.")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(name: str, value: float, least: float = 0.0) -> float:
    """Returns a finite number above ``least`` (or at it, unless it is 0)."""
    if not (least <= value < math.inf and value > 0):
        bound = "positive and finite" if least == 0 else f"finite and at least {least}"
        raise InputError(f"{name} must be {bound}, got {value}.")
    return float(value)
