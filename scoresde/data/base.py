r"""Data sets, and the units in which a model sees them.

Raw data :math:`y` comes as integers :math:`0, \dots, L-1` (pixels, say) or as real numbers. A
model sees :math:`x`, of about unit size. The two are tied by one affine map

.. math:: x = (y - m) / w ,

so that a log-density changes by a constant: :math:`\log p(y) = \log p(x) + D \log s` in :math:`D`
dimensions, where the *scale* :math:`s = 1/w` counts model units per raw unit.

Integers are made continuous first. The density of a model on integers is unbounded, and noise
:math:`u \sim U(0, 1)` makes it a proper likelihood, a lower bound by Jensen's inequality,

.. math:: \mathbb{E}_u \log p(y + u) \le \log \int_0^1 p(y + u) \, du = \log P(y) .

The :math:`L` levels fill :math:`[0, L]`, which is mapped onto [-1, 1]:

.. math:: x = 2 (y + u) / L - 1, \qquad s = 2 / L, \qquad y = \lfloor (x + 1) L / 2 \rfloor ,

or, not centred, onto [0, 1]: :math:`x = (y + u) / L`, :math:`s = 1 / L`.

Real numbers are standardised by the mean and the standard deviation of all training values.

References:
    Theis et al., *A note on the evaluation of generative models*, ICLR 2016 (section 3.1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from scoresde.data.checks import check_finite, check_range, integer_type
from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams

SPLITS = ("train", "validation", "test")


@final
@dataclass(frozen=True)
class Scaling:
    r"""The affine map :math:`x = (y - m) / w` from raw to model units.

    Arguments:
        shift: The raw value :math:`m` that becomes 0.
        width: The raw length :math:`w` that becomes 1, positive.

    Example:
        >>> Scaling.of_levels(4).encode(torch.arange(5.0))
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """

    shift: float = 0.0
    width: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and 0 < self.width < math.inf):
            raise InputError(
                f"shift={self.shift}, width={self.width}: both must be finite and the width "
                "positive."
            )

    @staticmethod
    def of_levels(levels: int, centred: bool = True) -> "Scaling":
        """Maps [0, L] onto [-1, 1], or onto [0, 1] if it is not centred."""
        return Scaling(levels / 2, levels / 2) if centred else Scaling(0.0, float(levels))

    @staticmethod
    def of_data(train: Tensor) -> "Scaling":
        """Gives all values together mean 0 and standard deviation 1."""
        check_finite(train)
        values = train.double()
        width = float(values.std(correction=0))
        if width == 0:
            raise InputError(
                f"All training values are {float(values.flatten()[0])} and cannot be "
                "standardised; give standardise=False."
            )
        return Scaling(float(values.mean()), width)

    @property
    def scale(self) -> float:
        """Model units per raw unit; the raw unit of quantised data is one quantisation step."""
        return 1 / self.width

    def encode(self, y: Tensor) -> Tensor:
        """Raw to model units."""
        return (y - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Model to raw units."""
        return x * self.width + self.shift


