"""Annealed Langevin dynamics, which takes no step of the reverse process."""

from dataclasses import dataclass, field

from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import Conditioned
from scoresde.sample.base import GridSampler, Noise, ProgressReporter
from scoresde.sample.correctors import AnnealedLangevin, Corrector
from scoresde.sample.plan import Node
from scoresde.sample.predictors import Interval, leave_zero_snr
from scoresde.streams import Purpose
from scoresde.times import Grid, LogSNRGrid


@dataclass(frozen=True)
class AnnealedLangevinDynamics(GridSampler):
    r"""Annealed Langevin dynamics of NCSN: only Langevin steps, at every noise level.

    .. math:: x \leftarrow x + \delta \, \nabla_x \log p_t(x) + \sqrt{2 \delta} \, z, \qquad
              \delta = 2 (r \sigma)^2

    at each time of the grid, the first and the last included, and :math:`x \leftarrow (\alpha_s /
    \alpha_t) \, x` in between, so the data keep their scale where the process shrinks it. A target
    of variance V at a level ends with the variance :math:`V / (1 - \delta / 2V)`, if there are
    enough steps to forget the previous level.

    The published step :math:`\epsilon \sigma_i^2 / \sigma_L^2` is :math:`r^2 = \epsilon / (2
    \sigma_L^2)`: :math:`r = 0.316` for :math:`\epsilon = 2 \cdot 10^{-5}` and :math:`\sigma_L =
    0.01`, with ten levels and 100 steps at each.

    References:
        Song and Ermon, *Generative modeling by estimating gradients of the data distribution*,
        2019, https://arxiv.org/abs/1907.05600 (algorithm 1, as its code scales the step).

    Arguments:
        steps: The number of intervals between the levels, positive.
        grid: Spacing of the levels; geometric by default.
        langevin: The steps at each level and their number.
        eps: Time of the last level (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.

    Example:
        >>> from scoresde import GaussianModel, VESDE
        >>> exact = GaussianModel(mean=[0.0, 1.0], std=0.5, sde=VESDE(0.01, 1.0))
        >>> int(AnnealedLangevinDynamics()(exact, shape=(4, 2), seed=0).nfe[0])
        1000
    """

    steps: int = 9
    grid: Grid = field(default_factory=LogSNRGrid)
    langevin: Corrector = field(default_factory=lambda: AnnealedLangevin(0.316, 100))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.langevin, Corrector):
            raise InputError(
                f"langevin must be a Corrector such as AnnealedLangevin(), got {self.langevin}."
            )

    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        before, count = 1.0, int(self.langevin.steps)
        for i, node in enumerate(Node.of(field.sde, times)):
            if i > 0 and before < 1e-6 * node.alpha:
                x = leave_zero_snr(field, x, float(node.t), noise)
            elif i > 0:
                x = node.alpha / before * x
            before = node.alpha
            level = Interval(node.t, 0.0, 1.0, 0.0, node.sigma, node.sigma)
            for j in range(count):
                z = noise(x, Purpose.LANGEVIN, i * count + j)
                x = self.langevin(field, x, level, z)
            if i > 0:
                x = report(node.t, x, len(times) - 1)
        return x
