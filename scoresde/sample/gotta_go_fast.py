"""Adaptive solver of the reverse SDE, with separate steps for each sample."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scoresde.model import Conditioned
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler
from scoresde.sample.predictors import leave_zero_snr
from scoresde.solvers import StochasticHeun
from scoresde.solvers.base import State


@dataclass(frozen=True)
class GottaGoFast(Sampler):
    r"""Heun's method for the reverse SDE, with adaptive steps for each sample.

    See :mod:`scoresde.solvers.stochastic_heun` for a step, its error and its orders. Each sample
    has its own step sizes, rejections and end, so it does not depend on the rest of the batch. A
    sample that has ended costs nothing. The noise follows one Brownian path per sample, as with
    ``along_path=True`` of a :class:`GridSampler`. Every attempt costs two network evaluations.

    The paper uses rtol from 0.01 (accurate) to 0.1 (fast), and as atol half a level of 8-bit
    images: 1/128 for data in [-1, 1], 1/256 for data in [0, 1].

    References:
        Jolicoeur-Martineau et al., *Gotta go fast when generating data with score-based models*,
        2021, https://arxiv.org/abs/2105.14080 (algorithm 1).

    Arguments:
        rtol: Relative tolerance of a step, not negative.
        atol: Absolute tolerance of a step in model units, positive.
        first_step: Size of the first step in t, in (0, 1].
        safety: Safety factor of every step size, in (0, 1].
        power: Exponent of the error in the rule for the next step size, in (0, 1].
        max_steps: Maximum number of attempted steps per sample, positive.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``, for one more evaluation.
    """

    rtol: float = 0.05
    atol: float = 0.0078125
    first_step: float = 0.01
    safety: float = 0.9
    power: float = 0.9
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._solver()

    def _solver(self) -> StochasticHeun:
        return StochasticHeun(
            self.rtol, self.atol, self.first_step, self.safety, self.power, self.max_steps
        )

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        first = 1.0
        if field.sde.zero_snr:  # where the reverse SDE has no coefficients at t = 1
            first = max(1 - self.first_step, eps)
            x = leave_zero_snr(field, x, first, noise)

        def time(tau: Tensor) -> Tensor:
            return (first - tau).clamp(eps, first)

        def take(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            some = field.take(rows)
            return lambda tau, x: -some.reverse_drift(x, time(tau))

        def constrain(tau: Tensor, state: State, i: int) -> State:
            return (report.constrain(time(tau), state[0], i),)

        def tell(tau: Tensor, state: State) -> None:
            report.tell(time(tau), state[0])

        solution = self._solver()(
            lambda tau, x: -field.reverse_drift(x, time(tau)),
            lambda tau: noise.temperature * field.sde.g(time(tau)),
            x,
            first - eps,
            noise.streams,
            take=take,
            callback=tell if report.watched else None,
            constrain=constrain if report.constraint is not None else None,
            describe=lambda tau: f"t = {float(time(tau)):.6g}",
        )
        return FinalState(solution.state[0])
