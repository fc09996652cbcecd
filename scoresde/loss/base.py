"""Base class for losses, and the times and noise that they draw."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scoresde.codec import Decoder
from scoresde.errors import InputError
from scoresde.model import Trainable, check_model
from scoresde.sde import Interpolant, as_time
from scoresde.shapes import check_batch
from scoresde.streams import Purpose, Streams
from scoresde.times import Times


@dataclass(frozen=True)
class LossTerms:
    """Output of a loss.

    Arguments:
        value: The loss of each example, ``(B,)``.
        parts: Named terms of the loss, or values that describe it, each ``(B,)``, without a graph.
            The training loop records the mean of each. The names are the same in all parts of a
            batch.
        record: Values of each example that the loss itself stores (:meth:`Loss.keep`), ``(B, n)``,
            without a graph; None for a loss that stores nothing.
    """

    value: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    record: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """Times and noise for a batch.

    Arguments:
        t: The times, ``()`` or ``(B,)``.
        noise: Standard normal noise, with the shape of the batch.
        weight: Correction for the density of drawn times, ``(B,)``; 1 for given times.
    """

    t: Tensor
    noise: Tensor
    weight: Tensor | float


@dataclass(frozen=True, eq=False)
class BatchStreams:
    """The random streams of a batch, of which only a part may be evaluated.

    Arguments:
        seed: Seed of the streams. If None, a new one is drawn when they are used.
        seeds: The index of each example's stream. If None, ``range`` of the number of examples.
        part: The positions of the part's examples in ``seeds``; None for all.
        size: The number of examples in the part.
        device: The device of the random numbers.
    """

    seed: int | None
    seeds: Iterable[int] | None
    part: slice | None
    size: int
    device: torch.device

    @cached_property
    def whole(self) -> Streams:
        """The streams of the whole batch."""
        count = self.size if self.part is None else None
        return Streams.of(self.seed, self.seeds, count, self.device)

    @property
    def own(self) -> Streams:
        """The streams of the part."""
        return self.whole if self.part is None else self.whole[self.part]


@dataclass(frozen=True, eq=False)
class Given:
    """The times and the noise given to a loss, and the streams for those that it draws.

    Arguments:
        t: Times, with shape ``()`` or ``(B,)``. If None, they are drawn.
        noise: Standard normal noise, with shape ``(B, *)``. If None, it is drawn.
        batch: The streams.
    """

    t: Tensor | None
    noise: Tensor | None
    batch: BatchStreams

    @property
    def own(self) -> Streams:
        """The streams of the evaluated examples."""
        return self.batch.own

    def at(self, t: Tensor, noise: Tensor | None) -> "Given":
        """Returns a copy with other times and noise and the same streams."""
        return Given(t, noise, self.batch)

    def draw(self, process: Any, x: Tensor, times: Times, eps: float) -> Draw:
        """Draws the times and the noise that are not given.

        Arguments:
            process: The process.
            x: Clean data, with shape ``(B, *)``.
            times: The density of drawn times.
            eps: The smallest time.

        Raises:
            InputError: If a given time is outside [0, 1], or shapes disagree.
        """
        check_batch(x)
        t, noise = self.t, self.noise
        weight: Tensor | float = 1.0
        if t is None:
            with torch.no_grad():  # times are constants, even if a learned schedule draws them
                t, weight = self._times(process, times, eps)
        elif not bool(((as_time(t) >= 0) & (as_time(t) <= 1)).all()):
            low, high = float(as_time(t).min()), float(as_time(t).max())
            raise InputError(
                f"t must be in [0, 1], got {low:.4g} to {high:.4g}; it is not a step number."
            )
        if noise is None:
            noise = self.own.normal(x.shape[1:], Purpose.NOISE, dtype=x.dtype)
        if noise.shape != x.shape:
            raise InputError(
                f"noise must have the shape of the data, {tuple(x.shape)}, got "
                f"{tuple(noise.shape)}."
            )
        return Draw(as_time(t), noise, weight)

    def _times(self, process: Any, times: Times, eps: float) -> tuple[Tensor, Tensor]:
        """Draws times for the whole batch; returns those of the part, and their weights."""
        u = times.spread(self.batch.whole.uniform((), Purpose.TIME, dtype=torch.float64))
        t = times.quantile(u if self.batch.part is None else u[self.batch.part], process, eps)
        return t, times.weight(t, process, eps)


class Loss(ABC):
    """Base class for losses; subclasses implement :meth:`evaluate`.

    A loss stores only settings, no model and no data.

    **Losses that learn.** A loss with weights or buffers is a ``torch.nn.Module`` as well. Its
    weights are trained by the optimiser of the model and are not averaged. Its buffers change in
    :meth:`keep`. Both are saved in the checkpoints of a training run. After training, the model
    does not use the loss.

    Attributes:
        decoder: The last step to the data, if the loss evaluates it.
    """

    decoder: Decoder | None = None

    @abstractmethod
    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the loss of each example, and its named parts.

        Arguments:
            model: The model.
            x: Clean data in model units, with shape ``(B, *)``.
            given: The given times and noise, and the streams for those to be drawn.
            **cond: Conditions for the model, each with shape ``(B, *)``.
        """

    def terms(
        self,
        model: Trainable,
        x: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        part: slice | None = None,
        **cond: Tensor,
    ) -> LossTerms:
        """Returns the loss of each example, and its named parts.

        Arguments:
            model: The model.
            x: Clean data in model units, with shape ``(B, *)``.
            t: Times, with shape ``()`` or ``(B,)``. If None, they are drawn.
            noise: Standard normal noise, with shape ``(B, *)``. If None, it is drawn.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: The index of each example's stream; ``range(B)`` by default.
            part: The positions of the examples ``x`` in ``seeds``, if ``x`` is part of a larger
                batch whose times are drawn together.
            **cond: Conditions for the model, each with shape ``(B, *)``.
        """
        batch = BatchStreams(seed, seeds, part, len(x), x.device)
        return self.evaluate(model, x, Given(t, noise, batch), **cond)

    def __call__(
        self,
        model: Trainable,
        x: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        part: slice | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Returns the loss of each example, ``(B,)``; arguments as for :meth:`terms`."""
        return self.terms(
            model, x, t=t, noise=noise, seed=seed, seeds=seeds, part=part, **cond
        ).value

    def select(self, model: Trainable, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the conditions of a batch that the model or the loss takes."""
        return model.select(cond)

    def cautions(self, model: Trainable, given: Collection[str]) -> list[str]:
        """Returns one sentence for each limitation of a model trained with the loss.

        Arguments:
            model: The model.
            given: The names of the data's conditions.
        """
        return []

    def at(self, step: int) -> "Loss":
        """Returns the loss at an update, for losses that change during training.

        Arguments:
            step: The number of the update, counted from 0.
        """
        return self

    def keep(self, record: Tensor) -> None:
        """Stores the records of an update; does nothing by default.

        Several processes get the same record: that of all their examples, in order.

        Arguments:
            record: The records of :class:`LossTerms`, ``(B, n)``.
        """
        return

    def fixed(self) -> "Loss":
        """Returns the loss for evaluating held-out examples, without what it learns in training.

        By default it is the loss itself; a loss whose scale changes during training overrides it.
        """
        return self

    @property
    def on_levels(self) -> bool:
        """True if the loss evaluates the levels of integers, which must lie at their centres."""
        return self.decoder is not None and self.decoder.levels is not None

    def first_time(self, process: Interpolant) -> float:
        """Returns the smallest time at which the loss evaluates a model of ``process``."""
        return process.cutoffs.training

    def check(self, model: Trainable) -> None:
        """Checks that the loss can be computed for a model.

        Raises:
            InputError: If it cannot.
        """
        check_model(model, Trainable)
