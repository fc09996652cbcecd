"""What all networks share: the checks of their arguments, and the initialisation."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TypeVar

from torch import nn

from scoresde.errors import InputError

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def check_count(name: str, value: int, least: int = 1) -> int:
    """Returns a whole number if it is at least ``least``.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")
    return int(value)


def check_counts(name: str, values: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """Returns a sequence of whole numbers of at least ``least`` as a tuple.

    Raises:
        InputError: If it is not one.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{name}={values!r} must be a list of whole numbers.")
    return tuple(check_count(f"{name}[{i}]", n, least) for i, n in enumerate(values))


def check_dropout(dropout: float) -> float:
    """Returns a probability of dropout if it is in [0, 1).

    Raises:
        InputError: If it is not.
    """
    if not 0 <= dropout < 1:
        raise InputError(
            f"dropout={dropout!r} is outside [0, 1); give the fraction to drop, such as 0.1, "
            "or 0 for none."
        )
    return float(dropout)


def initialise(layer: Layer, scale: float = 1.0) -> Layer:
    r"""Draws a layer's weights by variance scaling, and sets its bias to zero.

    .. math:: w \sim U(-a, a), \qquad a^2 = \frac{6 \, \mathrm{scale}}{n_{in} + n_{out}}

    With ``scale=0`` the weights are exactly zero, so that a residual branch starts as nothing.

    References:
        Glorot and Bengio, *Understanding the difficulty of training deep feedforward neural
        networks*, 2010 (equation 16).

    Arguments:
        layer: A linear layer or a convolution; it is changed in place, and returned.
        scale: The factor of the variance, non-negative.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
