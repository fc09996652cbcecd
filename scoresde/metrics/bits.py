r"""Likelihoods in units that can be compared between models and papers.

A model gives the log-density of :math:`x`, in nats and in its own units. One quantisation step
is :math:`s` model units wide, so that the density of the dequantised data
:math:`y + u`, whose steps are one unit wide, is larger by :math:`s` in each of :math:`D`
dimensions:

.. math:: \log p(y + u) = \log p(x) + D \log s .

Bits per dimension are its negative, divided by :math:`D \log 2`. They are a matter of the scaling
of the data and not of the model; data of :math:`L` levels on [-1, 1] has :math:`s = 2 / L`.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from scoresde.errors import InputError

Number = TypeVar("Number", float, Tensor)


def bits_per_dim(log_prob: Number, shape: Sequence[int], scale: float) -> Number:
    r"""Turns log-densities into bits per dimension.

    .. math:: b = -\frac{\log p(x)}{D \log 2} - \log_2 s

    Arguments:
        log_prob: Log-densities :math:`\log p(x)` in nats and model units, of any shape.
        shape: The shape of one example, of :math:`D` elements.
        scale: Model units per quantisation step, :math:`s`, positive.

    Returns:
        Bits per dimension, of the shape and data type of ``log_prob``.

    Example:
        The uniform density on [-1, 1] spends log2(L) bits on each of L levels.

        >>> bits_per_dim(math.log(1 / 2), shape=(1,), scale=2 / 256)
        8.0
    """
    dimension = _dimension(shape)
    return -log_prob / (dimension * math.log(2)) - math.log2(_check_scale(scale))


def nats(log_prob: Number, shape: Sequence[int], scale: float) -> Number:
    r"""Turns log-densities into nats per example in raw units, for real-valued data.

    .. math:: -\log p(y) = -\log p(x) - D \log s

    Arguments:
        log_prob: Log-densities :math:`\log p(x)` in nats and model units, of any shape.
        shape: The shape of one example, of :math:`D` elements.
        scale: Model units per raw unit, :math:`s`, positive.

    Returns:
        Negative log-densities, of the shape and data type of ``log_prob``.

    Example:
        >>> nats(math.log(1 / 2), shape=(1,), scale=0.5)
        1.3862943611198906
    """
    return -log_prob - _dimension(shape) * math.log(_check_scale(scale))


def _dimension(shape: Sequence[int]) -> int:
    dimension = math.prod(shape)
    if dimension < 1:
        raise InputError(f"shape={tuple(shape)} has no element; give the shape of one example.")
    return dimension


def _check_scale(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise InputError(
            f"scale={scale} cannot be used; give the model units per quantisation step, positive "
            "(2/L for L levels on [-1, 1])."
        )
    return float(scale)
