r"""Embedded Runge-Kutta methods in which every example of a batch walks at its own pace.

A step of size :math:`h` from :math:`y_n` evaluates the field in :math:`s` stages,

.. math:: k_i = v\Big(t_n + c_i h, \; y_n + h \sum_{j < i} a_{ij} k_j\Big), \qquad
          y_{n+1} = y_n + h \sum_i b_i k_i, \qquad e = h \sum_i (b_i - \hat b_i) k_i,

where :math:`\hat b` are the weights of a second solution of lower order, so that :math:`e`
estimates the error of the step. The last stage is the field at :math:`y_{n+1}` and thereby the
first of the next step ("first same as last"): :math:`s - 1` evaluations a step.

Each example has its own time, step size, error estimate, and end. The error is measured, for
each part of the state (the point, its log-density), by

.. math:: \Big\| \frac{e}{\mathrm{atol} + \mathrm{rtol} \max(|y_n|, |y_{n+1}|)} \Big\|_{RMS} ,

and the largest part counts. A step is accepted at 1 or below, and the next is larger by
:math:`0.9 \, \|e\|^{-1/q}`, kept within [0.2, 10], with :math:`q` the order of the method; after
a rejection it does not grow. Nothing here depends on another example, so that a result is the
same in any batch, to the rounding of the field.

All examples are evaluated together, each at its own time. Those at their end stand still, until
so many have ended that the batch is worth packing anew. The host looks at the state of the batch
only every few steps.

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

from scoresde.solvers.base import Control, Field, Method, Problem, Solution, State, failure

Row = tuple[float, ...]

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_TINY = 1e-14  # of the interval: a step below it cannot be told from none in float64
_PACK = 0.75  # below this share of running examples the others are dropped
_UNSEEN = 4  # steps on a device other than the host's between two looks at it

_RUNNING, _DONE, _UNDERFLOW, _NOT_FINITE = range(4)


@dataclass(frozen=True)
class RungeKutta(Method):
    """Abstract embedded pair whose last stage is the first of the next step.

    Arguments:
        pack: Whether examples that have ended are dropped from the batch. Without it the batch
            keeps its size, as CUDA graphs and statically compiled fields want it.
    """

    pack: bool = True

    @property
    @abstractmethod
    def order(self) -> int:
        """The order q of the solution that is kept."""

    @property
    @abstractmethod
    def nodes(self) -> Row:
        """The nodes c of all stages but the first."""

    @property
    @abstractmethod
    def matrix(self) -> tuple[Row, ...]:
        """The rows a of all stages but the first; the last row is b."""

    @property
    @abstractmethod
    def error(self) -> Row:
        r"""The weights :math:`b - \hat b` of the error estimate, of all stages."""

    def solve(self, problem: Problem, control: Control) -> Solution:
        """Integrates a batch (see :class:`~scoresde.solvers.base.Method`)."""
        return _Solve(self, problem, control).run()

    def replay(self, field: Field, state: State, grid: Tensor) -> list[State]:
        """Walks on given times, without error estimates.

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
        """Takes one step from times ``start`` to ``end``, float64 with shape ``(B,)``."""
        layout = _Layout(state)
        h, slopes = end - start, [layout.pack(field(start, state))]
        y = layout.pack(state)
        at = y
        for node, row in zip(self.nodes, self.matrix, strict=True):
            at = _advance(y, h, row, slopes)
            if len(slopes) < len(self.matrix):
                slopes.append(layout.pack(field(start + node * h, layout.unpack(at))))
        return layout.unpack(at)


@final
@dataclass(frozen=True)
class DormandPrince(RungeKutta):
    """The pair 5(4) of Dormand and Prince (``dopri5``): six evaluations a step."""

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
    """The pair 5(4) of Tsitouras (``tsit5``): six evaluations a step."""

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
    """The pair 3(2) of Bogacki and Shampine (``bosh3``): three evaluations a step."""

    order = 3
    nodes = (1 / 2, 3 / 4, 1.0)
    matrix = ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9))
    error = (-5 / 72, 1 / 12, 1 / 9, -1 / 8)


