"""Standardisation: one mean and one width for a channel, for a feature, or for all data."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.codec.affine import Affine
from scoresde.errors import InputError

log = logging.getLogger(__name__)

_NAMED = 8  # constant features that a message names


class Standardisation(ABC):
    """Base class for standardisations: fits shifts and widths to real-valued training data.

    The numbers that share a shift and a width have mean 0 and standard deviation 1 in model units.
    """

    @abstractmethod
    def axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of training data ``(N, *)`` over which the numbers are shared."""

    def __call__(self, train: Tensor) -> Affine:
        """Fits the codec.

        Features that are constant are named in the log; they become 0, and decoding returns them.

        Arguments:
            train: Training examples in raw units, finite, with shape ``(N, *)``.

        Raises:
            InputError: If all of them are the same number.
        """
        axes = self.axes(train.ndim)
        kept = [size for axis, size in enumerate(train.shape) if axis not in axes]
        if torch.Size(kept).numel() == 1:
            return _whole(train)
        values = train.double()
        mean, width = values.mean(axes), values.std(axes, correction=0)
        low, high = values.amin(axes), values.amax(axes)
        constant = low == high
        if bool(constant.all()):
            raise InputError(_ALL.format(low.flatten().tolist()[:_NAMED]))
        if bool(constant.any()):
            _say(constant)
        # A mean may differ from its equal terms by rounding.
        mean, width = torch.where(constant, low, mean), torch.where(constant, 0.0, width)
        tail = (1,) * (train.ndim - 1 - mean.ndim)
        shift, width = (part.reshape(*part.shape, *tail).cpu() for part in (mean, width))
        ends = (low, high) if train.ndim == 2 else (low.min(), high.max())
        low, high = (end.cpu() for end in ends)
        high = torch.where(high > low, high, low + 1)
        return Affine(train.shape[1:], shift, width, None, low, high, dtype_of(train))


@final
@dataclass(frozen=True)
class PerChannel(Standardisation):
    """Each column of a table ``(N, D)``, each channel of images or signals ``(N, C, ...)``.

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
    """Each number of an example by itself, such as every pixel."""

    def axes(self, ndim: int) -> tuple[int, ...]:
        return (0,)


@final
@dataclass(frozen=True)
class Whole(Standardisation):
    """All numbers together: their mean and their standard deviation.

    Example:
        >>> Whole()(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).shift
        2.0
    """

    def axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))


_ALL = "All training values are {} and cannot be standardised; set standardise=False."


def _whole(train: Tensor) -> Affine:
    values = train.double()
    width = float(values.std(correction=0))
    low, high = float(train.min()), float(train.max())
    if width == 0 or low == high:
        raise InputError(_ALL.format(low))
    return Affine(train.shape[1:], float(values.mean()), width, None, low, high, dtype_of(train))


def as_it_is(train: Tensor) -> Affine:
    """Returns the codec of data that are in model units already: shift 0 and width 1."""
    low, high = float(train.min()), float(train.max())
    ends = (low, high if high > low else low + 1)
    return Affine(train.shape[1:], 0.0, 1.0, None, *ends, dtype_of(train))


def dtype_of(train: Tensor) -> str:
    """Returns the name of the type of real-valued raw data."""
    return "float64" if train.dtype == torch.float64 else "float32"


def _say(constant: Tensor) -> None:
    places = [tuple(place) for place in constant.nonzero().tolist()]
    words = [str(p[0] if len(p) == 1 else p) for p in places[:_NAMED]]
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    log.warning(
        "Constant in training: %s%s (of %d columns, channels or features, from 0). They become 0 "
        "in model units and come back as they are in samples. Their density is infinite, and a "
        "likelihood counts that of the model's noise; remove them to compare likelihoods.",
        ", ".join(words),
        more,
        constant.numel(),
    )
