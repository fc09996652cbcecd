"""Batched integration with a step size per example.

Each example has its own time, step size, error estimate, and end. No example depends on another,
so a result is the same in any batch, up to rounding in the field.

All examples are evaluated together, each at its own time. Examples that have reached their end
stay in the batch until enough have ended to make repacking worthwhile. The host reads the status
of the batch only every few steps.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from scoresde.passes import owned_by
from scoresde.solvers.base import Control, Field, Problem, Solution, State, failure

RUNNING, DONE, UNDERFLOW, NOT_FINITE = range(4)

_HAIR = 1e-14  # of the interval: a shorter remainder is indistinguishable from zero
_PACK = 0.75  # below this share of running examples, the others are dropped
_UNSEEN = 4  # steps between two status checks on a device other than the CPU


class Layout:
    """Packs arrays ``(B, *)`` into one matrix, and unpacks them."""

    def __init__(self, state: State) -> None:
        self.shapes = [array.shape[1:] for array in state]
        self.widths = [shape.numel() for shape in self.shapes]

    def pack(self, state: State) -> Tensor:
        """Returns one matrix ``(B, width)``."""
        return torch.cat([array.reshape(len(array), -1) for array in state], 1)

    def unpack(self, y: Tensor) -> State:
        """Returns the arrays of a matrix, as views."""
        parts = y.split(self.widths, 1)
        return tuple(
            part.unflatten(1, shape) if shape else part.squeeze(1)
            for part, shape in zip(parts, self.shapes, strict=True)
        )

    def norm(self, y: Tensor) -> Tensor:
        """Returns the largest root mean square of any part, float64 ``(B,)``."""
        parts = [p.square().mean(1) for p in y.split(self.widths, 1) if p.shape[1]]
        return torch.stack(parts).amax(0).sqrt().double()


class BatchedSolve(ABC):
    """Base class for the state of a solve: running examples and results of finished ones.

    A subclass defines the initial step sizes and the step.

    Arguments:
        problem: The problem to solve.
        control: Tolerances and limits.
        pack: Whether examples that have ended are dropped from the batch.
    """

    # Names of the arrays that a subclass adds, with one row per example.
    moving: tuple[str, ...] = ()

    def __init__(self, problem: Problem, control: Control, pack: bool) -> None:
        self.problem, self.control = problem, control
        self.pack = pack and problem.take is not None and problem.constrain is None
        self.attempts = 0
        self.layout = Layout(problem.state)
        self.field: Field = problem.field
        self.y = self.layout.pack(problem.state)
        size, device = len(self.y), self.y.device
        self.span = abs(problem.end - problem.start)
        self.sign = 1.0 if problem.end >= problem.start else -1.0
        self.t = torch.full((size,), problem.start, dtype=torch.float64, device=device)
        self.h = torch.zeros_like(self.t)
        self.status = torch.zeros(size, dtype=torch.int64, device=device)
        self.count = torch.zeros_like(self.status)
        self.rows = torch.arange(size, device=device)
        self.result = {name: getattr(self, name).clone() for name in ("y", "t", "status", "count")}
        self.ends: list[Tensor] = []

    @abstractmethod
    def begin(self) -> None:
        """Chooses the first step sizes ``h``."""

    @abstractmethod
    def step(self) -> None:
        """Tries a step of every running example."""

    def run(self) -> Solution:
        """Integrates to the end."""
        self._tell()
        if self.span > 0:
            self.begin()
            for i in range(self.control.max_steps):
                self.step()
                self.attempts += 1
                self._tell()
                if self._looks(i) and self._finish():
                    break
        self._deliver()
        return self._solution()

    # --- Parts of a step ---

    def slope(self, t: Tensor, y: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Returns the packed field at times and packed states.

        The evaluation counts for the running examples, or for the ``wanted`` ones among them, bool
        ``(B,)``. The other rows have no owner.
        """
        low, high = sorted((self.problem.start, self.problem.end))
        running = self.status == RUNNING if wanted is None else wanted
        with owned_by(torch.where(running, self.rows, -1)):
            slope = self.field(t.clamp(low, high), self.layout.unpack(y))
        self.count += running
        return self.layout.pack(slope)

    def constrain(self, accepted: Tensor) -> Tensor:
        """Constrains accepted examples; returns a mask of those that need a new slope."""
        fresh = accepted & (self.status == RUNNING)
        if self.problem.constrain is None:
            return fresh
        state = self.problem.constrain(self.t, self.layout.unpack(self.y), self.attempts)
        self.y = torch.where(accepted[:, None], self.layout.pack(state), self.y)
        return fresh

    def stride(self) -> tuple[Tensor, Tensor]:
        """Returns the step sizes to try, 0 for finished examples, and a mask of last steps."""
        left = (self.problem.end - self.t).abs()
        last = self.h * (1 + _HAIR) >= left
        return torch.where(self.status == RUNNING, torch.where(last, left, self.h), 0.0), last

    def move(self, accepted: Tensor, last: Tensor, h: Tensor) -> None:
        """Advances the times of accepted steps; ``h`` has the sign of the direction."""
        self.t = torch.where(accepted, torch.where(last, self.problem.end, self.t + h), self.t)
        self.status = torch.where(accepted & last, DONE, self.status)

    def check(self, ratio: Tensor, shortest: float) -> None:
        """Marks examples as failed if their next step is too short, given their error."""
        stuck = (self.status == RUNNING) & (self.h < shortest)
        failure = torch.where(torch.isfinite(ratio), UNDERFLOW, NOT_FINITE)
        self.status = torch.where(stuck, failure, self.status)

    # --- The batch as a whole ---

    def _looks(self, i: int) -> bool:
        """Returns whether the host reads the status of the batch now; always on a CPU.

        It also does so whenever there is a callback, which is not called for a step that no
        example takes.
        """
        told = self.problem.callback is not None
        return told or self.y.device.type == "cpu" or i % _UNSEEN == _UNSEEN - 1

    def _finish(self) -> bool:
        """Returns whether all examples have ended; repacks the batch if worthwhile."""
        running = self.status == RUNNING
        left = int(running.sum())
        if left and self.pack and left <= _PACK * len(running):
            self._deliver()
            self.keep(running.nonzero()[:, 0])
        return left == 0

    def keep(self, kept: Tensor) -> None:
        """Drops all but some rows of the batch, int64."""
        assert self.problem.take is not None
        for name in ("y", "t", "h", "status", "count", "rows", *self.moving):
            setattr(self, name, getattr(self, name)[kept])
        self.field = self.problem.take(self.rows)

    def _deliver(self) -> None:
        for name, values in self.result.items():
            values[self.rows] = getattr(self, name)

    def _tell(self) -> None:
        if self.problem.callback is None and not self.control.record:
            return
        self._deliver()
        t = self.result["t"].clone()
        self.ends.append(t)
        if self.problem.callback is not None:
            self.problem.callback(t, self.layout.unpack(self.result["y"].clone()))

    def _solution(self) -> Solution:
        y, status = self.result["y"], self.result["status"]
        if self.span == 0:
            status = torch.full_like(status, DONE)
        failed = status != DONE
        if self.control.strict:
            self._raise(failed)
        state = tuple(
            array.masked_fill(failed.reshape(-1, *(1,) * (array.ndim - 1)), torch.nan)
            for array in self.layout.unpack(y)
        )
        grid = self._grid() if self.control.record else None
        return Solution(state, self.result["count"], failed, grid)

    def _grid(self) -> Tensor:
        """Returns the times of each example's steps, each once, padded by repeating the end."""
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
            RUNNING: f"took more than {self.control.max_steps} steps",
            UNDERFLOW: "reached a step size of zero",
            NOT_FINITE: "evaluated a field that is not finite",
        }[int(self.result["status"][row])]
        others = f" ({len(rows) - 1} more failed)" if len(rows) > 1 else ""
        where = self.problem.describe(self.result["t"][row])
        raise failure(cause, f"in example {row}{others} near {where}", self.control)
