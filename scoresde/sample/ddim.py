"""First-order methods: DDIM, and Euler's method on the probability flow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scoresde.errors import InputError
from scoresde.sample.plan import LinearUpdate, Node, PlannedSampler, Stage
from scoresde.sde import SDE


@dataclass(frozen=True)
class DDIM(PlannedSampler):
    r"""Denoising diffusion implicit models (DDIM): keep all or part of the noise, update the data.

    .. math::
        x_s = \alpha_s D + \sqrt{\sigma_s^2 - n^2} \, \hat z + n z, \qquad
        n = \eta \, \sigma_s \sqrt{1 - e^{-2h}}, \qquad h = \ell_s - \ell_t

    With :math:`\eta = 0` this is the exponential integrator of order 1 for the probability flow,
    on any grid: the predicted noise, and with it the denoised estimate, is constant over a step.
    With :math:`\eta = 1` it is the posterior :math:`q(x_s \mid x_t, x_0 = D)`, weak order 1.

    References:
        Song et al., *Denoising diffusion implicit models*, 2021,
        https://arxiv.org/abs/2010.02502 (equations 12 and 16).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in t by default.
        eta: Fraction :math:`\eta` of the noise that is redrawn, in [0, 1].
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta must be in [0, 1], got {self.eta}; 0 is deterministic.")

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        return [Stage(a, b, self._row(sde, a, b)) for a, b in pairwise(nodes)]

    def _row(self, sde: SDE, a: Node, b: Node) -> LinearUpdate:
        fresh = self.eta**2 * -math.expm1(-2 * (b.ell - a.ell))
        kept = b.sigma * math.sqrt(1 - fresh)
        if sde.zero_snr:  # the noise is (x - alpha data) / sigma
            share = kept / a.sigma
            row = LinearUpdate(share, (b.alpha - share * a.alpha,))
        else:
            scale = b.alpha / a.alpha  # the data are (x - sigma noise) / alpha
            row = LinearUpdate(scale, (kept - scale * a.sigma,))
        return row.then(1.0, b.sigma * math.sqrt(fresh))

    @property
    def convergence(self) -> int:
        """1, on any grid (weakly, if ``eta`` is positive)."""
        return 1


@dataclass(frozen=True)
class Euler(PlannedSampler):
    r"""Euler's method on the probability flow, in time.

    .. math:: x_s = x - h \left( f x + \frac{g^2}{2 \sigma} \hat z \right)

    The baseline: :class:`DDIM` costs the same and solves the linear part exactly.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 13).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in t by default.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        return [Stage(a, b, _euler(sde, a, b)) for a, b in pairwise(nodes)]

    @property
    def convergence(self) -> int:
        """1, on any grid."""
        return 1


def _euler(sde: SDE, a: Node, b: Node) -> LinearUpdate:
    if sde.zero_snr:
        h, signal, noise = (float(v) for v in (a.t - b.t, sde.alpha_dot(a.t), sde.sigma_dot(a.t)))
        share = noise / a.sigma
        return LinearUpdate(1 - h * share, (-h * (signal - share * a.alpha),))
    h, f, g = float(a.t - b.t), float(sde.f(a.t)), float(sde.g(a.t))
    return LinearUpdate(1 - h * f, (-0.5 * h * g**2 / a.sigma,))