@final
@dataclass(frozen=True)
class Units:
    """What one example is, in raw and in model units: all that samples need of their data set.

    Its fields are plain numbers, which a checkpoint keeps, so that samples can be drawn and read
    where the data is not at hand.

    Arguments:
        shape: The shape of one example.
        shift: The raw value that becomes 0 (see :class:`Scaling`); likewise ``width``.
        width: The raw length that becomes 1, positive.
        levels: The number of levels L of quantised data, or None for real-valued data.
        low: The raw value drawn as black; likewise ``high``.
        high: The raw value drawn as white, above ``low``.
    """

    shape: Sequence[int]
    shift: float = 0.0
    width: float = 1.0
    levels: int | None = None
    low: float = 0.0
    high: float = 1.0

    @property
    def scaling(self) -> Scaling:
        """The map to model units."""
        return Scaling(self.shift, self.width)

    @property
    def range(self) -> tuple[float, float]:
        """The range of the data in model units."""
        low, high = (self.low, self.high) if self.levels is None else (0, self.levels)
        return (low - self.shift) / self.width, (high - self.shift) / self.width

    def describe(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return {**asdict(self), "shape": list(self.shape)}

    def encode(self, raw: Tensor, uniform: Tensor | float = 0.5) -> Tensor:
        """Brings raw examples to model units.

        Arguments:
            raw: Raw examples, with shape ``(B, *)``.
            uniform: Where in its step each integer lies, in (0, 1), with shape ``(B, *)`` or
                ``()``: uniform numbers dequantise, 1/2 takes the centre. Real-valued data has
                no use for it.

        Returns:
            Examples in model units, float32, with shape ``(B, *)``.
        """
        if self.levels is None:
            return self.scaling.encode(raw.float())
        return self.scaling.encode(raw.float() + _inside(uniform, self.levels))

    def decode(self, x: Tensor) -> Tensor:
        """Brings model units back to raw ones.

        Arguments:
            x: Examples in model units, with shape ``(B, *)``.

        Returns:
            Raw examples, with shape ``(B, *)``: integers rounded down (the inverse of
            dequantisation) and kept in range, or real numbers in the data type of ``x``.

        Raises:
            InputError: If ``x`` has a NaN, which no integer stands for.
        """
        if self.levels is None:
            return self.scaling.decode(x)
        if x.isnan().any():
            raise InputError(
                f"{int(x.isnan().sum())} of {x.numel()} values are NaN and have no level; the "
                "model or the sampler has diverged."
            )
        levels = self.scaling.decode(x.double()).floor()
        return levels.clamp(0, self.levels - 1).to(integer_type(self.levels))

    def to_unit(self, x: Tensor) -> Tensor:
        """Brings model units to the range [0, 1] for drawing, float32, with the shape of ``x``.

        Black and white are the lowest and the highest level, or the smallest and the largest
        training value.
        """
        return ((self.decode(x).double() - self.low) / (self.high - self.low)).clamp(0, 1).float()


@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """Raw examples in three splits, and their way to model units and back.

    Arguments:
        name: What the data is called in results.
        train: Raw training examples, with shape ``(N, *)``: uint8 or int16 (quantised), or
            float32 (real-valued). Images are channels first.
        validation: Likewise, for choices.
        test: Likewise, for results.
        scaling: The map to model units.
        levels: The number of levels L of quantised data, 0 to L-1; None for real-valued data.
        flip: Whether training images are mirrored at random (left and right).
        log_prob: The exact log-density in nats and raw units, ``(N, *)`` to ``(N,)``, if known.
        dequantise: Whether training examples are dequantised by uniform noise; without it they
            lie at the centres of their levels. Validation and test always are.
        labels: The classes of the training, validation and test examples, if known: int64, each
            with shape ``(N,)``.

    Raises:
        InputError: If the splits or their labels do not agree, one is empty, a value is out of
            range, or there is no axis to flip.

    Example:
        >>> splits = [torch.tensor([[0, 1, 2]], dtype=torch.uint8)] * 3
        >>> dataset = Dataset.of("three levels", splits, levels=3)
        >>> dataset.encode(dataset.test)
        tensor([[-0.6667,  0.0000,  0.6667]])
        >>> dataset.decode(dataset.batch("train", Streams.of(seed=0, batch=1)))
        tensor([[0, 1, 2]], dtype=torch.uint8)
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    scaling: Scaling
    levels: int | None = None
    flip: bool = False
    log_prob: Callable[[Tensor], Tensor] | None = None
    dequantise: bool = True
    labels: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        for split in SPLITS:
            self._check(split)
        if self.labels is not None:
            self._check_labels(self.labels)
        if self.flip and len(self.shape) < 2:
            raise InputError(
                f"flip=True needs images, but an example has shape {self.shape}; give flip=False."
            )

    @staticmethod
    def of(
        name: str,
        splits: Sequence[Tensor],
        levels: int | None = None,
        flip: bool = False,
        standardise: bool = True,
        log_prob: Callable[[Tensor], Tensor] | None = None,
        centred: bool = True,
        dequantise: bool = True,
        labels: Sequence[Tensor] | None = None,
    ) -> "Dataset":
        """Builds a data set with the usual scaling.

        Arguments:
            name: As in the class; likewise ``levels``, ``flip``, ``log_prob``, ``dequantise``
                and ``labels``.
            splits: Training, validation and test examples.
            standardise: Whether real-valued data is standardised.
            centred: Whether quantised data fills [-1, 1], or else [0, 1].
        """
        train, validation, test = splits
        if levels is not None:
            scaling = Scaling.of_levels(levels, centred)
        else:
            scaling = Scaling.of_data(train) if standardise else Scaling()
        shared = (scaling, levels, flip, log_prob, dequantise, labels)
        return Dataset(name, train, validation, test, *shared)

    def _check(self, split: str) -> None:
        raw = self.split(split)
        if raw.ndim == 0 or raw.numel() == 0:
            raise InputError(
                f"The {split} split of {self.name} has shape {tuple(raw.shape)}, which holds no "
                "example; each split needs one."
            )
        if raw.shape[1:] != self.train.shape[1:] or raw.dtype != self.train.dtype:
            raise InputError(
                f"The {split} split of {self.name} has examples {tuple(raw.shape[1:])} of "
                f"{raw.dtype}, the train split {self.shape} of {self.train.dtype}; they must "
                "agree."
            )
        needed = torch.float32 if self.levels is None else integer_type(self.levels)
        if raw.dtype != needed:
            raise InputError(
                f"{self.name} has levels={self.levels} and type {raw.dtype}; it needs {needed} "
                "(quantised data is integer and has levels, real-valued data is float32)."
            )
        if self.levels is None:
            check_finite(raw)
        elif self.levels != 256 and (raw.min() < 0 or raw.max() >= self.levels):
            check_range(raw.cpu().numpy(), self.levels)

    def _check_labels(self, labels: Sequence[Tensor]) -> None:
        wanted = [(len(self.split(name)),) for name in SPLITS]
        shapes, types = [tuple(part.shape) for part in labels], {part.dtype for part in labels}
        if shapes != wanted or types != {torch.int64}:
            raise InputError(
                f"The labels of {self.name} have the shapes {shapes} and types {types}; give one "
                f"for each example, {wanted}, in int64."
            )

    def split(self, name: str) -> Tensor:
        """Returns the raw examples of ``train``, ``validation`` or ``test``."""
        if name not in SPLITS:
            raise InputError(f"split={name!r} is unknown; give one of {', '.join(SPLITS)}.")
        return getattr(self, name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.train.shape[1:])

    @property
    def scale(self) -> float:
        """Model units per raw unit; for quantised data, per quantisation step (2/L if centred)."""
        return self.scaling.scale

    @cached_property
    def units(self) -> Units:
        """What the samples of a model of this data are, without the data."""
        if self.levels is not None:
            low, high = 0.0, self.levels - 1.0
        else:
            low, high = float(self.train.min()), float(self.train.max())
        shift, width = self.scaling.shift, self.scaling.width
        return Units(self.shape, shift, width, self.levels, low, high if high > low else low + 1)

    @cached_property
    def sigma_data(self) -> float:
        """The root mean square of the training data in model units."""
        if self.levels is None:
            return float(self.encode(self.train).double().square().mean().sqrt())
        counts = torch.bincount(self.train.flatten(), minlength=self.levels).double()
        squares = self.encode(torch.arange(self.levels, device=counts.device)).double().square()
        return math.sqrt(float(counts @ squares) / self.train.numel())

    def encode(self, raw: Tensor, uniform: Tensor | float = 0.5) -> Tensor:
        """Brings raw examples to model units, as :meth:`Units.encode` does."""
        return self.units.encode(raw, uniform)

    def decode(self, x: Tensor) -> Tensor:
        """Brings model units back to raw ones, as :meth:`Units.decode` does."""
        return self.units.decode(x)

    def to_unit(self, x: Tensor) -> Tensor:
        """Brings model units to [0, 1] for drawing, as :meth:`Units.to_unit` does."""
        return self.units.to_unit(x)

    def batch(self, split: str, streams: Streams, draw: int = 0) -> Tensor:
        """Returns examples in model units: dequantised, and in training perhaps flipped.

        Example :math:`i` has its own random stream, so that it comes out the same in any batch,
        and afresh with every ``draw``: give the number of the epoch.

        Arguments:
            split: ``train``, ``validation`` or ``test``; the first alone is flipped, and may
                stay at the centres of its levels.
            streams: The seed, and which examples (its indices).
            draw: Which dequantisation and flip, in :math:`[0, 2^{32})`.

        Returns:
            Examples, float32, with shape ``(B, *)``, on the device of the data.
        """
        raw = self.split(split)
        # A program that feeds a GPU need not wait for it; the way back is not safe without.
        indices = streams.indices.to(raw.device, non_blocking=raw.is_cuda)
        streams = Streams(streams.seed, indices)
        x = raw[streams.indices]
        if self.levels is None or (split == "train" and not self.dequantise):
            x = self.encode(x)
        else:
            x = self.encode(x, streams.uniform(self.shape, Purpose.DEQUANTISE, draw))
        return _flip(x, streams, draw) if self.flip and split == "train" else x

    def to(self, device: torch.device | str) -> "Dataset":
        """Moves all examples to a device."""
        train, validation, test = (self.split(name).to(device) for name in SPLITS)
        labels = None if self.labels is None else tuple(part.to(device) for part in self.labels)
        return replace(self, train=train, validation=validation, test=test, labels=labels)


def _inside(uniform: Tensor | float, levels: int) -> Tensor:
    """Keeps numbers in (0, 1) so far from its ends that float32 never rounds y + u to y + 1."""
    edge = levels * 2.0**-22
    return torch.as_tensor(uniform, dtype=torch.float32).clamp(edge, 1 - edge)


def _flip(x: Tensor, streams: Streams, draw: int) -> Tensor:
    """Mirrors each example with probability 1/2."""
    sign = streams.sign((1,) * (x.ndim - 1), Purpose.FLIP, draw)
    return torch.where(sign > 0, x, x.flip(-1))
