"""Euler-Maruyama on the reverse SDE."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scoresde.sample.plan import Node, PlannedSampler, Stage
from scoresde.sample.predictors import EulerMaruyamaPredictor, Interval
from scoresde.sde import SDE


@dataclass(frozen=True)
class EulerMaruyama(PlannedSampler):
    r"""Euler-Maruyama on the reverse SDE: weak order 1, one network evaluation per step.

    .. math:: dx = (f x - g^2 \nabla_x \log p_t(x)) \, dt + g \, d\bar w

    The noise is additive, so the strong order is also 1.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 6); Maruyama, 1955.

    Arguments:
        steps: Number of steps, positive.
        grid: Spacing of the times; uniform in t by default.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.

    Example:
        >>> import torch
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
        >>> out = EulerMaruyama(steps=100)(exact, shape=(4, 2), seed=0)
        >>> out.x.shape, out.nfe
        (torch.Size([4, 2]), tensor([100, 100, 100, 100]))
    """

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        predictor = EulerMaruyamaPredictor()
        return [
            Stage(a, b, predictor.update(sde, Interval.of(sde, a.t, b.t)))
            for a, b in pairwise(nodes)
        ]

    @property
    def convergence(self) -> int:
        """1, weakly and along a path, on any grid."""
        return 1
