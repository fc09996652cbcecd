r"""Stochastic differential equations with steps of each example's own.

For :math:`dy = v(t, y) \, dt + g(t) \, dw` a step of size :math:`h` takes Euler's step and then
that of Heun along the same increment of the Brownian motion,

.. math::
    k_1 = h \, v(t, y) + g(t) \, \Delta w, \qquad
    k_2 = h \, v(t + h, y + k_1) + g(t + h) \, \Delta w, \qquad
    y' = y + k_1, \qquad y'' = y + \tfrac12 (k_1 + k_2),

and keeps :math:`y''` if their distance :math:`\tfrac12 (k_2 - k_1)` is small,

.. math:: r = \Big\| \frac{k_2 - k_1}
    {2 \max(\mathrm{atol}, \, \mathrm{rtol} \max(|\bar y|, |y'|))} \Big\|_{RMS} \le 1,

where :math:`\bar y` is the :math:`y'` of the last step that was kept. The next step has the size
:math:`h \, \theta \, r^{-p}`, with the factor kept within [0.1, 10], to the
nearest of eight sizes in every octave.

*The motion is a function of time* (:mod:`scoresde.solvers.brownian`). A step that is rejected
because its noise was large must not have that noise drawn anew: the steps that are kept would
then have too little of it. Here a shorter step sees the part of the same path.

*Orders.* Along its path a solution converges with order 1, as :math:`\int g \, dw - \tfrac12
(g + g') \Delta w` has mean zero and the size :math:`h^{3/2}`, and so does :math:`h v'` times what
the chord misses of the path. In distribution Heun's step has order 2 for additive noise: the
variance :math:`\tfrac14 (g + g')^2 h` and the covariance :math:`\tfrac12 h^2` of the motion with
its integral are right to :math:`O(h^3)`.

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

# Maps times, float64 (B,), and states (B, *) to the drift.
Drift = Callable[[Tensor, Tensor], Tensor]

_SHRINK, _GROW = 0.1, 10.0
_NOTCHES = 8  # step sizes in an octave


@dataclass(frozen=True)
class StochasticHeun:
    r"""Heun's method for dy = v(t, y) dt + g(t) dw in steps of each example's own.

    Arguments:
        rtol: The relative tolerance of a step, not negative.
        atol: The absolute tolerance of a step, positive.
        first_step: The size of the first step, in (0, 1].
        safety: The factor :math:`\theta` of every step size, in (0, 1].
        power: The exponent p with which a step size answers to its error, in (0, 1].
        max_steps: How many steps an example may try, positive.

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
                f"rtol={self.rtol}, atol={self.atol}: the first must not be negative, the second "
                "must be positive."
            )
        for name in ("first_step", "safety", "power"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} is outside (0, 1].")
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
            drift: Maps times, float64 ``(B,)``, and states to v.
            diffusion: Maps times to g, ``(B,)``.
            x: The states at time 0.
            end: The time to reach, in (0, 1].
            streams: One random stream per example.
            take: Returns the drift of some examples alone, given their indices; ``None`` keeps
                the batch whole.
            callback: Called with times and a state of one array as the solution proceeds.
            constrain: As in :class:`~scoresde.solvers.base.Problem`.
            describe: Puts a time, ``()``, into words for an error.

        Raises:
            SolverError: If the steps of an example become shorter than its path is known, its
                drift is not finite, or it takes too many steps; it names example and time.
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
    """Returns the nearest of a few step sizes in every octave.

    A path moves by the square root of the time: a rounding of the drift by 1e-7, of other batch
    mates say, would move the times of the steps by as much and the noise by 1e-4.
    """
    return torch.exp2((_NOTCHES * h.log2()).round() / _NOTCHES)


class _Steps(BatchedSolve):
    """One solution on its way; ``w`` is the Brownian motion at its times."""

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
        """Takes the first step size as it is given."""
        self.h = torch.full_like(self.t, min(self.method.first_step, self.span))

    def step(self) -> None:
        """Tries Euler's step and Heun's, and compares them."""
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
        accepted = (self.status == RUNNING) & (ratio <= 1)  # false for what is not a number
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
