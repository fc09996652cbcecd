"""Euler-Maruyama on the reverse SDE: our own loop, and torchsde's solvers on the same equation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from scoresde.model import Evaluations
from scoresde.sample.base import Arrival, Noise, Sampler, Watch
from scoresde.sample.plan import Move, Node, PlannedSampler
from scoresde.sample.predictors import EulerMaruyamaPredictor, Interval
from scoresde.sde import SDE
from scoresde.solvers import FixedStepSDE


@dataclass(frozen=True)
class EulerMaruyama(PlannedSampler):
    r"""The reverse SDE by Euler-Maruyama: weak order 1, one network pass a step.

    .. math:: dx = (f x - g^2 \nabla_x \log p_t(x)) \, dt + g \, d\bar w

    The noise is additive, so that the strong order is 1 too.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 6); Maruyama, 1955.

    Arguments:
        steps: The number of intervals, positive.
        grid: How they are spaced; uniform in time by default.
        eps: The time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the expected data there.

    Example:
        >>> import torch
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
        >>> out = EulerMaruyama(steps=100)(exact, shape=(4, 2), seed=0)
        >>> out.x.shape, out.nfe
        (torch.Size([4, 2]), tensor([100, 100, 100, 100]))
    """

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Move]:
        predictor = EulerMaruyamaPredictor()
        return [
            Move(a, b, predictor.row(sde, Interval.of(sde, a.t, b.t))) for a, b in pairwise(nodes)
        ]


@dataclass(frozen=True)
class TorchSDE(Sampler):
    r"""The reverse SDE by one of torchsde's fixed-step solvers.

    It hands over :math:`\tau = 1 - t` as increasing time, with the same seeds per sample. torchsde
    evaluates the drift once more to check shapes; that pass is counted.

    Arguments:
        steps: The number of steps, positive.
        method: One of ``euler``, ``milstein``, ``srk``, ``euler_heun``, ``heun``, ``midpoint``.
        eps: The time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the expected data there.
    """

    steps: int = 1000
    method: str = "euler"

    def __post_init__(self) -> None:
        super().__post_init__()
        FixedStepSDE(self.steps, self.method)

    def _run(
        self, field: Evaluations, x: Tensor, eps: float, noise: Noise, watch: Watch
    ) -> Arrival:
        def drift(tau: Tensor, x: Tensor) -> Tensor:
            t = (1 - tau).clamp(eps, 1)
            watch(t, x)
            return -field.reverse_drift(x, t)

        def diffusion(tau: Tensor) -> Tensor:
            return noise.temperature * field.sde.g((1 - tau).clamp(eps, 1))

        solver = FixedStepSDE(self.steps, self.method)
        return Arrival(solver(drift, diffusion, x, 1 - eps, noise.streams))
