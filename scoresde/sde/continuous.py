"""The three SDEs of Song et al. 2021, in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde.base import SDE
from scoresde.sde.interpolant import Cutoffs, as_time


@dataclass(frozen=True)
class _LinearRate(SDE):
    r"""Base class for VP and sub-VP: a rate linear in time, and the scale of the signal.

    .. math:: \beta(t) = \beta_0 + (\beta_1 - \beta_0) t, \qquad B(t) = \int_0^t \beta(s) \, ds
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise InputError(
                "beta_min and beta_max must satisfy 0 < beta_min <= beta_max < inf, got "
                f"{self.beta_min} and {self.beta_max}; the published values are 0.1 and 20."
            )

    def beta(self, t: Tensor) -> Tensor:
        r"""Returns the rate :math:`\beta(t)`."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integrated_beta(self, t: Tensor) -> Tensor:
        r"""Returns :math:`B(t)`."""
        t = as_time(t)
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time_of_integral(self, b: Tensor) -> Tensor:
        """Returns the root t of B(t) = b, in a form that is accurate for small b."""
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * b))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integrated_beta(t))

    def f(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    @property
    def prior_std(self) -> float:
        """The limit of infinite time: 1."""
        return 1.0


@dataclass(frozen=True)
class VPSDE(_LinearRate):
    r"""Variance-preserving SDE, the continuous form of DDPM.

    .. math::
        \beta(t) &= \beta_0 + (\beta_1 - \beta_0) t, \qquad f = -\tfrac12 \beta, \qquad
        g = \sqrt{\beta} \\
        \alpha &= e^{-B/2}, \qquad \sigma = \sqrt{1 - e^{-B}}, \qquad
        \lambda = -\log (e^{B} - 1)

    References:
        Song et al. 2021, equations 11, 29 and 33.

    Arguments:
        beta_min: The rate :math:`\beta_0` at t = 0, positive.
        beta_max: The rate :math:`\beta_1` at t = 1, at least ``beta_min``.

    Example:
        >>> sde = VPSDE()
        >>> sde.sigma(torch.tensor([0.0, 0.1, 1.0]))
        tensor([0.0000, 0.3221, 1.0000])
    """

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integrated_beta(t)
        return -b - torch.log(-torch.expm1(-b))

    def time(self, log_snr: Tensor) -> Tensor:
        r"""Inverts the log-SNR: :math:`B = \log(1 + e^{-\lambda})`."""
        b = torch.nn.functional.softplus(-as_time(log_snr), threshold=80.0)
        return self._time_of_integral(b)


@dataclass(frozen=True)
class SubVPSDE(_LinearRate):
    r"""Sub-variance-preserving SDE, whose variance is bounded by that of :class:`VPSDE`.

    .. math::
        f &= -\tfrac12 \beta, \qquad g = \sqrt{\beta (1 - e^{-2B})} \\
        \alpha &= e^{-B/2}, \qquad \sigma = 1 - e^{-B}, \qquad
        \lambda = -2 \log (2 \sinh \tfrac12 B)

    Its noise vanishes as :math:`\sigma \approx \beta_0 t`, so a cut-off of 1e-3 is as accurate as
    1e-6 for VP. Below this cut-off, float32 no longer resolves the noise on the data.

    References:
        Song et al. 2021, equations 13 and 29.

    Arguments:
        beta_min: The rate :math:`\beta_0` at t = 0, positive.
        beta_max: The rate :math:`\beta_1` at t = 1, at least ``beta_min``.

    Example:
        >>> SubVPSDE().sigma(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.0000])
    """

    @property
    def cutoffs(self) -> Cutoffs:
        """1e-3 for all uses."""
        return Cutoffs(training=1e-3, sampling=1e-3, likelihood=1e-3)

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integrated_beta(t))

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(-2 * self.integrated_beta(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integrated_beta(t)
        return -b - 2 * torch.log(-torch.expm1(-b))

    def time(self, log_snr: Tensor) -> Tensor:
        r"""Inverts the log-SNR: :math:`B = 2 \operatorname{asinh}(\tfrac12 e^{-\lambda/2})`."""
        b = 2 * torch.asinh(0.5 * torch.exp(-0.5 * as_time(log_snr)))
        return self._time_of_integral(b)


@dataclass(frozen=True)
class VESDE(SDE):
    r"""Variance-exploding SDE, the continuous form of SMLD.

    .. math::
        \alpha = 1, \qquad \sigma = \sigma_0 (\sigma_1 / \sigma_0)^t, \qquad f = 0, \qquad
        g = \sigma \sqrt{2 \log (\sigma_1 / \sigma_0)}, \qquad \lambda = -2 \log \sigma

    References:
        Song et al. 2021, equations 9, 29 and 31.

    Arguments:
        sigma_min: The noise :math:`\sigma_0` at t = 0, positive.
        sigma_max: The noise :math:`\sigma_1` at t = 1, above ``sigma_min``: about the largest
            distance between two examples.

    Example:
        >>> VESDE().sigma(torch.tensor([0.0, 1.0]))
        tensor([1.0000e-02, 5.0000e+01])
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                "sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got "
                f"{self.sigma_min} and {self.sigma_max}; the published values are 0.01 and 50."
            )

    @property
    def cutoffs(self) -> Cutoffs:
        """1e-5; 0 for the likelihood, since some noise is left at t = 0."""
        return Cutoffs(training=1e-5, sampling=1e-5, likelihood=0.0)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * as_time(t))

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(as_time(t))

    def g(self, t: Tensor) -> Tensor:
        return math.sqrt(2 * self._log_ratio) * self.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + self._log_ratio * as_time(t))

    def time(self, log_snr: Tensor) -> Tensor:
        r"""Inverts the log-SNR: :math:`\log \sigma = -\lambda / 2`."""
        return (-0.5 * as_time(log_snr) - math.log(self.sigma_min)) / self._log_ratio

    @property
    def prior_std(self) -> float:
        r"""The noise :math:`\sigma_1` at t = 1."""
        return self.sigma_max
