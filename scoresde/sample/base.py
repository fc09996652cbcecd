"""Base classes for samplers.

A sampler is a frozen dataclass of settings. Calling it with a score function draws samples. It
stores no model, so one instance works with any number of models. The base classes provide the
initial noise, random streams, step loop and count of network evaluations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Conditioned, Model, ScoreFunction, check_model, evaluating
from scoresde.passes import counting
from scoresde.progress import Progress
from scoresde.recipe import renamed
from scoresde.sde import SDE
from scoresde.shapes import check_data
from scoresde.solvers import BrownianPath
from scoresde.streams import Purpose, Streams
from scoresde.times import Grid, UniformGrid

# constraint(x, t, noise) -> x
Constraint = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]

__getattr__ = renamed(__name__)


@dataclass(frozen=True)
class Samples:
    """Output of a sampler.

    Arguments:
        x: Samples, with shape ``(B, *)``.
        nfe: Number of network evaluations for each sample, int64 ``(B,)``.
        seed: Seed of the random streams.
        log_prob: Log-density of the samples in model units, in nats, ``(B,)``, if the sampler
            computes it.
        standard_error: Standard error of ``log_prob`` over the probes, ``(B,)``.
        vjps: Number of products with a transposed Jacobian for each sample, int64 ``(B,)``; each
            costs a backward pass.
    """

    x: Tensor
    nfe: Tensor
    seed: int
    log_prob: Tensor | None = None
    standard_error: Tensor | None = None
    vjps: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """State of the solver that a callback receives after a step.

    Arguments:
        i: Number of steps done.
        n: Total number of steps, or None for an adaptive solver.
        t: Current time, float64 ``()``, or ``(B,)`` if each sample has its own.
        x: Current state, with shape ``(B, *)``; not a copy.
    """

    i: int
    n: int | None
    t: Tensor
    x: Tensor


@dataclass(frozen=True)
class Noise:
    """Noise of a sampling run, with a separate stream for each sample.

    Arguments:
        streams: Random streams, one for each sample.
        temperature: Factor of all noise.
        path: Brownian motion of the reverse process in 1 - t. If None, every step draws new noise.
    """

    streams: Streams
    temperature: float = 1.0
    path: BrownianPath | None = None

    def __call__(self, x: Tensor, purpose: Purpose, draw: int) -> Tensor:
        """Returns new normal noise for states ``(B, *)``."""
        return self.temperature * self.streams.normal(x.shape[1:], purpose, draw, x.dtype)

    def diffusion(self, x: Tensor, draw: int, t: Tensor, s: Tensor) -> Tensor:
        """Returns the normal noise of the reverse process from ``t`` to the earlier ``s``."""
        if self.path is None:
            return self(x, Purpose.DIFFUSION, draw)
        scale = self.temperature / math.sqrt(float(t - s))
        return scale * self.path.increment(1 - t, 1 - s).reshape(x.shape)


class ProgressReporter:
    """Ends steps: applies the constraint, then reports to a callback and a progress bar.

    Arguments:
        callback: Called with a :class:`Step` after every step.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).
        constraint: The sampler's constraint (see :class:`Sampler`).
        streams: Random streams of the constraint's noise.
    """

    def __init__(
        self,
        callback: Callable[[Step], object] | None = None,
        progress: bool = False,
        constraint: "Constraint | None" = None,
        streams: Streams | None = None,
    ) -> None:
        self.callback = callback
        self.progress = progress
        self.constraint = constraint
        self.streams = streams
        self.i = 0
        self.bar: Progress | None = None

    def __call__(self, t: Tensor, x: Tensor, n: int | None = None) -> Tensor:
        """Ends a step at time ``t`` and returns the constrained state."""
        x = self.constrain(t, x, self.i)
        self.tell(t, x, n)
        return x

    def constrain(self, t: Tensor, x: Tensor, draw: int) -> Tensor:
        """Returns the constrained state; ``draw`` is the number of its noise."""
        if self.constraint is None:
            return x

        def noise(like: Tensor) -> Tensor:
            assert self.streams is not None
            return self.streams.normal(like.shape[1:], Purpose.CONSTRAINT, draw, like.dtype)

        y = self.constraint(x, t, noise)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise InputError(
                f"constraint must return a state of shape {tuple(x.shape)}, got "
                f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}."
            )
        return y.to(x)

    def again(self, t: Tensor, x: Tensor) -> Tensor:
        """Constrains the state of the last step once more, with the same noise."""
        return self.constrain(t, x, max(self.i - 1, 0))

    @property
    def watched(self) -> bool:
        """True if a callback or a progress bar receives the steps."""
        return self.progress or self.callback is not None

    def tell(self, t: Tensor, x: Tensor, n: int | None = None) -> None:
        """Counts and reports one step that ended at time ``t``."""
        self.i += 1
        if self.progress:
            if self.bar is None:
                self.bar = Progress(n, "sampling", "step")
            self.bar.update()
        if self.callback is not None:
            self.callback(Step(self.i, n, t, x))

    def close(self) -> None:
        """Removes the progress bar."""
        if self.bar is not None:
            self.bar.close()


@dataclass(frozen=True)
class FinalState:
    """State at the final time; fields as in :class:`Samples`."""

    x: Tensor
    log_prob: Tensor | None = None
    standard_error: Tensor | None = None


@dataclass(frozen=True)
class Sampler(ABC):
    """Base class for samplers.

    Arguments:
        eps: Time to stop at, in [0, 1). If None, the default of the model's process
            (``cutoffs.sampling``: 1e-3 for VP and sub-VP, 1e-5 for VE).
        final_denoise: Whether to return the denoised estimate at ``eps`` instead of the state, for
            one more network evaluation.
        temperature: Factor of the initial noise and of all noise added later, positive: 1 samples
            the model, smaller values favour its likely samples.
        constraint: ``constraint(x, t, noise)`` returns replacements for states ``(B, *)`` after
            every step, such as states with the known pixels restored. ``t`` is the current time,
            float64 ``()`` or ``(B,)``, and 0 after the final denoising. ``noise(x)`` returns new
            standard normal noise from each sample's stream. If None, the states are kept.
    """

    # Required type of the model: a score function, or any model for samplers that need less.
    kind: ClassVar[type] = ScoreFunction

    eps: float | None = field(default=None, kw_only=True)
    final_denoise: bool = field(default=False, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    constraint: Constraint | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature must be positive and finite, got {self.temperature}; use 1 to "
                "sample the model itself."
            )
        if self.constraint is not None and not callable(self.constraint):
            raise InputError(
                "constraint must be a callable (x, t, noise) -> x, or None, got "
                f"{self.constraint}."
            )

    @property
    def convergence(self) -> int | None:
        """Order of convergence in the step size (weak if noise is added), or None if unknown."""
        return None

    @abstractmethod
    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        """Integrates states from time 1 to time ``eps``."""

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        latent: Tensor | None = None,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        callback: Callable[[Step], object] | None = None,
        progress: bool = False,
        **cond: Tensor,
    ) -> Samples:
        """Draws samples.

        Sample ``i`` depends only on ``seed`` and ``seeds[i]``, not on the rest of the batch.

        Arguments:
            model: A model; most samplers need a score function.
            shape: Shape ``(B, *)`` of the samples.
            latent: States at time 1 to start from, with shape ``(B, *)``, instead of ``shape``.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: Index of each sample's stream; ``range(B)`` by default.
            callback: Called with a :class:`Step` after every step.
            progress: Whether to show the progress (see :mod:`scoresde.progress`).
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments are inconsistent with each other, the sampler or the
                model.
        """
        eps = self.check(model)
        if (shape is None) == (latent is None):
            raise InputError(
                "A sampler requires either shape=(B, ...) or latent=, got "
                f"{'neither' if shape is None else 'both'}."
            )
        streams = Streams.of(seed, seeds, _batch(shape, latent), model.device)
        if latent is None:
            assert shape is not None
            start = self._start(model, shape, streams, cond)
        else:
            check_data(latent)
            start = model.state(latent)
        report = ProgressReporter(callback, progress, self.constraint, streams)
        with counting(len(start), model.device) as passes, evaluating(model, frozen=True):
            try:
                noise = Noise(streams, self.temperature)
                field = Conditioned(cast(ScoreFunction, model), cond)
                end = self._run(field, start, eps, noise, report)
                x = end.x
                if self.final_denoise:
                    x = model.denoise(x, torch.tensor(eps, dtype=torch.float64), **cond)
                    x = report.constrain(torch.zeros((), dtype=torch.float64), x, report.i)
            finally:
                report.close()
        x = x if latent is None else x.to(latent.dtype)
        return Samples(
            x=x,
            nfe=passes.network,
            seed=streams.seed,
            log_prob=end.log_prob,
            standard_error=end.standard_error,
            vjps=passes.products,
        )

    def latent(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Returns the initial states, at time 1; arguments as for sampling."""
        self.check(model)
        streams = Streams.of(seed, seeds, _batch(shape, None), model.device)
        return self._start(model, shape, streams, cond)

    def _start(
        self, model: Model, shape: Sequence[int], streams: Streams, cond: dict[str, Tensor]
    ) -> Tensor:
        dtype = model.state(torch.empty(0)).dtype
        noise = streams.normal(tuple(shape)[1:], Purpose.LATENT, dtype=dtype)
        return model.process.start(noise, self.temperature, **cond)

    def check(self, model: Model) -> float:
        """Returns the cut-off time for a model.

        Raises:
            InputError: If this sampler does not support the model.
        """
        check_model(model, self.kind)
        process = model.process
        eps = process.cutoffs.sampling if self.eps is None else self.eps
        return self._check_process(process, process.check_eps(eps))

    def _check_process(self, process: Any, eps: float) -> float:
        """Returns the cut-off time; raises for a process that this sampler cannot reverse."""
        return eps


