"""Helpers that the exact models share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError


def check_shape(x: Tensor, shape: torch.Size) -> None:
    """Checks that a batch has examples of a shape.

    Raises:
        InputError: If it has another one, or is not of floats.
    """
    if x.shape[1:] != shape or not x.is_floating_point():
        raise InputError(
            f"Data of shape {tuple(x.shape)} and type {x.dtype} do not fit a model of examples "
            f"{tuple(shape)}; give floats (B, {', '.join(map(str, shape))})."
        )


def floats(values: Tensor | Sequence | float, like: Tensor | None = None) -> Tensor:
    """Turns numbers into floats, without losing a digit of Python's floats.

    Arguments:
        values: A tensor, or numbers.
        like: A tensor whose data type and device they take; None keeps the data type of floats in
            a tensor, and is torch's default for others.
    """
    if like is None:
        typed = isinstance(values, Tensor) and values.is_floating_point()
        dtype, device = None if typed else torch.get_default_dtype(), None
    else:
        dtype, device = like.dtype, like.device
    exact = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    return exact.to(device=device, dtype=dtype)