class _Layout:
    """Arrays ``(B, *)`` side by side in one matrix, and back."""

    def __init__(self, state: State) -> None:
        self.shapes = [array.shape[1:] for array in state]
        self.widths = [shape.numel() for shape in self.shapes]

    def pack(self, state: State) -> Tensor:
        return torch.cat([array.reshape(len(array), -1) for array in state], 1)

    def unpack(self, y: Tensor) -> State:
        parts = y.split(self.widths, 1)
        return tuple(
            part.unflatten(1, shape) if shape else part.squeeze(1)
            for part, shape in zip(parts, self.shapes, strict=True)
        )

    def norm(self, y: Tensor) -> Tensor:
        """Returns the largest root mean square of any part, float64 ``(B,)``."""
        parts = [p.square().mean(1) for p in y.split(self.widths, 1) if p.shape[1]]
        return torch.stack(parts).amax(0).sqrt().double()


def _advance(y: Tensor, h: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Returns y + h sum w k; the weights are rounded once to the type of the state."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            y = torch.addcmul(y, (weight * h).to(y.dtype)[:, None], slope)
    return y


class _Solve:
    """One solution on its way: the running examples, and the results of those that have ended."""

    def __init__(self, method: RungeKutta, problem: Problem, control: Control) -> None:
        self.method, self.problem, self.control = method, problem, control
        self.layout = _Layout(problem.state)
        self.field: Field = problem.field
        self.y = self.layout.pack(problem.state)
        size, device = len(self.y), self.y.device
        self.span = abs(problem.end - problem.start)
        self.sign = 1.0 if problem.end >= problem.start else -1.0
        self.t = torch.full((size,), problem.start, dtype=torch.float64, device=device)
        self.h = torch.zeros_like(self.t)
        self.rejected = torch.zeros(size, dtype=torch.bool, device=device)
        self.status = torch.zeros(size, dtype=torch.int64, device=device)
        self.count = torch.zeros_like(self.status)
        self.rows = torch.arange(size, device=device)
        self.result = {name: getattr(self, name).clone() for name in ("y", "t", "status", "count")}
        self.ends: list[Tensor] = []

    def run(self) -> Solution:
        self._tell()
        if self.span > 0:
            self._begin()
            for i in range(self.control.max_steps):
                self._step()
                self._tell()
                if self._looks(i) and self._finish():
                    break
        self._deliver()
        return self._solution()

    # --- One step ---

    def _slope(self, t: Tensor, y: Tensor) -> Tensor:
        low, high = sorted((self.problem.start, self.problem.end))
        slope = self.field(t.clamp(low, high), self.layout.unpack(y))
        self.count += self.status == _RUNNING
        return self.layout.pack(slope)

    def _scale(self, y: Tensor) -> Tensor:
        return self.control.atol + self.control.rtol * y.abs()

    def _begin(self) -> None:
        """Chooses the first step sizes by the size of the field and of its change."""
        norm, scale = self.layout.norm, self._scale(self.y)
        self.first = self._slope(self.t, self.y)
        size, speed = norm(self.y / scale), norm(self.first / scale)
        h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
        h = h.clamp(max=self.span).nan_to_num(0.0)
        probe = _advance(self.y, self.sign * h, [1.0], [self.first])
        bend = norm((self._slope(self.t + self.sign * h, probe) - self.first) / scale) / h
        largest = torch.fmax(speed, bend)
        step = (0.01 / largest) ** (1 / self.method.order)
        step = torch.where(largest <= 1e-15, (1e-3 * h).clamp(min=1e-6), step)
        self.h = torch.fmin(100 * h, step).clamp(max=self.span)
        self.status[~torch.isfinite(speed)] = _NOT_FINITE

    def _step(self) -> None:
        method, running = self.method, self.status == _RUNNING
        left = (self.problem.end - self.t).abs()
        last = self.h * (1 + _TINY) >= left
        h = torch.where(running, torch.where(last, left, self.h), 0.0)
        signed = self.sign * h
        slopes, y = [self.first], self.y
        for node, row in zip(method.nodes, method.matrix, strict=True):
            y = _advance(self.y, signed, row, slopes)
            slopes.append(self._slope(self.t + node * signed, y))
        error = _advance(torch.zeros_like(y), signed, method.error, slopes)
        scale = self._scale(torch.maximum(self.y.abs(), y.abs()))
        ratio = self.layout.norm(error / scale)
        accepted = running & (ratio <= 1)  # false for what is not a number
        self._accept(accepted, last, signed, y, slopes[-1])
        self._resize(accepted, h, ratio)

    def _accept(self, accepted: Tensor, last: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> None:
        keep = accepted[:, None]
        self.y, self.first = torch.where(keep, y, self.y), torch.where(keep, slope, self.first)
        self.t = torch.where(accepted, torch.where(last, self.problem.end, self.t + h), self.t)
        self.status = torch.where(accepted & last, _DONE, self.status)

    def _resize(self, accepted: Tensor, h: Tensor, ratio: Tensor) -> None:
        factor = _SAFETY * ratio.clamp(min=1e-10) ** (-1 / self.method.order)
        factor = factor.nan_to_num(_SHRINK).clamp(_SHRINK, _GROW)
        grow = torch.where(accepted & ~self.rejected, factor, factor.clamp(max=1.0))
        self.h, self.rejected = h * grow, ~accepted
        stuck = (self.status == _RUNNING) & (self.h < _TINY * self.span)
        failure = torch.where(torch.isfinite(ratio), _UNDERFLOW, _NOT_FINITE)
        self.status = torch.where(stuck, failure, self.status)

    # --- The batch as a whole ---

    def _looks(self, i: int) -> bool:
        """Whether the host looks at the batch now: always where looking is free."""
        return self.y.device.type == "cpu" or i % _UNSEEN == _UNSEEN - 1

    def _finish(self) -> bool:
        """Whether no example runs any more; packs the batch if it pays."""
        running = self.status == _RUNNING
        left = int(running.sum())
        if left and self.method.pack and self.problem.take and left <= _PACK * len(running):
            self._deliver()
            self._keep(running.nonzero()[:, 0])
        return left == 0

    def _keep(self, kept: Tensor) -> None:
        assert self.problem.take is not None
        for name in ("y", "t", "h", "first", "rejected", "status", "count", "rows"):
            setattr(self, name, getattr(self, name)[kept])
        self.field = self.problem.take(self.rows)

    def _deliver(self) -> None:
        for name, values in self.result.items():
            values[self.rows] = getattr(self, name)

    def _tell(self) -> None:
        if self.problem.watch is None and not self.control.record:
            return
        self._deliver()
        t = self.result["t"].clone()
        self.ends.append(t)
        if self.problem.watch is not None:
            self.problem.watch(t, self.layout.unpack(self.result["y"].clone()))

    def _solution(self) -> Solution:
        y, status = self.result["y"], self.result["status"]
        if self.span == 0:
            status = torch.full_like(status, _DONE)
        failed = status != _DONE
        if self.control.strict:
            self._raise(failed)
        state = tuple(
            array.masked_fill(failed.reshape(-1, *(1,) * (array.ndim - 1)), torch.nan)
            for array in self.layout.unpack(y)
        )
        grid = self._grid() if self.control.record else None
        return Solution(state, self.result["count"], failed, grid)

    def _grid(self) -> Tensor:
        """Returns the times at which each example has stood, each once, the end repeated."""
        times = torch.stack(self.ends, 1)
        moved = times.diff(dim=1) != 0
        place = moved.cumsum(1)
        grid = torch.full_like(times, self.problem.end)
        grid[:, 0] = self.problem.start
        grid.scatter_(1, place, times[:, 1:])
        return grid[:, : int(place.max()) + 1]

    def _raise(self, failed: Tensor) -> None:
        rows = failed.nonzero()[:, 0].tolist()
        if not rows:
            return
        row = rows[0]
        cause = {
            _RUNNING: f"took more than {self.control.max_steps} steps",
            _UNDERFLOW: "met a step size of zero",
            _NOT_FINITE: "met a field that is not finite",
        }[int(self.result["status"][row])]
        others = f" ({len(rows) - 1} more failed)" if len(rows) > 1 else ""
        where = self.problem.describe(self.result["t"][row])
        raise failure(cause, f"in example {row}{others} near {where}", self.control)
