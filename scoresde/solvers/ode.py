"""Adaptive solver for ordinary differential equations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.solvers.base import (
    Callback,
    Constraint,
    Control,
    Field,
    Method,
    Problem,
    Solution,
    State,
)
from scoresde.solvers.runge_kutta import BogackiShampine, DormandPrince, RungeKutta, Tsitouras
from scoresde.solvers.shared_step import TorchDiffEq

METHODS: dict[str, Method] = {
    "dopri5": DormandPrince(),
    "tsit5": Tsitouras(),
    "bosh3": BogackiShampine(),
    "dopri8": TorchDiffEq("dopri8"),
    "fehlberg2": TorchDiffEq("fehlberg2"),
    "adaptive_heun": TorchDiffEq("adaptive_heun"),
}


@dataclass(frozen=True)
class AdaptiveODE:
    """Solves dy/dt = v(t, y) from one time to another, forwards or backwards.

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        method: ODE method, an object or its short name. ``dopri5``, ``tsit5`` and ``bosh3`` use a
            step size per example; ``dopri8``, ``fehlberg2`` and ``adaptive_heun`` are
            torchdiffeq's, with one step size for the batch.
        max_steps: Largest number of steps per example, positive.
        strict: Whether a failed example raises an error. If False, it is flagged and becomes NaN.

    Raises:
        InputError: If an argument is out of range.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: Method | str = "dopri5"
    max_steps: int = 10_000
    strict: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.rtol < math.inf and 0 < self.atol < math.inf):
            raise InputError(
                f"rtol and atol must be positive and finite, got {self.rtol} and {self.atol}."
            )
        check_count("max_steps", self.max_steps)
        self._method()

    def _method(self) -> Method:
        if isinstance(self.method, Method):
            return self.method
        if self.method not in METHODS:
            raise InputError(
                f"method must be a Method or one of {', '.join(METHODS)}, got {self.method!r}."
            )
        return METHODS[self.method]

    def __call__(
        self,
        field: Field,
        state: State,
        start: float,
        end: float,
        callback: Callback | None = None,
        *,
        take: Callable[[Tensor], Field] | None = None,
        record: bool = False,
        constrain: Constraint | None = None,
        describe: Callable[[Tensor], str] | None = None,
    ) -> Solution:
        """Integrates a state.

        Arguments:
            field: Function of times, float64 with shape ``()`` or ``(B,)``, and a state that
                returns the derivative of the state. It is never called outside the interval.
            state: Arrays, each with shape ``(B, *)``.
            start: The time of the state.
            end: The time to reach.
            callback: Called with times and the state as the solution proceeds.
            take: Function that returns the field restricted to some examples, given their indices,
                so examples that have ended cost nothing. If None, the batch keeps its size.
            record: Whether to keep the times of all steps.
            constrain: As in :class:`~scoresde.solvers.base.Problem`.
            describe: Function that formats a time, ``()``, for an error message.

        Raises:
            SolverError: If ``strict`` and the step size underflows, the field is not finite, or
                there are too many steps. The message states the example and the time.
        """
        problem = Problem(field, state, float(start), float(end), take, callback, constrain)
        if describe is not None:
            problem = replace(problem, describe=describe)
        control = Control(self.rtol, self.atol, self.max_steps, self.strict, record)
        return self._method().solve(problem, control)

    @property
    def replays(self) -> RungeKutta:
        """The method, if it can integrate on recorded times.

        Raises:
            InputError: If the method does not support this.
        """
        method = self._method()
        if not isinstance(method, RungeKutta):
            raise InputError(
                "method must be 'dopri5', 'tsit5', 'bosh3' or another RungeKutta for a "
                f"differentiable solution, got {self.method!r}."
            )
        return method
