"""Data sets: raw examples in three splits, and the codec between raw and model units.

:mod:`scoresde.codec` describes the conversion and its effect on a log-density. By default, a data
set uses one scale for the levels of integers. For real numbers, each column of a table and each
channel of an image is standardised by its mean and standard deviation over the training examples.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Affine, Codec, LatentCodec, NeuralCodec, PerChannel, Standardisation
from scoresde.codec.scaling import Scaling
from scoresde.codec.standardise import as_it_is
from scoresde.data.checks import check_finite, check_range, integer_type
from scoresde.data.conditions import check_condition, check_name
from scoresde.data.degradation import SOURCE, Degradation
from scoresde.data.examples import DatasetExamples, Examples, as_examples, paired
from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams, random_rows

SPLITS = ("train", "validation", "test")

Kind = TypeVar("Kind")

_KEPT = 2**26  # numbers in the kept latent moments of a split, at most
_MEASURED = 10_000  # examples used to measure the size in model units


def _takes_scaling(kind: type[Kind]) -> type[Kind]:
    """Makes a data set accept ``scaling`` and ``levels`` in place of a codec, with a warning."""
    original: Any = kind.__init__

    @functools.wraps(original)
    def init(
        self: Any,
        name: str,
        train: Tensor,
        *values: Any,
        scaling: Any = None,
        levels: int | None = None,
        **named: Any,
    ) -> None:
        if scaling is not None:
            text = "Dataset(scaling=, levels=) will be removed; use Dataset(codec=)."
            warnings.warn(text, FutureWarning, stacklevel=2)
            named["codec"] = _affine(train, scaling, levels)
        original(self, name, train, *values, **named)

    kind.__init__ = init  # type: ignore[assignment, method-assign]
    return kind


def _affine(train: Tensor, scaling: Scaling, levels: int | None) -> Affine:
    if levels is None:
        return replace(as_it_is(train), shift=scaling.shift, width=scaling.width)
    one = Affine.of_levels(train.shape[1:], levels)
    return replace(one, shift=scaling.shift, width=scaling.width)


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """Examples in model units, with their conditions.

    Arguments:
        x: Examples, float32 ``(B, *)``.
        cond: Conditions by name, each with shape ``(B, *)``.
    """

    x: Tensor
    cond: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Batch":
        """Moves the examples and their conditions to a device."""
        return Batch(self.x.to(device), {name: c.to(device) for name, c in self.cond.items()})


@_takes_scaling
@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """Raw examples in three splits, and the codec between raw and model units.

    A split may be larger than memory: see :class:`~scoresde.data.Examples`.

    Arguments:
        name: Name of the data in results.
        train: Raw training examples, with shape ``(N, *)``: uint8 or int16 (quantised), or float32
            or float64 (real-valued). Images are channels first. Also a map-style torch data set of
            such examples.
        validation: Likewise, for model selection.
        test: Likewise, for final results.
        codec: Map to model units and back.
        flip: Whether training images are mirrored at random (left-right), together with conditions
            that are images of the same size.
        log_prob: Exact log-density in nats and raw units, ``(N, *)`` to ``(N,)``, if known.
        dequantise: Whether training examples are dequantised by uniform noise; if not, they lie at
            the centres of their levels. Validation and test examples always are.
        conditions: Conditions by name: for each, tensors ``(N, *)`` for the training, the
            validation and the test examples. Classes are called ``label``: int64 ``(N,)``, -1 for
            none; other conditions are floats.
        undivided: Whether all splits are the same: data to evaluate, not to train on.
        class_names: Names of the classes 0, 1, ..., if any.
        conditional_log_prob: Exact log-density as ``log_prob``, given the conditions by name, if
            known.
        degradation: Degradation that computes the condition ``source`` of each example as it is
            read; see :func:`~scoresde.data.pairs`.

    Raises:
        InputError: If the splits or their conditions are inconsistent, one is empty, a value is
            out of range, or there is no axis to flip.

    Example:
        >>> splits = [torch.tensor([[0, 1, 2]], dtype=torch.uint8)] * 3
        >>> dataset = Dataset.of("three levels", splits, levels=3)
        >>> dataset.encode(dataset.test, centre=True)
        tensor([[-0.6667,  0.0000,  0.6667]])
        >>> dataset.decode(dataset.batch("train", Streams.of(seed=0, batch=1)).x)
        tensor([[0, 1, 2]], dtype=torch.uint8)
    """

    name: str
    train: Tensor | Examples
    validation: Tensor | Examples
    test: Tensor | Examples
    codec: Codec
    flip: bool = False
    log_prob: Callable[[Tensor], Tensor] | None = None
    dequantise: bool = True
    conditions: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    undivided: bool = False
    class_names: Sequence[str] = ()
    conditional_log_prob: Callable[..., Tensor] | None = None
    degradation: Degradation | None = None

    def __post_init__(self) -> None:
        for split in SPLITS:
            object.__setattr__(self, split, as_examples(getattr(self, split)))
        for split in SPLITS:
            self._check(split)
        for split in SPLITS:
            kept = getattr(self, split)
            for name in kept.names if isinstance(kept, Examples) else ():
                check_name(name)
        if not isinstance(self.conditions, Mapping):
            raise InputError(
                "conditions must map names to the tensors of the splits, got "
                f"{type(self.conditions).__name__}; pass {{'context': [train, validation, "
                "test]}."
            )
        if self.degradation is not None and SOURCE in self.conditions:
            raise InputError(
                f"The condition source of {self.name} and a degradation cannot be combined: both "
                "provide the source; remove one of them."
            )
        sizes = [len(self.split(split)) for split in SPLITS]
        for name, parts in self.conditions.items():
            check_condition(self.name, name, parts, sizes)
        if tuple(self.codec.raw_shape) != self.raw_shape:
            raise InputError(
                f"The codec of {self.name} must be for examples of shape {self.raw_shape}, got "
                f"{tuple(self.codec.raw_shape)}."
            )
        if self.flip and len(self.raw_shape) < 2:
            raise InputError(
                f"flip=True requires examples with two or more axes, got {self.raw_shape}; set "
                "flip=False."
            )

    @staticmethod
    def of(
        name: str,
        splits: Sequence[Tensor | Examples | Any],
        levels: int | None = None,
        flip: bool = False,
        standardise: bool | Standardisation = True,
        log_prob: Callable[[Tensor], Tensor] | None = None,
        centred: bool = True,
        dequantise: bool = True,
        labels: Sequence[Tensor] | None = None,
        conditions: Mapping[str, Sequence[Tensor]] | None = None,
        class_names: Sequence[str] = (),
    ) -> "Dataset":
        """Builds a data set with the default codec.

        Arguments:
            name: As in the class; likewise ``flip``, ``log_prob``, ``dequantise``, ``conditions``
                and ``class_names``.
            splits: Training, validation and test examples.
            levels: Number of levels L of quantised data, 0 to L-1; None for real-valued data.
            standardise: Whether real-valued data is standardised by columns or channels, or a
                standardisation such as ``Whole()``, with one scale for all values.
            centred: Whether quantised data fills [-1, 1] rather than [0, 1].
            labels: The condition ``label``.
        """
        if isinstance(splits, Tensor | np.ndarray) or len(splits) != 3:
            found = "one array" if isinstance(splits, Tensor | np.ndarray) else f"{len(splits)}"
            raise InputError(
                f"splits must be training, validation and test examples, got {found}; use "
                "make_splits(x) for a tensor x."
            )
        train, validation, test = map(as_examples, splits)
        if levels is not None:
            codec = Affine.of_levels(train.shape[1:], levels, centred)
        else:
            codec = _real(train, standardise)
        known = {} if conditions is None else conditions
        known = known if labels is None else {**known, "label": labels}
        return Dataset(
            name,
            train,
            validation,
            test,
            codec,
            flip,
            log_prob,
            dequantise,
            known,
            class_names=tuple(class_names),
        )

    def _check(self, split: str) -> None:
        raw = self.split(split)
        if raw.ndim == 0 or raw.numel() == 0:
            raise InputError(
                f"The {split} split of {self.name} must have a non-empty shape (N, *), got "
                f"{tuple(raw.shape)}."
            )
        if raw.shape[1:] != self.train.shape[1:] or raw.dtype != self.train.dtype:
            raise InputError(
                f"The {split} split of {self.name} must have examples {self.raw_shape} of "
                f"{self.train.dtype} like the train split, got {tuple(raw.shape[1:])} of "
                f"{raw.dtype}."
            )
        real = (torch.float32, torch.float64)
        needed = real if self.levels is None else (integer_type(self.levels),)
        if raw.dtype not in needed:
            raise InputError(
                f"{self.name} must have type {' or '.join(map(str, needed))} for "
                f"levels={self.levels}, got {raw.dtype}; convert it with x.to({needed[0]}), or "
                "pass levels for integers and None for real-valued data."
            )
        if isinstance(raw, Examples):  # checked when an array is mapped or items are read
            return
        if self.levels is None:
            check_finite(raw)
        elif self.levels != 256 and (raw.min() < 0 or raw.max() >= self.levels):
            check_range(raw.cpu().numpy(), self.levels)

    def split(self, name: str) -> Tensor | Examples:
        """Returns the raw examples of ``train``, ``validation`` or ``test``."""
        if name not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {name!r}.")
        return getattr(self, name)

    def conditions_of(self, split: str, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """Returns the conditions of some or all examples of a split, by name."""
        raw = self.split(split)
        told = raw.conditions(rows) if isinstance(raw, Examples) else {}
        found = {**told, **self._listed(split, rows)}
        if self.degradation is None:
            return found
        values, indices = raw[rows], torch.arange(len(raw))[_on_host(rows)]
        streams = Streams(0, indices.to(values.device))
        return {**found, SOURCE: self.degradation(values, self.codec, streams)}

    def _listed(self, split: str, rows: Tensor | slice) -> dict[str, Tensor]:
        own = {name: parts[SPLITS.index(split)] for name, parts in self.conditions.items()}
        return {name: values[_on(rows, values)] for name, values in own.items()}

    @property
    def labels(self) -> Sequence[Tensor] | None:
        """Classes of the training, validation and test examples, if known."""
        return self.conditions.get("label")

    def renamed(self, names: Sequence[str]) -> "Dataset":
        """Returns the data set with its classes renumbered in the order of a list of names.

        Arguments:
            names: Names of the classes 0, 1, ..., such as those of the training data.

        Raises:
            InputError: If the name of a class is not in the list.
        """
        own = self.class_names
        if self.labels is None or not own or not names or list(own) == list(names):
            return self
        unknown = sorted({*own} - {*names})
        if unknown:
            raise InputError(
                f"The classes of {self.name} must be among {', '.join(names)}, got {unknown[0]}; "
                "rename it, or remove its examples."
            )
        numbers = torch.tensor([*(list(names).index(name) for name in own), -1])
        labels = [numbers.to(part.device)[part] for part in self.labels]  # -1 is the last
        known = {**self.conditions, "label": labels}
        return replace(self, conditions=known, class_names=tuple(names))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example in model units."""
        return tuple(self.codec.shape)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of one raw example."""
        return tuple(self.train.shape[1:])

    @property
    def levels(self) -> int | None:
        """The number of levels L of quantised data, 0 to L-1; None for real-valued data."""
        return self.codec.levels

    @property
    def scale(self) -> float:
        """Model units per raw unit; for quantised data, per quantisation step (2/L if centred).

        Raises:
            InputError: If the codec has more than one scale.
        """
        if self.codec.scale is None:
            raise InputError(
                f"The codec of {self.name} must have a single scale, got "
                f"{type(self.codec).__name__} without one; pass log_det=data.log_det(raw, x) "
                "instead of scale=data.scale."
            )
        return self.codec.scale

    @property
    def scaling(self) -> Scaling | Codec:
        """Map to model units as stored with results on disk: one scale, or a codec."""
        one = isinstance(self.codec, Affine) and self.codec.scale is not None
        return self.codec.one_map() if one else self.codec  # type: ignore[attr-defined]

    @property
    def units(self) -> Codec:
        """The codec, under its old name."""
        warnings.warn(
            "Dataset.units is deprecated; use Dataset.codec.", FutureWarning, stacklevel=2
        )
        return self.codec

    def with_codec(self, codec: Codec) -> "Dataset":
        """Returns the data set with another codec.

        An autoencoder becomes a codec of its latents, applied after the codec of this data set,
        whose units must be those of the autoencoder's training. The shift and scale of the latents
        are measured over at most 10,000 training examples.

        Arguments:
            codec: New codec, or an autoencoder such as a trained ``VAE``.
        """
        if not isinstance(codec, NeuralCodec):
            return replace(self, codec=codec)
        rows = random_rows(len(self.train), _MEASURED).to(self.train.device)
        return replace(self, codec=LatentCodec.measured(self.codec, codec, self.train[rows]))

    @cached_property
    def sigma_data(self) -> float:
        """The root mean square of the training data in model units."""
        train = self.train
        if self.codec.scale is None or (self.levels is None and isinstance(train, Examples)):
            raw = train[random_rows(len(train), _MEASURED).to(train.device)]
            x = self.encode(raw, centre=not self.codec.stochastic)
            return float(x.double().square().mean().sqrt())
        if self.levels is None:
            return float(self.codec.encode(train[:]).double().square().mean().sqrt())
        parts = train.chunks() if isinstance(train, Examples) else [train]
        counts = sum(torch.bincount(part.flatten(), minlength=self.levels) for part in parts)
        counts = torch.as_tensor(counts).double()
        levels = torch.arange(self.levels, device=counts.device)
        squares = self.codec.encode(levels).double().square()
        return math.sqrt(float(counts @ squares) / self.train.numel())

    def encode(
        self,
        raw: Tensor,
        streams: Streams | None = None,
        draw: int = 0,
        *,
        centre: bool = False,
    ) -> Tensor:
        """Converts raw examples to model units; integers are dequantised.

        A likelihood requires dequantisation: the density of a model at the centres of levels is
        not a probability of integers.

        Arguments:
            raw: Raw examples, with shape ``(B, *)``.
            streams: Random streams of the examples. If None, the streams of seed 0 and
                ``range(B)``.
            draw: Index of the independent encoding, in :math:`[0, 2^{32})`.
            centre: Whether integers lie at the centres of their levels instead.

        Returns:
            Examples in model units, float32, with shape ``(B, *)``.
        """
        if centre:
            return self.codec.encode(raw)
        if streams is None:
            streams = Streams.of(0, batch=len(raw), device=raw.device)
        return self.codec.encode(raw, streams, draw)

    def decode(self, x: Tensor, rounded: bool = True) -> Tensor:
        """Converts model units back to raw units, as :meth:`Codec.decode` does."""
        return self.codec.decode(x, rounded)

    def log_det(self, raw: Tensor, x: Tensor) -> Tensor | None:
        """Returns the term that encoding adds to a log-density, as :meth:`Codec.log_det` does."""
        return self.codec.log_det(raw, x)

    def to_unit(self, x: Tensor) -> Tensor:
        """Converts model units to [0, 1] for display, as :meth:`Codec.to_unit` does."""
        return self.codec.to_unit(x)

    def batch(self, split: str, streams: Streams, draw: int = 0, *, centre: bool = False) -> Batch:
        """Returns examples with their conditions: dequantised and, in training, randomly flipped.

        Example :math:`i` has its own random stream, so it is the same in any batch, and is redrawn
        with every ``draw``: pass the number of the epoch.

        Arguments:
            split: ``train``, ``validation`` or ``test``. Only ``train`` is flipped, or may stay at
                the centres of its levels.
            streams: Seed and indices of the examples.
            draw: Index of the dequantisation and flip, in :math:`[0, 2^{32})`.
            centre: Whether integers lie at the centres of their levels instead.

        Returns:
            The batch, on the device of the data.
        """
        raw, rows = self.split(split), streams.indices
        if isinstance(raw, Examples):
            read, told = raw.read(rows.cpu())
            there = {name: raw.moved(values) for name, values in told.items()}
            return self._batch(raw.moved(read), there, split, streams, draw, centre)
        return self._batch(raw[_on(rows, raw)], {}, split, streams, draw, centre)

    def batches(
        self, split: str, orders: Iterator[tuple[int, Tensor]], seed: int
    ) -> Iterator[tuple[int, Streams, Batch]]:
        """Yields the batches of many orders, read ahead if the data set has workers.

        Arguments:
            split: As in :meth:`batch`.
            orders: Draw and rows, int64 ``(B,)``, of each batch.
            seed: Seed of the streams.

        Returns:
            The draw, the streams and the batch, as :meth:`batch` returns it.
        """
        for draw, rows, raw, told in paired(self.split(split), orders):
            streams = Streams(seed, rows)
            yield draw, streams, self._batch(raw, told, split, streams, draw)

    def _batch(
        self,
        raw: Tensor,
        told: dict[str, Tensor],
        split: str,
        streams: Streams,
        draw: int,
        centre: bool = False,
    ) -> Batch:
        """Returns the batch of raw examples that have been read."""
        if isinstance(self.split(split), DatasetExamples) and self.levels is not None:
            check_range(raw.cpu().numpy(), self.levels, 0)
        streams = Streams(streams.seed, _on(streams.indices, raw))
        cond = {**told, **self._listed(split, streams.indices)}
        if self.degradation is not None:
            cond[SOURCE] = self.degradation(raw, self.codec, streams, draw)
        if self.flip and split == "train":  # with image conditions
            ours = {name: c for name, c in cond.items() if c.shape[2:] == raw.shape[2:]}
            cond |= {name: _flip(c, streams, draw) for name, c in ours.items()}
        return Batch(self._encoded(raw, split, streams, draw, centre), cond)

    def _encoded(self, x: Tensor, split: str, streams: Streams, draw: int, centre: bool) -> Tensor:
        mirrored = self.flip and split == "train"
        if mirrored and self.codec.scale is None:
            x, mirrored = _flip(x, streams, draw), False
        random = not centre and (self.dequantise or split != "train" or self.codec.stochastic)
        kept = None if self.flip and split == "train" else self._moments(split)
        if kept is not None:
            assert isinstance(self.codec, LatentCodec)
            return self.codec.draw(kept[streams.indices], streams if random else None, draw)
        x = self.codec.encode(x, streams if random else None, draw)
        # With a single scale the order does not matter; this one keeps the results of seeds.
        return _flip(x, streams, draw) if mirrored else x

    def _moments(self, split: str) -> Tensor | None:
        """Returns the moments of a split's latents, computed once, if memory allows.

        Test examples are read only once, and maybe not all of them, so they have none.
        """
        raw, codec = self.split(split), self.codec
        if split == "test" or not isinstance(codec, LatentCodec) or not isinstance(raw, Tensor):
            return None
        if split not in self._kept:
            small = 2 * len(raw) * math.prod(codec.shape) <= _KEPT
            self._kept[split] = codec.moments(raw) if small else None
        return self._kept[split]

    @cached_property
    def _kept(self) -> dict[str, Tensor | None]:
        return {}

    def to(self, device: torch.device | str) -> "Dataset":
        """Moves all examples to a device; examples read on demand are moved when read."""
        train, validation, test = (self.split(name).to(device) for name in SPLITS)
        known = {k: [part.to(device) for part in parts] for k, parts in self.conditions.items()}
        moved = replace(self, train=train, validation=validation, test=test, conditions=known)
        return replace(moved, codec=self.codec.placed(device))


def _on(rows: Any, values: Tensor) -> Any:
    """Returns rows on the device of the values that they index.

    The copy to a GPU does not block the host. The copy from a GPU must, to be safe.
    """
    return (
        rows.to(values.device, non_blocking=values.is_cuda) if isinstance(rows, Tensor) else rows
    )


def _on_host(rows: Any) -> Any:
    return rows.cpu() if isinstance(rows, Tensor) else rows


def _real(train: Tensor | Examples, standardise: bool | Standardisation) -> Affine:
    """Returns the codec of real-valued data."""
    if train.numel() == 0:  # empty data is rejected elsewhere
        return Affine(train.shape[1:])
    if standardise is False:
        return as_it_is(train)
    how = PerChannel() if standardise is True else standardise
    if not isinstance(how, Standardisation):
        raise InputError(
            f"standardise must be true, false or a Standardisation, got {how!r}; for one scale "
            "for all values, pass Whole() or set "
            f"data.standardise={{_target_:scoresde.codec.Whole}}."
        )
    if isinstance(train, Tensor):
        check_finite(train)
    return how(train)


def _flip(x: Tensor, streams: Streams, draw: int) -> Tensor:
    """Mirrors each example with probability 1/2."""
    sign = streams.sign((1,) * (x.ndim - 1), Purpose.FLIP, draw)
    return torch.where(sign > 0, x, x.flip(-1))
