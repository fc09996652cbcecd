"""Langevin dynamics at one noise level."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Conditioned
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler
from scoresde.streams import Purpose


@dataclass(frozen=True)
class LangevinDynamics(Sampler):
    r"""Langevin dynamics at the single time ``eps``, started from the prior.

    .. math:: x \leftarrow x + \delta \, \nabla_x \log p(x) + \sqrt{2 \delta} \, z

    It evaluates the score at one time only, so it suits a model trained at one noise level
    (:class:`~scoresde.loss.ExplicitScoreMatching`, :class:`~scoresde.loss.OneLevel`). The chain
    does not move between distant modes, so each keeps the share of samples that first reached it.
    On :math:`N(0, V)` it ends with the variance :math:`V / (1 - \delta / 2V)`.

    References:
        Roberts and Tweedie, *Exponential convergence of Langevin distributions and their discrete
        approximations*, 1996.

    Arguments:
        steps: Number of steps, positive.
        delta: Step size, in squared model units, positive; stable below twice the variance of the
            narrowest direction.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=[0.0, 1.0], std=0.5, sde=VPSDE())
        >>> int(LangevinDynamics(steps=10)(exact, shape=(4, 2), seed=0).nfe[0])
        10
    """

    steps: int = 2000
    delta: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if not 0 < self.delta < math.inf:
            raise InputError(
                f"delta must be positive and finite, got {self.delta}; a typical value is 5e-4."
            )

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        t = torch.tensor(eps, dtype=torch.float64, device=x.device)
        for i in range(self.steps):
            z = noise(x, Purpose.LANGEVIN, i)
            x = x + self.delta * field.score(x, t) + math.sqrt(2 * self.delta) * z
            x = report(t, x, self.steps)
        return FinalState(x)
