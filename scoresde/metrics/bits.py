r"""Likelihoods in units that are comparable between models and papers.

A model gives the log-density of :math:`x`, in nats and in its own units. One quantisation step is
:math:`s` model units wide, so the density of the dequantised data
:math:`y + u`, whose steps are one unit wide, is larger by :math:`s` in each of :math:`D`
dimensions:

.. math:: \log p(y + u) = \log p(x) + D \log s .

In general the last term is the *log-determinant* of the codec (:mod:`scoresde.codec`): the sum of
the log-scales if each feature has its own.

Bits per dimension are its negative, divided by :math:`D \log 2`. The conversion depends on the
scaling of the data and not on the model; data of :math:`L` levels on [-1, 1] has :math:`s = 2 /
L`.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from scoresde.errors import InputError

Number = TypeVar("Number", float, Tensor)


def bits_per_dim(
    log_prob: Number,
    shape: Sequence[int],
    scale: float | None = None,
    *,
    log_det: float | Tensor | None = None,
) -> Number:
    r"""Converts log-densities to bits per dimension.

    .. math:: b = -\frac{\log p(x)}{D \log 2} - \log_2 s

    Arguments:
        log_prob: Log-densities :math:`\log p(x)` in nats and model units, of any shape.
        shape: Shape of one example, of :math:`D` elements.
        scale: Model units per quantisation step, :math:`s`, positive.
        log_det: Alternative to ``scale``: the codec's term in a log-density, in nats (:math:`D
            \log s` for one scale); a number, or one for each log-density.

    Returns:
        Bits per dimension, of the shape and data type of ``log_prob``.

    Raises:
        InputError: If a number is out of range, or not exactly one of ``scale`` and ``log_det`` is
            set.

    Example:
        The uniform density on [-1, 1] spends log2(L) bits on each of L levels.

        >>> bits_per_dim(math.log(1 / 2), shape=(1,), scale=2 / 256)
        8.0
        >>> bits_per_dim(math.log(1 / 2), shape=(1,), log_det=math.log(2 / 256))
        8.0
    """
    unit = _dimension(shape) * math.log(2)
    if _is_scale(scale, log_det):
        return -log_prob / unit - math.log2(_check_scale(scale))
    return -(log_prob + _like(log_det, log_prob)) / unit


def nats(
    log_prob: Number,
    shape: Sequence[int],
    scale: float | None = None,
    *,
    log_det: float | Tensor | None = None,
) -> Number:
    r"""Converts log-densities to nats per example in raw units, for real-valued data.

    .. math:: -\log p(y) = -\log p(x) - D \log s

    Arguments:
        log_prob: Log-densities :math:`\log p(x)` in nats and model units, of any shape.
        shape: Shape of one example, of :math:`D` elements.
        scale: Model units per raw unit, :math:`s`, positive.
        log_det: Alternative to ``scale``, as in :func:`bits_per_dim`.

    Returns:
        Negative log-densities, of the shape and data type of ``log_prob``.

    Raises:
        InputError: As in :func:`bits_per_dim`.

    Example:
        >>> nats(math.log(1 / 2), shape=(1,), scale=0.5)
        1.3862943611198906
    """
    dimension = _dimension(shape)
    if _is_scale(scale, log_det):
        return -log_prob - dimension * math.log(_check_scale(scale))
    return -log_prob - _like(log_det, log_prob)


def _is_scale(scale: float | None, log_det: float | Tensor | None) -> bool:
    """Returns whether the scale is set rather than the log-determinant."""
    if (scale is None) == (log_det is None):
        got = "neither" if scale is None else "both"
        raise InputError(
            f"Exactly one of scale and log_det must be passed, got {got}; use codec.log_det(raw, "
            "x), or codec.scale if it is a single number."
        )
    return scale is not None


def _like(log_det: Any, log_prob: Any) -> Any:
    """Returns a log-determinant in the data type of the log-densities."""
    both = isinstance(log_det, Tensor) and isinstance(log_prob, Tensor)
    return log_det.to(log_prob) if both else log_det


def _dimension(shape: Sequence[int]) -> int:
    dimension = math.prod(shape)
    if dimension < 1:
        raise InputError(
            f"shape must be the shape of one example, with positive sizes, got {tuple(shape)}."
        )
    return dimension


def _check_scale(scale: float | None) -> float:
    if scale is None or not 0 < scale < math.inf:
        raise InputError(
            f"scale must be positive and finite, got {scale}; pass the model units per "
            "quantisation step (2/L for L levels on [-1, 1])."
        )
    return float(scale)
