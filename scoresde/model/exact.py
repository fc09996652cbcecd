"""Helpers that the exact models share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError


def check_shape(x: Tensor, shape: torch.Size) -> None:
    """Checks that a batch is floating-point and its examples have a shape.

    Raises:
        InputError: If the shape differs, or the batch is not floating-point.
    """
    if x.shape[1:] != shape or not x.is_floating_point():
        raise InputError(
            f"x must be floating-point with shape (B, {', '.join(map(str, shape))}), got "
            f"{x.dtype} with shape {tuple(x.shape)}."
        )


def check_symmetric(covariance: Tensor) -> None:
    """Checks that a covariance ``(D, D)`` is symmetric up to rounding.

    Raises:
        InputError: If it is not.
    """
    if not torch.allclose(covariance, covariance.T):
        off = (covariance - covariance.T).abs().max()
        raise InputError(
            f"covariance must be symmetric, got a difference of {off:.4g} from its transpose; "
            "pass (C + C.T) / 2."
        )


def floats(values: Tensor | Sequence | float, like: Tensor | None = None) -> Tensor:
    """Converts numbers to a floating-point tensor, without rounding Python's floats.

    Arguments:
        values: A tensor, or numbers.
        like: A tensor whose data type and device are used. If None, a floating-point tensor keeps
            its data type, and other values get torch's default.
    """
    if like is None:
        typed = isinstance(values, Tensor) and values.is_floating_point()
        dtype, device = None if typed else torch.get_default_dtype(), None
    else:
        dtype, device = like.dtype, like.device
    exact = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    return exact.to(device=device, dtype=dtype)