@dataclass(frozen=True)
class GridSampler(Sampler):
    """Base class for samplers with a fixed time grid; subclasses implement :meth:`integrate`.

    Arguments:
        steps: Number of steps, positive.
        grid: Spacing of the times.
        along_path: If True, one Brownian path per sample supplies the noise for any number of
            steps. If False, each step draws new noise.
    """

    steps: int = 1000
    grid: Grid = field(default_factory=UniformGrid)
    along_path: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if not isinstance(self.grid, Grid):
            raise InputError(f"grid must be a Grid such as UniformGrid(), got {self.grid}.")

    @abstractmethod
    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        """Integrates states along decreasing times, float64 ``(n + 1,)``."""

    def _check_process(self, process: SDE, eps: float) -> float:
        return float(self.times(process, eps)[-1])

    def times(self, sde: SDE, eps: float) -> Tensor:
        """Returns the grid, float64 ``(steps + 1,)``, from 1 to ``eps``.

        Raises:
            InputError: If the SNR does not increase from each time to the next.
        """
        times = self.grid(self.steps, sde, eps)
        if not bool((sde.log_snr(times).diff() > 0).all()):
            raise InputError(
                f"{type(self).__name__} requires a signal-to-noise ratio that increases along the "
                f"grid from t = 1 to {eps}, got {sde} with steps={self.steps}; use fewer steps, "
                "or an SDE whose alpha / sigma decreases with t."
            )
        return times

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        if self.along_path:
            noise = replace(noise, path=BrownianPath(noise.streams, x[0].numel(), x.dtype))
        return FinalState(self.integrate(field, x, self.times(field.sde, eps), noise, report))


def _batch(shape: Sequence[int] | None, latent: Tensor | None) -> int:
    name = "shape" if latent is None else "latent.shape"
    shape = tuple(latent.shape if latent is not None else shape or ())
    if len(shape) < 2 or min(shape) < 1:
        raise InputError(f"{name} must have two or more positive sizes (B, ...), got {shape}.")
    return shape[0]
