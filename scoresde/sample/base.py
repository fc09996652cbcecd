"""What all samplers share: the start, the walk through time, the seeds, and the counting.

A sampler is a value, a frozen bundle of hyper-parameters. Applied to a score function it draws
samples; it holds no model, so that the same sampler serves any number of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from scoresde.errors import InputError, check_count
from scoresde.model import Evaluations, ScoreFunction, check_model, evaluating
from scoresde.recipe import renamed
from scoresde.sde import SDE
from scoresde.shapes import check_data
from scoresde.solvers import BrownianPath
from scoresde.streams import Purpose, Streams
from scoresde.times import Grid, UniformGrid

__getattr__ = renamed(__name__)


@dataclass(frozen=True)
class Samples:
    """What a sampler returns.

    Arguments:
        x: The samples, with shape ``(B, *)``.
        nfe: The network passes that each sample took part in, int64 ``(B,)``.
        seed: The seed that was used.
        log_prob: The log-density of the samples in nats of model units, ``(B,)``, where the
            sampler measures it.
        standard_error: That of ``log_prob`` over the probes, ``(B,)``.
    """

    x: Tensor
    nfe: Tensor
    seed: int
    log_prob: Tensor | None = None
    standard_error: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a callback is told after a step.

    Arguments:
        i: How many steps are done.
        n: How many there are, or ``None`` where an adaptive solver cannot know.
        t: The time reached, float64 ``()``, or ``(B,)`` where each sample has its own.
        x: The state there, with shape ``(B, *)``; not a copy.
    """

    i: int
    n: int | None
    t: Tensor
    x: Tensor


@dataclass(frozen=True)
class Noise:
    """The noise of a walk through time, of each sample its own.

    Arguments:
        streams: One random stream for each sample.
        temperature: The factor of all noise.
        path: The Brownian motion that the reverse process follows in 1 - t; ``None``: its noise is
            drawn anew for every step.
    """

    streams: Streams
    temperature: float = 1.0
    path: BrownianPath | None = None

    def __call__(self, x: Tensor, purpose: Purpose, draw: int) -> Tensor:
        """Returns fresh normal noise for states ``(B, *)``."""
        return self.temperature * self.streams.normal(x.shape[1:], purpose, draw, x.dtype)

    def diffusion(self, x: Tensor, draw: int, t: Tensor, s: Tensor) -> Tensor:
        """Returns the normal noise of the reverse process from ``t`` to the earlier ``s``."""
        if self.path is None:
            return self(x, Purpose.DIFFUSION, draw)
        scale = self.temperature / math.sqrt(float(t - s))
        return scale * self.path.increment(1 - t, 1 - s).reshape(x.shape)


class ProgressReporter:
    """Reports steps to a callback and to a progress bar."""

    def __init__(self, callback: Callable[[Step], object] | None, progress: bool) -> None:
        self.callback = callback
        self.progress = progress
        self.i = 0
        self.bar: tqdm | None = None

    def __call__(self, t: Tensor, x: Tensor, n: int | None = None) -> None:
        """Counts one step that reached time ``t``."""
        self.i += 1
        if self.progress:
            if self.bar is None:
                self.bar = tqdm(total=n, unit="step", desc="sampling", leave=False)
            self.bar.update()
        if self.callback is not None:
            self.callback(Step(self.i, n, t, x))

    def close(self) -> None:
        """Takes the progress bar away."""
        if self.bar is not None:
            self.bar.close()


@dataclass(frozen=True)
class FinalState:
    """What a walk through time ends with; the fields as in :class:`Samples`."""

    x: Tensor
    log_prob: Tensor | None = None
    standard_error: Tensor | None = None


