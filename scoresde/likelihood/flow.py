r"""The probability flow, which transports points and their densities between noise and data.

The ODE :math:`dx/dt = v(x, t)` with :math:`v = f x - \tfrac12 g^2 \nabla_x \log p_t(x)` moves
points. Along their paths the log-density changes by the divergence,

.. math:: \log p_s(x_s) = \log p_t(x_t) + \int_s^t \nabla \cdot v(x_\tau, \tau) \, d\tau .

The integral is solved together with the point, divided by the number of dimensions. The solver's
tolerance then applies to the log-density *per dimension*, as reported in bits/dim, and not to a
sum over thousands of dimensions.

**Clocks.** Near the data the flow changes with the noise level, which grows like :math:`\sqrt t`
for VP, and polynomials in :math:`t` approximate it badly. In the relative noise level
:math:`\rho = \sigma / \alpha` the rescaled point obeys :math:`d(x/\alpha)/d\rho = \hat z`, which
is as smooth as the network. Far from the data only ratios of :math:`\rho` matter. So the default
clock is

.. math:: \tau = \operatorname{arsinh}(\rho / \rho_0), \qquad
          \frac{dt}{d\tau} = \frac{2 \sigma^2}{g^2} \frac{d \log \rho}{d \tau},

linear in :math:`\rho` below :math:`\rho_0` and logarithmic above, by :math:`d \log \rho / dt =
g^2 / (2 \sigma^2)`. The solutions are the same, but a trained network needs about half as many
passes for the same error (``experiments/likelihood_speed.py``).

**Gradients.** To differentiate a solution, it is integrated twice: first by the adaptive solver,
to find the steps, and then on these steps, whose states are kept. The backward pass repeats every
step with its graph, one at a time. This is the exact gradient of the discrete solution, with the
memory of one step's graph and one state per step.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 13 and section D.2).
    Chen et al., *Neural ordinary differential equations*, 2018 (theorem 1).
    Chen et al., *Training deep nets with sublinear memory cost*, 2016 (checkpoints).
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.errors import InputError
from scoresde.likelihood.clock import Clock, NoiseClock
from scoresde.model import Model
from scoresde.shapes import expand
from scoresde.solvers import AdaptiveODE, Solution
from scoresde.solvers.base import Callback, Constraint, State
from scoresde.solvers.runge_kutta import RungeKutta

_HAIR = 1e-9  # relative distance in time from a jump at which a model is evaluated


def as_trace(probes: int | str | Trace) -> Trace:
    """Converts a number of Rademacher probes, ``"exact"``, or an estimator to an estimator.

    Raises:
        InputError: If it is of another type or not positive.
    """
    if isinstance(probes, Trace):
        return probes
    if probes == "exact":
        return ExactTrace()
    if isinstance(probes, str):
        raise InputError(f"probes must be a positive integer or 'exact', got {probes!r}.")
    return Hutchinson(probes)


@dataclass(frozen=True)
class FlowSolution:
    """Points at the end of an integration.

    Arguments:
        x: The points, with shape ``(B, *)``; NaN where ``failed``.
        log_dets: Estimates of the integrated divergence, ``(B, n)``; none without a trace.
        failed: Mask of the points that did not reach the end, bool ``(B,)``.
    """

    x: Tensor
    log_dets: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Flow:
    """The vector field of the probability flow of a batch, with the divergence along it.

    Arguments:
        model: A model.
        cond: The conditions, each with shape ``(B, *)``.
        trace: The estimator of the divergence. If None, only the points are integrated.
        probes: The output of ``trace.probes``, with shape ``(k, B or 1, *)``.
        graph: Whether the field keeps its graph.
        clock: The integration variable.
        interval: The interval of times outside of which the model is never evaluated.
    """

    model: Model
    cond: dict[str, Tensor]
    trace: Trace | None = None
    probes: Tensor | None = None
    graph: bool = False
    clock: Clock = field(default_factory=NoiseClock)
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, reading: Tensor, state: State) -> State:
        """Returns the derivatives of the point and of its log-density per dimension."""
        t, rate = self.time(reading)
        return tuple(
            expand(rate.to(slope.dtype), slope) * slope for slope in self._slopes(t, state)
        )

    @torch.no_grad()  # for any clock, the integral is over time
    def time(self, reading: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the times of readings of the clock, and their derivative."""
        t, rate = self.clock.time(self.model.process, reading)
        return t.clamp(*self.interval), rate

    def _slopes(self, t: Tensor, state: State) -> State:
        x = state[0]
        if self.trace is None:
            return (self.model.velocity(x, t, **self.cond),)
        assert self.probes is not None
        v, divergence = self.trace(
            lambda y: self.model.velocity(y, t, **self.cond),
            x,
            self.probes,
            create_graph=self.graph,
        )
        return v, divergence / x[0].numel()

    def take(self, rows: Tensor) -> "Flow":
        """Returns the field of some examples alone."""
        probes = self.probes
        if probes is not None and probes.shape[1] > 1:
            probes = probes[:, rows]
        cond = {k: v[rows] for k, v in self.cond.items()}
        return replace(self, model=self.model.take(rows), cond=cond, probes=probes)

    def integrate(
        self,
        x: Tensor,
        start: float,
        end: float,
        solver: AdaptiveODE,
        callback: Callback | None = None,
        constrain: Constraint | None = None,
    ) -> FlowSolution:
        """Integrates points from one time to another.

        Arguments:
            x: The points, with shape ``(B, *)``.
            start: Their time.
            end: The time to reach.
            solver: The ODE solver.
            callback: Function called with times and the state during the solution.
            constrain: As in :class:`~scoresde.solvers.base.Problem`, but called with times, not
                readings.

        Raises:
            SolverError: If the solver fails.
        """
        n = 0 if self.trace is None else self.trace.estimates
        state: State = (x,) if n == 0 else (x, x.new_zeros(len(x), n))
        final, failed = state, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        calls = _Calls(callback, constrain)
        for first, last in self._legs(start, end):
            flow = replace(self, interval=_between(first, last, (start, end)))
            calls.again()
            with torch.no_grad():
                solution = flow._solve(
                    state, (first, last), solver, calls.callback, calls.constrain
                )
            if self.graph:
                assert solution.grid is not None
                final = flow._replay(final, solver.replays, solution.grid)
            state, failed = solution.state, failed | solution.failed
        final = final if self.graph else state
        log_dets = final[1] * x[0].numel() if n else x.new_zeros(len(x), 0)
        return FlowSolution(final[0], log_dets, failed)

    def _legs(self, start: float, end: float) -> list[tuple[float, float]]:
        """Returns the ends of the intervals without jumps of the model, in order.

        For a step across a jump, a solver's error estimate is far too small.
        """
        low, high = sorted((start, end))
        times = [low, *(t for t in self.model.jumps if low < t < high), high]
        return list(pairwise(times if start <= end else reversed(times)))

    def _solve(
        self,
        state: State,
        ends: tuple[float, float],
        solver: AdaptiveODE,
        callback: Callback | None,
        constrain: Constraint | None,
    ) -> Solution:
        start, end = ends
        first, last = (self.clock.of(self.model.process, t) for t in ends)

        def time(reading: Tensor) -> Tensor:
            # The exact ends, not those rounded by the clock.
            t = self.time(reading)[0]
            return torch.where(reading == first, start, torch.where(reading == last, end, t))

        return solver(
            self,
            state,
            first,
            last,
            None if callback is None else lambda reading, y: callback(time(reading), y),
            take=self.take,
            record=self.graph,
            constrain=(
                None if constrain is None else lambda reading, y, i: constrain(time(reading), y, i)
            ),
            describe=lambda reading: f"t = {float(self.time(reading)[0]):.6g}",
        )

    def _replay(self, state: State, method: RungeKutta, grid: Tensor) -> State:
        """Integrates on known steps; the result is differentiable."""
        sources = [*self.model.parameters(), *self.model.buffers(), *self.cond.values()]
        leaves = [tensor for tensor in sources if tensor.requires_grad]
        return _Replay.apply(self, method, grid, len(state), *state, *leaves)


