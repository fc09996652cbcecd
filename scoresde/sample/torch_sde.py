"""Solvers of torchsde for the reverse SDE."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import Conditioned
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler
from scoresde.sample.predictors import leave_zero_snr
from scoresde.solvers import Increments, Motion, SDESolver


@dataclass(frozen=True)
class TorchSDE(Sampler):
    r"""The reverse SDE, integrated by a solver of torchsde with fixed or adaptive steps.

    The solver runs in the increasing time :math:`\tau = 1 - t`, with the same seeds per sample.
    The batch shares adaptive steps, so a sample then depends slightly on the rest of the batch.
    For separate steps use :class:`~scoresde.sample.GottaGoFast`.

    Arguments:
        steps: Number of steps, positive; an adaptive solution starts with the step size for this
            number.
        method: One of ``euler``, ``milstein``, ``srk``, ``euler_heun``, ``heun``, ``midpoint``,
            ``log_ode``, ``reversible_heun`` (see :class:`~scoresde.solvers.SDESolver`).
        motion: Brownian motion: ``Increments()`` is the cheapest. ``Path()`` is the same path for
            any number of steps. torchsde's ``BrownianInterval()`` has no seeds per sample.
        adaptive: Whether to adapt the step size; requires a motion that is a path.
        rtol: Relative tolerance of an adaptive step, positive.
        atol: Absolute tolerance of an adaptive step, positive.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    steps: int = 1000
    method: str = "euler"
    motion: Motion = field(default_factory=Increments)
    adaptive: bool = False
    rtol: float = 1e-2
    atol: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.constraint is not None:
            raise InputError(
                "constraint must be None for TorchSDE, since torchsde does not expose its states, "
                f"got {self.constraint}; use EulerMaruyama or GottaGoFast."
            )
        self._solver()

    def _solver(self) -> SDESolver:
        return SDESolver(self.steps, self.method, self.motion, self.adaptive, self.rtol, self.atol)

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        steps, first = self.steps, 1.0
        if field.sde.zero_snr:  # where the reverse SDE has no coefficients at t = 1
            steps, first = steps - 1, 1 - (1 - eps) / steps
            x = leave_zero_snr(field, x, first, noise)
            report.tell(torch.tensor(first, dtype=torch.float64), x)
        if steps == 0:
            return FinalState(x)

        def drift(tau: Tensor, x: Tensor) -> Tensor:
            t = (first - tau).clamp(eps, first)
            report.tell(t, x)
            return -field.reverse_drift(x, t)

        def diffusion(tau: Tensor) -> Tensor:
            return noise.temperature * field.sde.g((first - tau).clamp(eps, first))

        solver = replace(self._solver(), steps=steps)
        return FinalState(solver(drift, diffusion, x, first - eps, noise.streams))