@dataclass(frozen=True)
class Sampler(ABC):
    """Abstract sampler.

    Arguments:
        eps: The time to stop at, in [0, 1); ``None`` takes the default of the model's SDE
            (``sde.cutoffs.sampling``: 1e-3 for VP and sub-VP, 1e-5 for VE).
        final_denoise: Whether to return the expected data of the state at ``eps``, for one more
            network pass, instead of the state itself.
        temperature: The factor of the first noise and of all noise added on the way, positive:
            1 samples the model, less keeps to its likely samples.
    """

    eps: float | None = field(default=None, kw_only=True)
    final_denoise: bool = field(default=False, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature={self.temperature} is not positive; 1 samples the model as it is."
            )

    @abstractmethod
    def _run(
        self, field: Evaluations, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        """Brings states from time 1 to time ``eps``."""

    @torch.no_grad()
    def __call__(
        self,
        model: ScoreFunction,
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

        Sample ``i`` depends on ``seed`` and ``seeds[i]`` alone, whatever the rest of the batch.

        Arguments:
            model: A score function.
            shape: The shape ``(B, *)`` of the samples.
            latent: Or the states at time 1 to start from, with that shape.
            seed: Names the random streams; ``None`` draws a fresh one.
            seeds: The index of each sample's stream; ``range(B)`` by default.
            callback: Called with a :class:`Step` after every step.
            progress: Whether to show a progress bar.
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments do not fit each other, the sampler or the model.
        """
        eps = self.check(model)
        if (shape is None) == (latent is None):
            raise InputError("Give a sampler either shape=(B, ...) or latent=, and not both.")
        streams = Streams.of(seed, seeds, _batch(shape, latent), model.device)
        if latent is None:
            assert shape is not None
            start = self._start(model, shape, streams)
        else:
            check_data(latent)
            start = model.state(latent)
        report, field = ProgressReporter(callback, progress), Evaluations(model, cond)
        try:
            with evaluating(model, frozen=True):
                end = self._run(field, start, eps, Noise(streams, self.temperature), report)
                x = end.x
                if self.final_denoise:
                    x = field.denoise(x, torch.tensor(eps, dtype=torch.float64))
        finally:
            report.close()
        x = x if latent is None else x.to(latent.dtype)
        return Samples(x, field.nfe(x), streams.seed, end.log_prob, end.standard_error)

    def latent(
        self,
        model: ScoreFunction,
        shape: Sequence[int],
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
    ) -> Tensor:
        """Returns the states at time 1 that samples start from; arguments as for sampling."""
        self.check(model)
        return self._start(
            model, shape, Streams.of(seed, seeds, _batch(shape, None), model.device)
        )

    def _start(self, model: ScoreFunction, shape: Sequence[int], streams: Streams) -> Tensor:
        dtype = model.state(torch.empty(0)).dtype
        start = streams.normal(tuple(shape)[1:], Purpose.LATENT, dtype=dtype)
        return self.temperature * model.sde.prior_std * start

    def check(self, model: ScoreFunction) -> float:
        """Returns the cut-off for a model.

        Raises:
            InputError: If this sampler cannot serve the model.
        """
        check_model(model)
        eps = model.sde.cutoffs.sampling if self.eps is None else self.eps
        return self._check_sde(model.sde, model.sde.check_eps(eps))

    def _check_sde(self, sde: SDE, eps: float) -> float:
        """Refuses processes that this kind of sampler cannot reverse; returns the cut-off."""
        return eps


@dataclass(frozen=True)
class GridSampler(Sampler):
    """Abstract sampler that walks on a grid fixed beforehand.

    Arguments:
        steps: The number of intervals, positive.
        grid: How they are spaced.
        along_path: Whether the noise of the reverse process is that of one Brownian path per
            sample, the same at every number of steps, or drawn anew for every step.
    """

    steps: int = 1000
    grid: Grid = field(default_factory=UniformGrid)
    along_path: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if not isinstance(self.grid, Grid):
            raise InputError(f"grid={self.grid} is no Grid; give one, such as UniformGrid().")

    @abstractmethod
    def integrate(
        self,
        field: Evaluations,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        """Brings states along falling times, float64 ``(n + 1,)``, from the first to the last."""

    def _check_sde(self, sde: SDE, eps: float) -> float:
        return float(self.times(sde, eps)[-1])

    def times(self, sde: SDE, eps: float) -> Tensor:
        """Returns the grid, float64 ``(steps + 1,)``, from 1 to ``eps``.

        Raises:
            InputError: If the SNR does not rise on it all the way, as every step needs.
        """
        times = self.grid(self.steps, sde, eps)
        if not bool((sde.log_snr(times).diff() > 0).all()):
            raise InputError(
                f"The signal-to-noise ratio of {sde} does not rise along the grid from t = 1 to "
                f"{eps}, so {type(self).__name__} cannot sample it; use fewer steps, or an SDE "
                "whose alpha / sigma falls with t."
            )
        return times

    def _run(
        self, field: Evaluations, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        if self.along_path:
            noise = replace(noise, path=BrownianPath(noise.streams, x[0].numel(), x.dtype))
        return FinalState(self.integrate(field, x, self.times(field.sde, eps), noise, report))


def _batch(shape: Sequence[int] | None, latent: Tensor | None) -> int:
    shape = tuple(latent.shape if latent is not None else shape or ())
    if len(shape) < 2 or min(shape) < 1:
        raise InputError(f"The samples' shape {shape} is no batch of examples; give (B, ...).")
    return shape[0]
