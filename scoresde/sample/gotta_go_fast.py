"""The reverse SDE in steps of each sample's own."""

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
    r"""The reverse SDE by Heun's method, each sample in steps that it needs.

    See :mod:`scoresde.solvers.stochastic_heun` for a step, its error and its orders. A sample has
    its own step sizes, rejections, and end, so that it does not depend on its batch mates; those
    that have ended cost nothing any more. The noise is that of one Brownian path per sample, the
    one of ``along_path=True`` of a :class:`GridSampler`. Every attempt costs two passes.

    The published runs take rtol from 0.01 (careful) to 0.1 (fast), and as atol half a level of
    8-bit images: 1/128 for data in [-1, 1], 1/256 for data in [0, 1].

    References:
        Jolicoeur-Martineau et al., *Gotta go fast when generating data with score-based models*,
        2021, https://arxiv.org/abs/2105.14080 (algorithm 1).

    Arguments:
        rtol: The relative tolerance of a step, not negative.
        atol: The absolute tolerance of a step in model units, positive.
        first_step: The size of the first step in t, in (0, 1].
        safety: The factor of every step size, in (0, 1].
        power: The exponent with which a step size answers to its error, in (0, 1].
        max_steps: How many steps a sample may try, positive.
        eps: The time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the expected data there, for one pass more.
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