class _Calls:
    """A callback and a constraint for consecutive solutions."""

    def __init__(self, callback: Callback | None, constrain: Constraint | None) -> None:
        self._callback, self._constrain = callback, constrain
        self._known = False  # whether the first state of the next solution has been reported
        self._skip = False
        self._count = 0

    def again(self) -> None:
        """Begins the next solution: its first state is the last one of the solution before."""
        self._skip, self._known = self._known, True

    @property
    def callback(self) -> Callback | None:
        """The callback of the next solution."""
        return None if self._callback is None else self._report

    @property
    def constrain(self) -> Constraint | None:
        """The constraint of the next solution."""
        return None if self._constrain is None else self._number

    def _report(self, t: Tensor, state: State) -> None:
        assert self._callback is not None
        if not self._skip:
            self._callback(t, state)
        self._skip = False

    def _number(self, t: Tensor, state: State, i: int) -> State:
        assert self._constrain is not None
        self._count += 1  # attempted steps of all solutions, counted from 1
        return self._constrain(t, state, self._count - 1)


def _between(first: float, last: float, ends: tuple[float, float]) -> tuple[float, float]:
    """Returns the end times of the model's evaluations in an interval, not on a jump itself."""
    low, high = sorted((first, last))
    return low if low in ends else low * (1 + _HAIR), high if high in ends else high * (1 - _HAIR)


class _Replay(torch.autograd.Function):
    """An integration on known steps that keeps the states; the backward pass repeats the steps."""

    @staticmethod
    def forward(
        ctx: Any, flow: Flow, method: RungeKutta, grid: Tensor, parts: int, *tensors: Tensor
    ) -> State:
        states = method.replay(replace(flow, graph=False), tensors[:parts], grid)
        ctx.flow, ctx.method, ctx.grid, ctx.states = flow, method, grid, states[:-1]
        ctx.leaves = tensors[parts:]
        return states[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = [torch.zeros_like(leaf) for leaf in ctx.leaves]
        for i in reversed(range(len(ctx.states))):
            with torch.enable_grad():
                state = tuple(array.detach().requires_grad_() for array in ctx.states[i])
                end = ctx.method.step(ctx.flow, state, ctx.grid[:, i], ctx.grid[:, i + 1])
                found = torch.autograd.grad(
                    end, (*state, *ctx.leaves), gradients, materialize_grads=True
                )
            gradients = found[: len(state)]
            total = [a + b for a, b in zip(total, found[len(state) :], strict=True)]
        return (None, None, None, None, *gradients, *total)
