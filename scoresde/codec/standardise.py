"""Standardisation: a shift and a width per channel, per feature, or for all data."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from scoresde.codec.affine import Affine
from scoresde.errors import InputError

log = logging.getLogger(__name__)

_NAMED = 8  # constant features listed in a message


class InChunks(Protocol):
    """Training data that are read in chunks."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the data, ``(N, *)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Their data type."""

    def chunks(self) -> Iterator[Tensor]:
        """Yields all rows in chunks."""


@dataclass(frozen=True)
class _Moments:
    """Statistics of training data over some axes, float64.

    Arguments:
        mean: The means.
        std: The standard deviations.
        low: The smallest values.
        high: The largest values.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(train: Tensor | InChunks, axes: tuple[int, ...]) -> "_Moments":
        """Computes the statistics; chunks are combined by the formula of Chan et al. 1979."""
        if isinstance(train, Tensor):
            x = train.double()
            std = x.std(axes, correction=0)
            return _Moments(x.mean(axes), std, x.amin(axes), x.amax(axes))
        count, found, squares = 0, None, torch.zeros(())
        for chunk in train.chunks():
            one, n = _Moments.of(chunk, axes), math.prod(chunk.shape[axis] for axis in axes)
            found = one if found is None else found
            step, total = one.mean - found.mean, count + n
            squares = squares + n * one.std.square() + step.square() * (count * n / total)
            low, high = torch.minimum(found.low, one.low), torch.maximum(found.high, one.high)
            mean, count = found.mean + step * (n / total), total
            found = _Moments(mean, (squares / total).sqrt(), low, high)
        assert found is not None
        return found


class Standardisation(ABC):
    """Base class for standardisations, which fit shifts and widths to real-valued training data.

    Values with a common shift and width have mean 0 and standard deviation 1 in model units.
    """

    @abstractmethod
    def axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of training data ``(N, *)`` that share a shift and a width."""

    def __call__(self, train: Tensor | InChunks) -> Affine:
        """Fits the codec.

        Constant features are listed in the log. They are encoded as 0, and decoding restores them.

        Arguments:
            train: Training examples in raw units, finite, with shape ``(N, *)``.

        Raises:
            InputError: If all values are equal.
        """
        ndim = len(train.shape)
        axes = self.axes(ndim)
        kept = [size for axis, size in enumerate(train.shape) if axis not in axes]
        if torch.Size(kept).numel() == 1:
            return _whole(train)
        found = _Moments.of(train, axes)
        mean, width, low, high = found.mean, found.std, found.low, found.high
        constant = low == high
        if bool(constant.all()):
            raise InputError(_ALL.format(low.flatten().tolist()[:_NAMED]))
        if bool(constant.any()):
            _say(constant)
        # The mean of equal values may differ from them by rounding.
        mean, width = torch.where(constant, low, mean), torch.where(constant, 0.0, width)
        tail = (1,) * (ndim - 1 - mean.ndim)
        shift, width = (part.reshape(*part.shape, *tail).cpu() for part in (mean, width))
        ends = (low, high) if ndim == 2 else (low.min(), high.max())
        low, high = (end.cpu() for end in ends)
        high = torch.where(high > low, high, low + 1)
        return Affine(train.shape[1:], shift, width, None, low, high, dtype_of(train))


@final
@dataclass(frozen=True)
class PerChannel(Standardisation):
    """Standardisation of each column of a table ``(N, D)``, or each channel ``(N, C, ...)``.

    Example:
        >>> codec = PerChannel()(torch.tensor([[1.0, 5e4], [3.0, 9e4]]))
        >>> codec.shift, codec.width
        ((2.0, 70000.0), (1.0, 20000.0))
    """

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (0, *range(2, ndim))


@final
@dataclass(frozen=True)
class PerFeature(Standardisation):
    """Standardisation of each value of an example separately, such as every pixel."""

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (0,)


@final
@dataclass(frozen=True)
class Whole(Standardisation):
    """Standardisation of all values together, by their mean and standard deviation.

    Example:
        >>> Whole()(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).shift
        2.0
    """

    def axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))


_ALL = "Standardisation requires values that vary, got the constant {}; set standardise=False."


def _whole(train: Tensor | InChunks) -> Affine:
    found = _Moments.of(train, tuple(range(len(train.shape))))
    mean, width, low, high = map(float, (found.mean, found.std, found.low, found.high))
    if width == 0 or low == high:
        raise InputError(_ALL.format(low))
    return Affine(train.shape[1:], mean, width, None, low, high, dtype_of(train))


def as_it_is(train: Tensor | InChunks) -> Affine:
    """Returns the codec for data already in model units, with shift 0 and width 1."""
    found = _Moments.of(train, tuple(range(len(train.shape))))
    low, high = float(found.low), float(found.high)
    ends = (low, high if high > low else low + 1)
    return Affine(train.shape[1:], 0.0, 1.0, None, *ends, dtype_of(train))


def dtype_of(train: Tensor | InChunks) -> str:
    """Returns the name of the type of real-valued raw data."""
    return "float64" if train.dtype == torch.float64 else "float32"


def _say(constant: Tensor) -> None:
    places = [tuple(place) for place in constant.nonzero().tolist()]
    words = [str(p[0] if len(p) == 1 else p) for p in places[:_NAMED]]
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    log.warning(
        "Constant training features: %s%s (of %d columns, channels or features, counted from "
        "0). They are 0 in model units, and samples contain their constant values. Their "
        "density is infinite, so a likelihood uses that of the model's noise; remove them to "
        "compare likelihoods.",
        ", ".join(words),
        more,
        constant.numel(),
    )
