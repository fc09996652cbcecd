r"""Ordinary differential equations by torchdiffeq's adaptive Runge-Kutta methods.

The step size is shared by the batch: torchdiffeq integrates it as one system. The error that
accepts a step is the largest over the batch of the root mean square over one example, so that
every example keeps the tolerance, but which steps are taken depends on the batch mates. At
rtol = 1e-7 an example moves by less than 1e-5 when its mates change (tested).

References:
    Dormand and Prince, *A family of embedded Runge-Kutta formulae*, 1980.
    Chen, *torchdiffeq*, 2018.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchdiffeq
from torch import Tensor

from scoresde.errors import InputError, SolverError, check_count

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]
Watch = Callable[[Tensor, State], None]

METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class AdaptiveODE:
    """Solves dy/dt = v(t, y) from one time to another, forwards or backwards.

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        method: One of ``dopri5``, ``dopri8``, ``bosh3``, ``fehlberg2``, ``adaptive_heun``.
        max_steps: How many steps it may take.

    Raises:
        InputError: If an argument is out of range.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise InputError(f"rtol={self.rtol}, atol={self.atol}: both must be positive.")
        check_count("max_steps", self.max_steps)
        if self.method not in METHODS:
            raise InputError(f"method={self.method!r} is not one of {', '.join(METHODS)}.")

    def __call__(
        self, field: Field, state: State, start: float, end: float, watch: Watch | None = None
    ) -> State:
        """Integrates a state.

        Arguments:
            field: Maps a time, float64 with shape ``()``, and a state to its derivative. It is
                never called outside of the two times.
            state: Arrays, each with shape ``(B, *)``.
            start: The time of the state.
            end: The time to reach.
            watch: Called with the time and the state before every accepted step.

        Returns:
            The state at ``end``.

        Raises:
            SolverError: If the step size underflows, the field is not finite, or there are too
                many steps.
        """
        if start == end:
            return state
        system = _System(field, min(start, end), max(start, end), watch)
        times = torch.tensor([start, end], dtype=torch.float64, device=state[0].device)
        # Without step_t the last step passes the end, and the end is interpolated.
        options = {"step_t": times[1:], "norm": _worst_example, "max_num_steps": self.max_steps}
        try:
            solution = torchdiffeq.odeint(
                system,
                state,
                times,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options,
            )
        except (AssertionError, _StepError) as error:
            raise SolverError(self._explain(system, str(error))) from error
        return tuple(array[-1] for array in solution)

    def _explain(self, system: "_System", message: str) -> str:
        cause = (
            f"took more than {self.max_steps} steps"
            if "max_num_steps" in message
            else "met a step size of zero or a state that is not finite"
        )
        return (
            f"The ODE solver {cause} near t = {system.last:.6g}. The field is too rough there or "
            f"not finite; check the model, or use a larger eps or tolerance (rtol={self.rtol}, "
            f"atol={self.atol})."
        )


class _StepError(Exception):
    """The size of a step is not a number, because the field is not."""


class _System:
    """The field as torchdiffeq calls it."""

    def __init__(self, field: Field, low: float, high: float, watch: Watch | None) -> None:
        self.field = field
        self.low, self.high = low, high
        self.watch = watch
        self.time: Tensor | None = None

    def __call__(self, t: Tensor, state: State) -> State:
        # torchdiffeq rounds t to the state's data type, and probes the first step size beyond the
        # end of short intervals; neither may reach the field.
        if not bool(torch.isfinite(t)):
            raise _StepError
        self.time = t.double().clamp(self.low, self.high)
        return self.field(self.time, state)

    def callback_accept_step(self, t: Tensor, state: State, dt: Tensor) -> None:
        if self.watch is not None:
            self.watch(t.double().clamp(self.low, self.high), state)

    @property
    def last(self) -> float:
        """The last time at which the field was called."""
        return float("nan") if self.time is None else float(self.time)


def _worst_example(state: State) -> Tensor:
    """The norm of a step's error: the largest root mean square of any part of any example."""
    parts = [array.flatten(1).square().mean(1).amax() for array in state if array.numel()]
    return torch.stack(parts).amax().sqrt()
