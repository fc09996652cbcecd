"""What every ODE method is given, and what it returns."""

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
        field: Maps times, float64 with shape ``()`` or ``(B,)``, and a state to its derivative.
        state: Arrays, each with shape ``(B, *)``.
        start: The time of the state.
        end: The time to reach.
        take: Returns the field of some examples alone, given their indices, int64; ``None``
            where no such field is known, and the batch keeps its size.
        callback: Called with times, ``()`` or ``(B,)``, and the state before the first step and as
            the solution proceeds.
        constrain: Returns what takes the place of a state at times, ``(B,)``, given the number of
            the attempted step. Then accepted examples alone are constrained, the batch keeps its
            size, and no evaluation of the field is used twice.
        describe: Puts a time, ``()``, into words for an error.
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
    """How carefully to solve.

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        max_steps: How many steps each example may take.
        strict: Whether an example that fails is an error, or becomes NaN and is flagged.
        record: Whether to keep the times of all steps.
    """

    rtol: float
    atol: float
    max_steps: int
    strict: bool = True
    record: bool = False


@dataclass(frozen=True)
class Solution:
    """The end of a solution.

    Arguments:
        state: The state at the end; NaN where ``failed``.
        evaluations: How often the field was evaluated for each example, int64 ``(B,)``.
        failed: Which examples did not reach the end, bool ``(B,)``.
        grid: The times of each example's steps, float64 ``(B, n + 1)``, if recorded.
    """

    state: State
    evaluations: Tensor
    failed: Tensor
    grid: Tensor | None = None


def failure(cause: str, where: str, control: Control) -> SolverError:
    """Returns the error of a solver that has failed."""
    return SolverError(
        f"The solver {cause} {where}. The field is too rough there or not finite; check the "
        f"model, or use a larger eps or tolerance (rtol={control.rtol}, atol={control.atol})."
    )


class Method(ABC):
    """Abstract method of solving an ordinary differential equation to a tolerance."""

    @abstractmethod
    def solve(self, problem: Problem, control: Control) -> Solution:
        """Integrates a batch.

        Raises:
            SolverError: If ``control.strict`` and the step size of an example underflows, its
                field is not finite, or it takes too many steps.
        """
