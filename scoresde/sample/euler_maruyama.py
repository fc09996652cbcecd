"""Euler-Maruyama on the reverse SDE: our own loop, and torchsde's solvers on the same equation."""

from dataclasses import dataclass

from torch import Tensor

from scoresde.model import Evaluations
from scoresde.sample.base import Arrival, GridSampler, Sampler, Watch
from scoresde.sample.predictors import EulerMaruyamaPredictor, Interval
from scoresde.solvers import FixedStepSDE
from scoresde.streams import Purpose, Streams


@dataclass(frozen=True)
class EulerMaruyama(GridSampler):
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

    def step(
        self, field: Evaluations, x: Tensor, t: Tensor, s: Tensor, i: int, streams: Streams
    ) -> Tensor:
        z = streams.normal(x.shape[1:], Purpose.DIFFUSION, i, x.dtype)
        return EulerMaruyamaPredictor()(field, x, Interval.of(field.sde, t, s), z)


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
        FixedStepSDE(self.steps, self.method)

    def _run(
        self, field: Evaluations, x: Tensor, eps: float, streams: Streams, watch: Watch
    ) -> Arrival:
        def drift(tau: Tensor, x: Tensor) -> Tensor:
            t = (1 - tau).clamp(eps, 1)
            watch(t, x)
            return -field.reverse_drift(x, t)

        def diffusion(tau: Tensor) -> Tensor:
            return field.sde.g((1 - tau).clamp(eps, 1))

        solver = FixedStepSDE(self.steps, self.method)
        return Arrival(solver(drift, diffusion, x, 1 - eps, streams))
