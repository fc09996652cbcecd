"""Restoration of examples along a bridge, from the source to the data."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Conditioned, Model
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler, Samples, Step
from scoresde.sde import Bridge, StochasticInterpolant
from scoresde.streams import Purpose
from scoresde.times import Grid, UniformGrid


@dataclass(frozen=True)
class Restore(Sampler):
    r"""Sampler of a bridge: each step mixes the state with the denoised estimate.

    .. math:: \hat x_1 = y + \nu(1) \, n, \qquad
              \hat x_s = r \, \hat x_t + (1 - r) \, D(\hat x_t, t) + \tau \, n,
              \qquad r = w_s / w_t

    Each step takes one network evaluation. With one step the result is :math:`D(\hat x_1, 1) =
    E[x_0 \mid y]`, which has the least squared error. With many steps it is a draw: a model that
    takes the source as a condition draws from :math:`p(x_0 \mid y)` in the limit, if the bridge
    has noise.

    Without noise this is Euler's method on :math:`dx/dt = w' (x - D) / w`. For jointly Gaussian
    pairs in one dimension its limit is :math:`\hat x = \sqrt{C_{xx} / C_{yy}} \, y`: a map between
    the two laws, not a draw from :math:`p(x_0 \mid y)`.

    References:
        Delbracio and Milanfar 2023, https://arxiv.org/abs/2303.11435; Liu et al. 2023,
        https://arxiv.org/abs/2302.05872 (equation 4).

    Arguments:
        steps: Number of steps, positive.
        noise: Factor of all noise, in [0, 1]: 1 adds the noise of the process, 0 none, so the
            result is a function of the source.
        grid: Spacing of the times; uniform in t by default.
        eps: Time to stop at; 0, the data, by default.

    Example:
        >>> from scoresde.model import GaussianBridge
        >>> from scoresde.sde import InDI
        >>> pairs = GaussianBridge(torch.zeros(2, 1), [[1.0, 0.8], [0.8, 0.89]], InDI())
        >>> Restore(steps=1)(pairs, source=torch.tensor([[0.89]]), seed=0).x
        tensor([[0.8000]])
    """

    kind = Model

    steps: int = 20
    noise: float = 1.0
    grid: Grid = field(default_factory=UniformGrid)
    eps: float | None = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        number = isinstance(self.noise, int | float) and not isinstance(self.noise, bool)
        if not number or not 0 <= self.noise <= 1:
            raise InputError(
                f"noise must be a factor in [0, 1], got {self.noise}; use 1 for the noise of the "
                "process, 0 for none."
            )
        if not isinstance(self.grid, Grid):
            raise InputError(f"grid must be a Grid such as UniformGrid(), got {self.grid}.")

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
        """Restores examples.

        Arguments:
            model: A model of a bridge.
            shape: Shape ``(B, *)``; that of the source by default.
            latent: States at t = 1 to start from, in place of the source and its noise.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: Index of each example's stream; ``range(B)`` by default.
            callback: Called with a :class:`Step` after every step.
            progress: Whether to show the progress.
            **cond: The ``source`` ``(B, *)`` in model units, and other conditions.

        Raises:
            InputError: If the source is missing, or the model is not a model of a bridge.
        """
        if shape is None and latent is None and isinstance(cond.get("source"), Tensor):
            shape = cond["source"].shape
        self.check(model)
        source = cond.get("source")
        if source is not None and not isinstance(source, Tensor):
            raise InputError(
                f"source must be a tensor of shape (B, *), got {type(source).__name__}; use "
                "torch.tensor."
            )
        if shape is None and latent is None:
            raise InputError(
                "source is required to sample a bridge; pass source=y, with shape (B, *)."
            )
        given: dict[str, Any] = {"latent": latent, "seed": seed, "seeds": seeds, **cond}
        return super().__call__(model, shape, callback=callback, progress=progress, **given)

    def check(self, model: Model) -> float:
        if isinstance(model, Model):  # the process before eps, whose default suits bridges
            self._check_process(model.process, 0.0)
        return super().check(model)

    def _check_process(self, process: Any, eps: float) -> float:
        if not isinstance(process, Bridge):
            raise InputError(
                f"Restore requires a model of a Bridge, got {type(process).__name__}; use "
                "BridgeModel(network, InDI())."
            )
        return eps

    def _start(self, model: Model, shape: Sequence[int], streams: Any, cond: Any) -> Tensor:
        z = streams.normal(
            tuple(shape)[1:], Purpose.LATENT, dtype=model.state(torch.empty(0)).dtype
        )
        return model.process.start(z, self.temperature * self.noise, **cond)

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        process: Any = field.model.process
        times = self.grid(self.steps, process, eps)
        taken = process.step(times[:-1], times[1:])
        rows = zip(pairwise(times.unbind()), *(part.tolist() for part in taken), strict=True)
        for i, ((t, s), kept, fresh, tau) in enumerate(rows):
            x = kept * x + fresh * field.denoise(x, t)
            if tau * self.noise:
                x = x + tau * self.noise * noise(x, Purpose.DIFFUSION, i)
            x = report(s, x, self.steps)
        return FinalState(x)


@dataclass(frozen=True)
class InterpolantSDE(Sampler):
    r"""Euler-Maruyama on a stochastic interpolant, with any amount of noise.

    .. math:: x_s = x_t - h \, (u - \epsilon \, \nabla \log p_t) + \sqrt{2 \epsilon h} \, n,
              \qquad h = t - s

    Every :math:`\epsilon \ge 0` has the same marginals in the limit of many steps; 0 is the ODE. A
    model of two networks takes two evaluations per step.

    References:
        Albergo et al. 2023, https://arxiv.org/abs/2303.08797 (theorems 7 and 8).

    Arguments:
        steps: Number of steps, positive.
        diffusion: Diffusion :math:`\epsilon`, at least 0.
        grid: Spacing of the times; uniform in t by default.
        eps: Time to stop at (see :class:`Sampler`); 0 where the score is finite there.
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    kind = Model

    steps: int = 100
    diffusion: float = 1.0
    grid: Grid = field(default_factory=UniformGrid)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if not isinstance(self.diffusion, int | float) or not 0 <= self.diffusion < math.inf:
            raise InputError(
                f"diffusion must be non-negative and finite, got {self.diffusion}; 0 is the ODE."
            )

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        model: Any = field.model
        times = self.grid(self.steps, model.process, eps)
        for i, (t, s) in enumerate(pairwise(times.unbind())):
            h = float(t - s)
            x = x - h * model.reverse_drift(x, t, self.diffusion, **field.cond)
            if self.diffusion:
                scale = math.sqrt(2 * self.diffusion * h)
                x = x + scale * noise(x, Purpose.DIFFUSION, i)
            x = report(s, x, self.steps)
        return FinalState(x)

    def _check_process(self, process: Any, eps: float) -> float:
        if not isinstance(process, StochasticInterpolant):
            raise InputError(
                f"InterpolantSDE requires a model of a StochasticInterpolant, got "
                f"{type(process).__name__}; use InterpolantModel(velocity, score, "
                "StochasticInterpolant())."
            )
        return eps
