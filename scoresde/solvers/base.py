"""Interface of the ODE methods: problem, settings and solution."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scoresde.errors import SolverError

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]
Callback = Callable[[Tensor, State], None]
Constraint = Callable[[Tensor, State, int], State]


@dataclass(frozen=True)
class Problem:
    """An initial value problem for a batch of B examples.

    Arguments:
        field: Function of times, float64 with shape ``()`` or ``(B,)``, and a state that returns
            the derivative of the state.
        state: Arrays, each with shape ``(B, *)``.
        start: The time of the state.
        end: The time to reach.
        take: Function that returns the field restricted to some examples, given their indices,
            int64. If None, the batch keeps its size.
        callback: Called with times, ``()`` or ``(B,)``, and the state, before the first step and
            as the solution proceeds.
        constrain: Function that returns the replacement of a state at times, ``(B,)``, given the
            index of the attempted step. It is applied only to accepted examples. The batch then
            keeps its size, and no evaluation of the field is reused.
        describe: Function that formats a time, ``()``, for an error message.
    """

    field: Field
    state: State
    start: float
    end: float
    take: Callable[[Tensor], Field] | None = None
    callback: Callback | None = None
    constrain: Constraint | None = None
    describe: Callable[[Tensor], str] = lambda t: f"t = {float(t):.6g}"


@dataclass(frozen=True)
class Control:
    """Tolerances and limits of a solver.

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        max_steps: Largest number of steps per example.
        strict: Whether a failed example raises an error. If False, it becomes NaN and is flagged.
        record: Whether to keep the times of all steps.
    """

    rtol: float
    atol: float
    max_steps: int
    strict: bool = True
    record: bool = False


@dataclass(frozen=True)
class Solution:
    """Output of an ODE method.

    Arguments:
        state: The state at the end; NaN where ``failed``.
        evaluations: Number of evaluations of the field per example, int64 ``(B,)``.
        failed: Whether each example failed to reach the end, bool ``(B,)``.
        grid: The times of each example's steps, float64 ``(B, n + 1)``, if recorded.
    """

    state: State
    evaluations: Tensor
    failed: Tensor
    grid: Tensor | None = None


def failure(cause: str, where: str, control: Control) -> SolverError:
    """Returns the error for a failed solver."""
    return SolverError(
        f"The solver {cause} {where}. The field is not finite or too rough there; check the "
        f"model, or use a larger eps or tolerance (rtol={control.rtol}, atol={control.atol})."
    )


class Method(ABC):
    """Base class for methods that solve an ordinary differential equation to a tolerance."""

    @abstractmethod
    def solve(self, problem: Problem, control: Control) -> Solution:
        """Integrates a batch.

        Raises:
            SolverError: If ``control.strict`` and the step size of an example underflows, its
                field is not finite, or it takes too many steps.
        """
