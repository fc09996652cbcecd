r"""Embedded Runge-Kutta methods with a step size per example.

A step of size :math:`h` from :math:`y_n` evaluates the field in :math:`s` stages,

.. math:: k_i = v\Big(t_n + c_i h, \; y_n + h \sum_{j < i} a_{ij} k_j\Big), \qquad
          y_{n+1} = y_n + h \sum_i b_i k_i, \qquad e = h \sum_i (b_i - \hat b_i) k_i,

where :math:`\hat b` are the weights of a second solution of lower order, so :math:`e` estimates
the error of the step. The last stage is the field at :math:`y_{n+1}`, which is also the first
stage of the next step ("first same as last"), so a step costs :math:`s - 1` evaluations.

Each example has its own time, step size, error estimate, and end. The error is measured, for
each part of the state (the point, its log-density), by

.. math:: \Big\| \frac{e}{\mathrm{atol} + \mathrm{rtol} \max(|y_n|, |y_{n+1}|)} \Big\|_{RMS} ,

and the largest part counts. A step is accepted at 1 or below, and the next is larger by
:math:`0.9 \, \|e\|^{-1/q}`, kept within [0.2, 10], with :math:`q` the order of the method; after
a rejection it does not grow.

References:
    Hairer, Norsett and Wanner, *Solving ordinary differential equations I*, 1993 (section II.4).
    Dormand and Prince, *A family of embedded Runge-Kutta formulae*, 1980.
    Bogacki and Shampine, *A 3(2) pair of Runge-Kutta formulas*, 1989.
    Tsitouras, *Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
    assumption*, 2011.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.passes import owned_by
from scoresde.solvers.base import Control, Field, Method, Problem, Solution, State
from scoresde.solvers.batched import NOT_FINITE, RUNNING, BatchedSolve, Layout

Row = tuple[float, ...]

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_TINY = 1e-14  # of the interval: a shorter step is indistinguishable from zero in float64


@dataclass(frozen=True)
class RungeKutta(Method):
    """Base class for embedded pairs whose last stage is the first of the next step.

    Arguments:
        pack: Whether examples that have ended are dropped from the batch. If False, the batch
            keeps its size, as CUDA graphs and statically compiled fields require.
    """

    pack: bool = True

    @property
    @abstractmethod
    def order(self) -> int:
        """The order q of the solution that is propagated."""

    @property
    @abstractmethod
    def nodes(self) -> Row:
        """The nodes c of all stages except the first."""

    @property
    @abstractmethod
    def matrix(self) -> tuple[Row, ...]:
        """The rows a of all stages except the first; the last row is b."""

    @property
    @abstractmethod
    def error(self) -> Row:
        r"""The weights :math:`b - \hat b` of the error estimate, of all stages."""

    def solve(self, problem: Problem, control: Control) -> Solution:
        """Integrates a batch (see :class:`~scoresde.solvers.base.Method`)."""
        return _Steps(self, problem, control).run()

    def replay(self, field: Field, state: State, grid: Tensor) -> list[State]:
        """Integrates on given times, without error estimates.

        Arguments:
            field: As in :class:`Problem`.
            state: Arrays with shape ``(B, *)`` at the first times.
            grid: Times, float64, with shape ``(B, n + 1)``; equal neighbours are steps of zero.

        Returns:
            The states at all times, n + 1 of them.
        """
        states = [state]
        for start, end in zip(grid.T[:-1], grid.T[1:], strict=True):
            states.append(self.step(field, states[-1], start, end))
        return states

    def step(self, field: Field, state: State, start: Tensor, end: Tensor) -> State:
        """Takes one step from times ``start`` to times ``end``, float64 with shape ``(B,)``."""
        layout = Layout(state)
        h, y = end - start, layout.pack(state)
        # A zero step means that the example has reached its end; its evaluations are not counted.
        rows = torch.where(h != 0, torch.arange(len(h), device=h.device), -1)
        with owned_by(rows):
            at, slopes = y, [layout.pack(field(start, state))]
            for node, row in zip(self.nodes, self.matrix, strict=True):
                at = _advance(y, h, row, slopes)
                if len(slopes) < len(self.matrix):
                    slopes.append(layout.pack(field(start + node * h, layout.unpack(at))))
        return layout.unpack(at)


@final
@dataclass(frozen=True)
class DormandPrince(RungeKutta):
    """The pair 5(4) of Dormand and Prince (``dopri5``), with six evaluations per step."""

    order = 5
    nodes = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
    matrix = (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    )
    error = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@final
@dataclass(frozen=True)
class Tsitouras(RungeKutta):
    """The pair 5(4) of Tsitouras (``tsit5``), with six evaluations per step."""

    order = 5
    nodes = (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
    matrix = (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    )
    error = (
        -0.0017800110522257771,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    )


@final
@dataclass(frozen=True)
class BogackiShampine(RungeKutta):
    """The pair 3(2) of Bogacki and Shampine (``bosh3``), with three evaluations per step."""

    order = 3
    nodes = (1 / 2, 3 / 4, 1.0)
    matrix = ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9))
    error = (-5 / 72, 1 / 12, 1 / 9, -1 / 8)


def _advance(y: Tensor, h: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Returns y + h sum w k; the weights are rounded once to the data type of the state."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            y = torch.addcmul(y, (weight * h).to(y.dtype)[:, None], slope)
    return y


class _Steps(BatchedSolve):
    """State of a solve with an embedded pair."""

    moving = ("first", "rejected")

    def __init__(self, method: RungeKutta, problem: Problem, control: Control) -> None:
        super().__init__(problem, control, pack=method.pack)
        self.method = method
        self.first = self.y
        self.rejected = torch.zeros(len(self.y), dtype=torch.bool, device=self.y.device)

    def _scale(self, y: Tensor) -> Tensor:
        return self.control.atol + self.control.rtol * y.abs()

    def begin(self) -> None:
        """Chooses the first step sizes from the size of the field and of its change."""
        norm, scale = self.layout.norm, self._scale(self.y)
        self.first = self.slope(self.t, self.y)
        size, speed = norm(self.y / scale), norm(self.first / scale)
        h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
        h = h.clamp(max=self.span).nan_to_num(0.0)
        probe = _advance(self.y, self.sign * h, [1.0], [self.first])
        bend = norm((self.slope(self.t + self.sign * h, probe) - self.first) / scale) / h
        largest = torch.fmax(speed, bend)
        step = (0.01 / largest) ** (1 / self.method.order)
        step = torch.where(largest <= 1e-15, (1e-3 * h).clamp(min=1e-6), step)
        self.h = torch.fmin(100 * h, step).clamp(max=self.span)
        self.status[~torch.isfinite(speed)] = NOT_FINITE

    def step(self) -> None:
        method, running = self.method, self.status == RUNNING
        h, last = self.stride()
        signed = self.sign * h
        slopes, y = [self.first], self.y
        for node, row in zip(method.nodes, method.matrix, strict=True):
            y = _advance(self.y, signed, row, slopes)
            slopes.append(self.slope(self.t + node * signed, y))
        error = _advance(torch.zeros_like(y), signed, method.error, slopes)
        scale = self._scale(torch.maximum(self.y.abs(), y.abs()))
        ratio = self.layout.norm(error / scale)
        accepted = running & (ratio <= 1)  # False for NaN
        self._accept(accepted, last, signed, y, slopes[-1])
        self._resize(accepted, h, ratio)

    def _accept(self, accepted: Tensor, last: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> None:
        keep = accepted[:, None]
        self.y, self.first = torch.where(keep, y, self.y), torch.where(keep, slope, self.first)
        self.move(accepted, last, h)
        fresh = self.constrain(accepted)
        if self.problem.constrain is not None:
            slope = self.slope(self.t, self.y, fresh)
            self.first = torch.where(fresh[:, None], slope, self.first)

    def _resize(self, accepted: Tensor, h: Tensor, ratio: Tensor) -> None:
        factor = _SAFETY * ratio.clamp(min=1e-10) ** (-1 / self.method.order)
        factor = factor.nan_to_num(_SHRINK).clamp(_SHRINK, _GROW)
        grow = torch.where(accepted & ~self.rejected, factor, factor.clamp(max=1.0))
        self.h, self.rejected = h * grow, ~accepted
        self.check(ratio, _TINY * self.span)
