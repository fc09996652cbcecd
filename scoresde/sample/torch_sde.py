"""The reverse SDE by torchsde's solvers."""

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
    r"""The reverse SDE by one of torchsde's solvers, with fixed or adaptive steps.

    It hands over :math:`\tau = 1 - t` as increasing time, with the same seeds per sample.
    Adaptive steps are shared by the batch, so that a sample then depends a little on its mates;
    for steps of its own take :class:`~scoresde.sample.GottaGoFast`.

    Arguments:
        steps: The number of steps, positive; of an adaptive solution, the first step is one of so
            many.
        method: One of ``euler``, ``milstein``, ``srk``, ``euler_heun``, ``heun``, ``midpoint``,
            ``log_ode``, ``reversible_heun`` (see :class:`~scoresde.solvers.SDESolver`).
        motion: The Brownian motion: ``Increments()``, the cheapest; ``Path()``, the same path at
            every number of steps; ``BrownianInterval()``, torchsde's own, which is not seeded by
            sample.
        adaptive: Whether the steps are chosen; needs a motion that is a path.
        rtol: The relative tolerance of an adaptive step, positive.
        atol: The absolute tolerance of an adaptive step, positive.
        eps: The time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the expected data there.
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
                "TorchSDE cannot take a constraint, as torchsde keeps its states; use "
                "EulerMaruyama or GottaGoFast."
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
