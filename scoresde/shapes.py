"""Helpers for formulas on data of any shape, and checks of a batch."""

import math
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import InputError


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshapes a coefficient per example so that it multiplies an array of examples.

    The coefficient is converted to the data type of ``x`` only here; without the conversion, a
    float64 coefficient would silently widen a float32 state.

    Arguments:
        coefficient: A coefficient, with shape ``()`` or ``(B,)``.
        x: Data, with shape ``(B, *)``.

    Returns:
        The coefficient, with shape ``()`` or ``(B, 1, ..., 1)``, in the data type of ``x``.

    Raises:
        InputError: If there is neither one coefficient nor one per example, or the data are not
            floating-point.
    """
    check_tensor(x)
    if not x.is_floating_point():
        raise InputError(
            f"x must be floating-point, got {x.dtype}; convert it to model units with "
            "Dataset.encode."
        )
    if coefficient.ndim == 0:
        return coefficient.to(x.dtype)
    return one_or_each(coefficient, x).to(x).reshape(-1, *(1,) * (x.ndim - 1))


def one_or_each(coefficient: Tensor, x: Tensor) -> Tensor:
    """Returns a coefficient as a column ``(1, 1)`` or ``(B, 1)``; arguments as for :func:`expand`.

    Raises:
        InputError: If there is neither one coefficient nor one per example.
    """
    if coefficient.ndim > 0 and coefficient.shape != x.shape[:1]:
        raise InputError(
            f"t must have shape () or ({len(x)},), one time or one per example, got "
            f"{tuple(coefficient.shape)}."
        )
    return coefficient.reshape(-1, 1).to(x.device)


def none_like(values: Tensor) -> Tensor:
    """Returns a condition that is "none" for every example: -1 for classes, otherwise NaN.

    Arguments:
        values: A condition, with shape ``(B, *)``.
    """
    return torch.full_like(values, torch.nan if values.is_floating_point() else -1)


def is_none(values: Tensor) -> Tensor:
    """Returns whether a condition ``(B, *)`` is "none" for each example, bool ``(B,)``."""
    if values.is_floating_point():
        return values.reshape(len(values), -1).isnan().all(1)
    return (values.reshape(len(values), -1) == -1).all(1)


def check_output(output: Any) -> Tensor:
    """Returns the output of a network.

    Raises:
        InputError: If the output is not a tensor.
    """
    if isinstance(output, Tensor):
        return output
    match output:
        case [Tensor(), *_]:
            remedy = "return its first item"
        case object(sample=Tensor()):
            remedy = "return its .sample"
        case _:
            remedy = "return only a tensor"
    raise InputError(
        f"network must return a tensor of the shape of its input, got {type(output).__name__}; "
        f"{remedy}, or wrap the network in a torch.nn.Module whose forward(x, c) does."
    )


def sum_features(x: Tensor) -> Tensor:
    """Sums all axes but the first: ``(B, *)`` to ``(B,)``."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def log_normal(x: Tensor, std: float | Tensor) -> Tensor:
    r"""Returns the log-density of :math:`N(0, \mathrm{std}^2 I)`.

    Arguments:
        x: Points, with shape ``(B, *)``.
        std: The standard deviation, positive; a number, or a tensor ``()``.

    Returns:
        The log-densities in nats, with shape ``(B,)``.
    """
    width = std.to(x).log() if isinstance(std, Tensor) else math.log(std)
    constant = x.shape[1:].numel() * (width + 0.5 * math.log(2 * math.pi))
    return -0.5 * sum_features((x / std) ** 2) - constant


def check_tensor(x: Any, name: str = "x") -> None:
    """Checks that a value is a tensor, rather than an array of NumPy or a list.

    Raises:
        InputError: If it is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"{name} must be a tensor, got {type(x).__name__}; use torch.as_tensor({name})."
        )


def check_batch(x: Tensor) -> None:
    """Checks the shape and data type of a batch of examples.

    Raises:
        InputError: If ``x`` is not a batch ``(B, *)`` of floats.
    """
    check_tensor(x)
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise InputError(
            "x must be a floating-point batch (B, ...) of two or more axes, not empty, got shape "
            f"{tuple(x.shape)} and type {x.dtype}; use x[None] for one example, and "
            "Dataset.encode for integers."
        )


def check_data(x: Tensor) -> None:
    """Checks a batch of examples and their values; on a GPU this synchronises.

    Raises:
        InputError: If ``x`` is not a batch ``(B, *)`` of floats, all of them finite.
    """
    check_batch(x)
    if not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise InputError(
            f"x must be finite, got {count} values that are NaN or infinite; remove or replace "
            "them."
        )
