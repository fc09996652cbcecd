r"""ODE methods of torchdiffeq, with one step size for the whole batch.

torchdiffeq integrates a batch as one system. A step is accepted by the largest error in the batch,
where the error of an example is a root mean square. So every example meets the tolerance, but the
steps depend on the other examples in the batch. At rtol = 1e-7 an example changes by less than
1e-5 when the others change (tested).

References:
    Chen, *torchdiffeq*, 2018.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.solvers.base import Control, Method, Problem, Solution, State, failure

NAMES = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@final
@dataclass(frozen=True)
class TorchDiffEq(Method):
    """An adaptive method of torchdiffeq; the step size is shared by the batch.

    Arguments:
        name: One of ``dopri5``, ``dopri8``, ``bosh3``, ``fehlberg2``, ``adaptive_heun``.

    Raises:
        InputError: If ``name`` is not one of these methods.
    """

    name: str = "dopri5"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"name must be one of {', '.join(NAMES)}, got {self.name!r}.")

    def solve(self, problem: Problem, control: Control) -> Solution:
        """Integrates a batch; a failed example always raises, since the step size is shared."""
        if control.record:
            raise InputError(
                f"method must record its steps for a differentiable solution, got {self}; use "
                "method='dopri5'."
            )
        if problem.constrain is not None:
            raise InputError(
                "method must have a step size per example to support a constraint, got "
                f"{self}; use method='dopri5'."
            )
        state, size, device = problem.state, len(problem.state[0]), problem.state[0].device
        system = _System(problem)
        if problem.start != problem.end:
            state = self._solve(system, problem, control)
        system.tell(problem.end, state)
        count = torch.full((size,), system.count, dtype=torch.int64, device=device)
        return Solution(state, count, torch.zeros_like(count, dtype=torch.bool))

    def _solve(self, system: "_System", problem: Problem, control: Control) -> State:
        import torchdiffeq  # slow to import, as it imports scipy

        times = torch.tensor(
            [problem.start, problem.end], dtype=torch.float64, device=problem.state[0].device
        )
        options = {
            # Without step_t the last step goes beyond the end, and the state there is
            # interpolated.
            "step_t": times[1:],
            "norm": _worst_example,
            "max_num_steps": control.max_steps,
        }
        try:
            solution = torchdiffeq.odeint(
                system,
                problem.state,
                times,
                rtol=control.rtol,
                atol=control.atol,
                method=self.name,
                options=options,
            )
        except (AssertionError, _StepError) as error:
            cause = (
                f"took more than {control.max_steps} steps"
                if "max_num_steps" in str(error)
                else "reached a step size of zero or a state that is not finite"
            )
            raise failure(cause, f"near {problem.describe(system.time)}", control) from error
        return tuple(array[-1] for array in solution)


class _StepError(Exception):
    """A step size is NaN because the field is NaN."""


class _System:
    """The field in torchdiffeq's interface."""

    def __init__(self, problem: Problem) -> None:
        self.field, self.callback = problem.field, problem.callback
        self.low, self.high = sorted((problem.start, problem.end))
        self.time = torch.tensor(problem.start, dtype=torch.float64)  # of the last call
        self.count = 0

    def __call__(self, t: Tensor, state: State) -> State:
        # torchdiffeq rounds t to the state's data type, and probes the first step size beyond the
        # end of short intervals; neither may reach the field.
        if not bool(torch.isfinite(t)):
            raise _StepError
        self.time = t.double().clamp(self.low, self.high)
        self.count += 1
        return self.field(self.time, state)

    def callback_accept_step(self, t: Tensor, state: State, dt: Tensor) -> None:
        self.tell(float(t), state)

    def tell(self, t: float, state: State) -> None:
        """Reports an intermediate time."""
        if self.callback is not None:
            time = torch.tensor(t, dtype=torch.float64)
            self.callback(time.clamp(self.low, self.high), state)


def _worst_example(state: State) -> Tensor:
    """Returns the norm of a step's error, the largest RMS of any part of any example."""
    parts = [array.flatten(1).square().mean(1).amax() for array in state if array.numel()]
    return torch.stack(parts).amax().sqrt()
