r"""Adaptive solver for stochastic differential equations, with a step size per example.

For :math:`dy = v(t, y) \, dt + g(t) \, dw` a step of size :math:`h` takes an Euler step and then a
Heun step along the same increment of the Brownian motion,

.. math::
    k_1 = h \, v(t, y) + g(t) \, \Delta w, \qquad
    k_2 = h \, v(t + h, y + k_1) + g(t + h) \, \Delta w, \qquad
    y' = y + k_1, \qquad y'' = y + \tfrac12 (k_1 + k_2),

and keeps :math:`y''` if their distance :math:`\tfrac12 (k_2 - k_1)` is small,

.. math:: r = \Big\| \frac{k_2 - k_1}
    {2 \max(\mathrm{atol}, \, \mathrm{rtol} \max(|\bar y|, |y'|))} \Big\|_{RMS} \le 1,

where :math:`\bar y` is the :math:`y'` of the last accepted step. The next step has the size
:math:`h \, \theta \, r^{-p}`, with the factor kept within [0.1, 10], to the nearest of eight sizes
in every octave.

*The motion is a function of time* (:mod:`scoresde.solvers.brownian`). If a step is rejected
because its noise was large, the noise must not be drawn again, or the accepted steps would have
too little noise. Here, a shorter step uses a part of the same path.

*Orders.* Along its path a solution converges with order 1, as :math:`\int g \, dw - \tfrac12
(g + g') \Delta w` has mean zero and the size :math:`h^{3/2}`, and so does :math:`h v'` times the
deviation of the path from its chord. In distribution Heun's step has order 2 for additive noise:
the variance :math:`\tfrac14 (g + g')^2 h` and the covariance :math:`\tfrac12 h^2` of the motion
with its integral are correct to :math:`O(h^3)`.

References:
    Jolicoeur-Martineau et al., *Gotta go fast when generating data with score-based models*,
    2021, https://arxiv.org/abs/2105.14080 (algorithm 1).
    Gaines and Lyons, *Variable step size control in the numerical solution of stochastic
    differential equations*, 1997.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.solvers.base import Callback, Constraint, Control, Problem, Solution, State
from scoresde.solvers.batched import RUNNING, BatchedSolve
from scoresde.solvers.brownian import BrownianPath
from scoresde.streams import Streams

# Function of times, float64 (B,), and states (B, *) that returns the drift.
Drift = Callable[[Tensor, Tensor], Tensor]

_SHRINK, _GROW = 0.1, 10.0
_NOTCHES = 8  # step sizes in an octave


@dataclass(frozen=True)
class StochasticHeun:
    r"""Heun's method for dy = v(t, y) dt + g(t) dw, with a step size per example.

    Arguments:
        rtol: The relative tolerance of a step, not negative.
        atol: The absolute tolerance of a step, positive.
        first_step: The size of the first step, in (0, 1].
        safety: The factor :math:`\theta` of every step size, in (0, 1].
        power: The exponent p of the error in the step size, in (0, 1].
        max_steps: Largest number of attempted steps per example, positive.

    Raises:
        InputError: If an argument is out of range.
    """

    rtol: float = 0.05
    atol: float = 0.0078125
    first_step: float = 0.01
    safety: float = 0.9
    power: float = 0.9
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0):
            raise InputError(
                f"rtol must be non-negative and atol positive, got {self.rtol} and {self.atol}."
            )
        for name in ("first_step", "safety", "power"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        check_count("max_steps", self.max_steps)

    def __call__(
        self,
        drift: Drift,
        diffusion: Callable[[Tensor], Tensor],
        x: Tensor,
        end: float,
        streams: Streams,
        *,
        take: Callable[[Tensor], Drift] | None = None,
        callback: Callback | None = None,
        constrain: Constraint | None = None,
        describe: Callable[[Tensor], str] | None = None,
    ) -> Solution:
        """Integrates states ``(B, *)`` from time 0 to ``end``, at most 1.

        Arguments:
            drift: Function of times, float64 ``(B,)``, and states that returns v.
            diffusion: Function of times that returns g, ``(B,)``.
            x: The states at time 0.
            end: The time to reach, in (0, 1].
            streams: One random stream per example.
            take: Function that returns the drift restricted to some examples, given their indices.
                If None, the batch keeps its size.
            callback: Called with times and a state of one array as the solution proceeds.
            constrain: As in :class:`~scoresde.solvers.base.Problem`.
            describe: Function that formats a time, ``()``, for an error message.

        Raises:
            SolverError: If the steps of an example become shorter than the resolution of its path,
                its drift is not finite, or it takes too many steps. The message states the example
                and the time.
        """

        def one(drift: Drift) -> Callable[[Tensor, State], State]:
            return lambda t, state: (drift(t, state[0]),)

        some = None if take is None else (lambda rows: one(take(rows)))
        problem = Problem(one(drift), (x,), 0.0, float(end), some, callback, constrain)
        if describe is not None:
            problem = replace(problem, describe=describe)
        control = Control(self.rtol, self.atol, self.max_steps)
        path = BrownianPath(streams, x[0].numel(), torch.float64)
        return _Steps(self, problem, control, diffusion, path).run()


def _notch(h: Tensor) -> Tensor:
    """Rounds to the nearest of a few step sizes in every octave.

    A path moves by the square root of the time. Without these fixed sizes, a rounding difference
    of 1e-7 in the drift, as from a different batch, would change the times of the steps by about
    1e-7 and the noise by about 1e-4.
    """
    return torch.exp2((_NOTCHES * h.log2()).round() / _NOTCHES)


class _Steps(BatchedSolve):
    """State of a solve; ``w`` is the Brownian motion at its times."""

    moving = ("w", "proposed")

    def __init__(
        self,
        method: StochasticHeun,
        problem: Problem,
        control: Control,
        diffusion: Callable[[Tensor], Tensor],
        path: BrownianPath,
    ) -> None:
        super().__init__(problem, control, pack=True)
        self.method, self.diffusion = method, diffusion
        self.path = self.whole = path
        self.w = torch.zeros_like(self.y, dtype=torch.float64)
        self.proposed = self.y

    def begin(self) -> None:
        """Sets the given first step size."""
        self.h = torch.full_like(self.t, min(self.method.first_step, self.span))

    def step(self) -> None:
        """Tries an Euler step and a Heun step, and compares them."""
        h, last = self.stride()
        end = torch.where(last, self.problem.end, self.t + h)
        end = torch.where(self.status == RUNNING, end, self.t)
        w = self.path(end)
        move = (w - self.w).to(self.y)
        first = self._slope_and_noise(self.t, h, self.y, move)
        euler = self.y + first
        second = self._slope_and_noise(end, h, euler, move)
        size = torch.maximum(self.proposed.abs(), euler.abs())
        scale = (self.control.rtol * size).clamp(min=self.control.atol)
        ratio = self.layout.norm(0.5 * (second - first) / scale)
        accepted = (self.status == RUNNING) & (ratio <= 1)  # False for NaN
        keep = accepted[:, None]
        self.y = torch.where(keep, self.y + 0.5 * (first + second), self.y)
        self.proposed = torch.where(keep, euler, self.proposed)
        self.w = torch.where(keep, w, self.w)
        self.move(accepted, last, h)
        self.constrain(accepted)
        factor = self.method.safety * ratio.clamp(min=1e-10) ** -self.method.power
        self.h = _notch(self.h * factor.nan_to_num(_SHRINK).clamp(_SHRINK, _GROW))
        self.check(ratio, 0.5**self.path.depth)

    def _slope_and_noise(self, t: Tensor, h: Tensor, y: Tensor, move: Tensor) -> Tensor:
        noise = self.diffusion(t).to(y)[:, None] * move
        return torch.addcmul(noise, h.to(y)[:, None], self.slope(t, y))

    def keep(self, kept: Tensor) -> None:
        """Drops all but some rows of the batch, int64."""
        super().keep(kept)
        self.path = self.whole.take(self.rows)
