r"""Predictors: one step of the reverse process, from time t to the earlier time s.

All predictors need only :math:`\alpha` and :math:`\sigma` (and :math:`f, g`, which follow), and
the step of the forward process that they reverse, :math:`x_t = a x_s + \tau z`.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (sections 3.3, E and F).
    Ho et al., *Denoising diffusion probabilistic models*, 2020, equation 7.
    Kingma et al. 2021, https://arxiv.org/abs/2107.00630 (appendix A.4).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.likelihood import LearnedRange, Variance
from scoresde.model import Conditioned
from scoresde.sample.base import Noise
from scoresde.sample.plan import LinearUpdate
from scoresde.sde import SDE
from scoresde.streams import Purpose


@dataclass(frozen=True)
class Interval:
    r"""A step of the forward process, from the time s to the later t.

    Arguments:
        t: Later time, float64 ``()``.
        h: Length t - s of the step.
        a: Factor :math:`a` of :math:`x_t = a x_s + \tau z`.
        tau: Standard deviation :math:`\tau`.
        sigma_t: Standard deviation of the noise at t.
        sigma_s: Standard deviation of the noise at s.
    """

    t: Tensor
    h: float
    a: float
    tau: float
    sigma_t: float
    sigma_s: float

    @staticmethod
    def of(sde: SDE, t: Tensor, s: Tensor) -> "Interval":
        """Returns the exact step of a process."""
        parts = (t - s, *sde.transition(s, t), sde.sigma(t), sde.sigma(s))
        return Interval(t, *(float(part) for part in parts))


class Predictor(ABC):
    """Base class for steps of the reverse process with one network evaluation."""

    @abstractmethod
    def row(self, sde: SDE, step: Interval) -> LinearUpdate:
        """Returns the step's coefficients of the state, the predicted noise and the noise."""

    def update(self, sde: SDE, step: Interval) -> LinearUpdate:
        r"""Returns the step's update by the output that :meth:`PlannedSampler.evaluate` returns.

        From zero SNR the step is the posterior, :math:`x_s = \alpha_s D + \sigma_s z`, for every
        predictor: no other step has a limit there.
        """
        if not sde.zero_snr:
            return self.row(sde, step)
        if step.a < 1e-6:  # no signal, up to rounding
            return LinearUpdate(0.0, (float(sde.alpha(step.t - step.h)),), (step.sigma_s,))
        return self.row(sde, step).in_data(float(sde.alpha(step.t)), step.sigma_t)

    def __call__(self, field: Conditioned, x: Tensor, step: Interval, z: Tensor) -> Tensor:
        """Moves states ``(B, *)`` from ``t`` to ``s`` with the standard normal noise ``z``."""
        model = field.denoise if field.sde.zero_snr else field.noise
        return self.update(field.sde, step)(x, (model(x, step.t),), (z,))


def leave_zero_snr(field: Conditioned, x: Tensor, s: float, noise: Noise) -> Tensor:
    r"""Draws states at the time s that follows t = 1 from the posterior.

    .. math:: x_s = \alpha_s D(x_1, 1) + \sigma_s z
    """
    one, time = torch.ones((), dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    z = noise(x, Purpose.FIRST_STEP, 0)
    return field.sde.perturb(field.denoise(x, one), time, z)


@dataclass(frozen=True)
class EulerMaruyamaPredictor(Predictor):
    r"""Euler-Maruyama on the reverse SDE.

    .. math:: x_s = x - h \left( f x + \frac{g^2}{\sigma} \hat z \right) + g \sqrt{h} z
    """

    def row(self, sde: SDE, step: Interval) -> LinearUpdate:
        f, g = float(sde.f(step.t)), float(sde.g(step.t))
        drift = -step.h * g**2 / step.sigma_t
        return LinearUpdate(1 - step.h * f, (drift,), (g * math.sqrt(step.h),))


@dataclass(frozen=True)
class ReverseDiffusionPredictor(Predictor):
    r"""The reverse diffusion sampler, a direct reversal of the forward step.

    With :math:`x_t - x_s = (a - 1) x_s + \tau z` discretising the forward SDE,

    .. math:: x_s = x - (a - 1) x + \tau^2 \nabla_x \log p_t(x) + \tau z .

    References:
        Song et al. 2021, equation 46, with the exact transition as the discretisation.
    """

    def row(self, sde: SDE, step: Interval) -> LinearUpdate:
        return LinearUpdate(2 - step.a, (-(step.tau**2) / step.sigma_t,), (step.tau,))


@dataclass(frozen=True)
class AncestralPredictor(Predictor):
    r"""The posterior :math:`q(x_s \mid x_t, x_0)` with the denoised estimate for :math:`x_0`.

    .. math::
        x_s = \frac{x - (\tau^2 / \sigma_t) \hat z}{a}
            + \left( \frac{\sigma_s}{\sigma_t} \right)^{1 - v} \tau \, z

    It is Bayes' rule on two Gaussians (:meth:`scoresde.sde.SDE.posterior`), so it applies to every
    linear SDE, including sub-VP. For VP it is the ancestral sampling of DDPM, for VE that of SMLD.
    Two choices bound the correct variance: that of the posterior, exact for data at one point, and
    :math:`\tau^2`, DDPM's :math:`\beta_i`, exact for data :math:`N(0, I)`.

    References:
        Ho et al. 2020, section 3.2; Song et al. 2021, appendix F.
        Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672 (equation 15, the values
        between).

    Arguments:
        variance: Position :math:`v` between the two in the logarithm: :math:`v = 0` is the
            posterior's variance (DDPM's "fixed small"), 1 is :math:`\tau^2` ("fixed large"); in
            [0, 1].
    """

    variance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.variance <= 1:
            raise InputError(
                f"variance must be in [0, 1], got {self.variance}; use 0 for the variance of the "
                "posterior, 1 for the variance of the forward step."
            )

    def row(self, sde: SDE, step: Interval) -> LinearUpdate:
        share = (step.sigma_s / step.sigma_t) ** (1 - self.variance)
        of_noise = -(step.tau**2) / step.sigma_t
        return LinearUpdate(1 / step.a, (of_noise / step.a,), (share * step.tau,))


@dataclass(frozen=True)
class ChainPredictor(Predictor):
    r"""A step of the model's discrete chain, whose likelihood a :class:`DiscreteBound` bounds.

    .. math:: x_s = \mu(x, D) + \sqrt{v} \, z,

    with the mean of :meth:`scoresde.sde.SDE.posterior` at the denoised estimate, and a variance
    that may depend on the state and may be learned. On the times of a chain
    (``PredictorCorrector(steps=chain.steps - 1, predictor=ChainPredictor(), corrector=None)``) the
    samples have the law whose likelihood is bounded.

    References:
        Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672 (equation 15).

    Arguments:
        variance: The variance; by default that of the network's second head.
    """

    variance: Variance = field(default_factory=LearnedRange)

    def __post_init__(self) -> None:
        if not isinstance(self.variance, Variance):
            raise InputError(
                f"variance must be a Variance such as LearnedRange(), got {self.variance}; use "
                "AncestralPredictor for a number."
            )

    def row(self, sde: SDE, step: Interval) -> LinearUpdate:
        """Returns the linear part of the step, with the posterior's variance."""
        return AncestralPredictor().row(sde, step)

    def __call__(self, field: Conditioned, x: Tensor, step: Interval, z: Tensor) -> Tensor:
        t, s = step.t, step.t - step.h
        data, v = self.variance.step(field.model, x, t, s, **field.cond)
        mean, _ = field.sde.posterior(x, data, t, s)
        return mean + v.sqrt().to(x) * z
