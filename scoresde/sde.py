r"""How data becomes noise: linear stochastic differential equations.

A forward process diffuses data :math:`x_0` into noise along :math:`t \in [0, 1]`,

.. math:: dx = f(t) \, x \, dt + g(t) \, dw .

It is linear in :math:`x`, so that its transition from :math:`x_0` is a Gaussian known exactly,

.. math:: x_t = \alpha(t) \, x_0 + \sigma(t) \, z, \qquad z \sim N(0, I),

and the pair :math:`(\alpha, \sigma)` says the same thing as the pair :math:`(f, g)`:

.. math:: f = \frac{d \log \alpha}{dt}, \qquad
          g^2 = \frac{d \sigma^2}{dt} - 2 f \sigma^2 = -\sigma^2 \frac{d \lambda}{dt},

where :math:`\lambda = 2 \log (\alpha / \sigma)` is the logarithm of the signal-to-noise ratio.
Run backwards, it turns noise into data: with the score :math:`\nabla_x \log p_t(x)`, the reverse
SDE and the probability-flow ODE

.. math:: dx = (f x - g^2 \nabla_x \log p_t(x)) \, dt + g \, d\bar w, \qquad
          \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

have the same marginals :math:`p_t` as the forward process.

Three processes are defined here. With :math:`B(t) = \beta_0 t + \tfrac12 (\beta_1 - \beta_0) t^2`:

======  ====================  =======================  ==========================
name    alpha                 sigma                    prior at t = 1
======  ====================  =======================  ==========================
VP      exp(-B/2)             sqrt(1 - exp(-B))        N(0, I)
subVP   exp(-B/2)             1 - exp(-B)              N(0, I)
VE      1                     smin (smax/smin)^t       N(0, smax^2 I)
======  ====================  =======================  ==========================

References:
    Song et al., *Score-based generative modeling through stochastic differential equations*,
    ICLR 2021, https://arxiv.org/abs/2011.13456 (equations 6, 13, and 28 to 33).
    Anderson, *Reverse-time diffusion equation models*, 1982.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.shapes import expand, log_normal

_BISECTIONS = 64


@dataclass(frozen=True)
class Cutoffs:
    r"""Where to stop before :math:`t = 0`, for each use on its own.

    The three uses differ: the sampling cut-off :math:`10^{-3}` of VP, kept for its images, would
    cost 0.41 bits/dim in a likelihood.

    Arguments:
        training: The smallest time that a loss draws, in [0, 1).
        sampling: Where a sampler stops, in [0, 1).
        likelihood: Where the likelihood starts, in [0, 1).
    """

    training: float = 1e-5
    sampling: float = 1e-3
    likelihood: float = 1e-5


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Differentiates a function of time at every element of ``t``."""
    return torch.func.grad(lambda s: function(s).sum())(t)


class SDE(ABC):
    r"""Abstract linear SDE: define :math:`\alpha` and :math:`\sigma`, and the rest follows.

    The methods of time take a tensor of any shape and return one of the same shape and data type
    (a plain number counts as float64), and have no branch that depends on data. A learned schedule
    is a class that is also a ``torch.nn.Module``.
    """

    cutoffs: ClassVar[Cutoffs] = Cutoffs()

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        r"""Returns the scale :math:`\alpha(t)` of the signal, positive."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        r"""Returns the standard deviation :math:`\sigma(t)` of the noise, non-negative."""

    def f(self, t: Tensor) -> Tensor:
        r"""Returns the drift coefficient :math:`f(t) = d \log \alpha / dt`."""
        return derivative(lambda s: torch.log(self.alpha(s)), as_time(t))

    def g(self, t: Tensor) -> Tensor:
        r"""Returns the diffusion coefficient :math:`g(t)`.

        .. math:: g^2 = d \sigma^2 / dt - 2 f \sigma^2
        """
        t = as_time(t)
        growth = derivative(lambda s: self.sigma(s) ** 2, t)
        return torch.sqrt(growth - 2 * self.f(t) * self.sigma(t) ** 2)

    def log_snr(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\lambda(t) = 2 \log (\alpha / \sigma)`, decreasing in time."""
        t = as_time(t)
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def time(self, log_snr: Tensor) -> Tensor:
        """Returns the time in [0, 1] at which the log-SNR has a value: by bisection here.

        The named SDEs invert in closed form.
        """
        target = as_time(log_snr)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            later = self.log_snr(middle) > target
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return 0.5 * (low + high)

    @property
    def prior_std(self) -> float:
        r"""The standard deviation of the prior :math:`N(0, \mathrm{std}^2 I)` at t = 1."""
        return float(self.sigma(torch.ones((), dtype=torch.float64)))

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the standard deviation of :math:`p(x_t \mid x_0)`.

        Arguments:
            x0: Clean data, with shape ``(B, *)``.
            t: Times in [0, 1], with shape ``()`` or ``(B,)``.

        Returns:
            The mean, with shape ``(B, *)``, and the standard deviation, which broadcasts to it.
        """
        t = as_time(t)
        return expand(self.alpha(t), x0) * x0, expand(self.sigma(t), x0)

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        r"""Returns :math:`\alpha(t) x_0 + \sigma(t) z`; shapes as in :meth:`marginal`."""
        mean, std = self.marginal(x0, t)
        return mean + std * noise

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draws samples of the prior, with shape ``shape``."""
        z = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
        return self.prior_std * z

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density of the prior in nats: ``(B, *)`` to ``(B,)``."""
        return log_normal(x, self.prior_std)

    def check_eps(self, eps: float) -> float:
        r"""Returns a cut-off if it can be used.

        Raises:
            InputError: If it is outside [0, 1), or 0 where :math:`\sigma(0) = 0` (the score is
                infinite there).
        """
        if not isinstance(eps, int | float) or not 0 <= eps < 1:
            raise InputError(
                f"eps={eps} is outside [0, 1); the default here is one of {self.cutoffs}."
            )
        if eps == 0 and float(self.sigma(torch.zeros((), dtype=torch.float64))) == 0:
            raise InputError(
                f"eps=0 cannot be used with {self}: its noise vanishes at t = 0 and the score is "
                f"infinite there; give a small positive eps, such as {self.cutoffs.training}."
            )
        return float(eps)


def as_time(t: Tensor | float) -> Tensor:
    """Turns a number into a float64 tensor; a tensor of floats passes as it is."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return t
    return torch.as_tensor(t, dtype=torch.float64)


@dataclass(frozen=True)
class _LinearRate(SDE):
    r"""What VP and sub-VP share: a rate linear in time, and with it the scale of the signal.

    .. math:: \beta(t) = \beta_0 + (\beta_1 - \beta_0) t, \qquad B(t) = \int_0^t \beta(s) \, ds
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise InputError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max}: they need "
                "0 < beta_min <= beta_max; the published values are 0.1 and 20."
            )

    def beta(self, t: Tensor) -> Tensor:
        r"""Returns the rate :math:`\beta(t)`."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integrated_beta(self, t: Tensor) -> Tensor:
        r"""Returns :math:`B(t)`."""
        t = as_time(t)
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time_of_integral(self, b: Tensor) -> Tensor:
        """Returns the root t of B(t) = b, in the form that loses no digits for small b."""
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

    Its noise vanishes as :math:`\sigma \approx \beta_0 t`, so that a cut-off of 1e-3 is already
    as exact as 1e-6 is for VP, while below it float32 no longer resolves the noise on the data.

    References:
        Song et al. 2021, equations 13 and 29.

    Arguments:
        beta_min: The rate :math:`\beta_0` at t = 0, positive.
        beta_max: The rate :math:`\beta_1` at t = 1, at least ``beta_min``.

    Example:
        >>> SubVPSDE().sigma(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.0000])
    """

    cutoffs: ClassVar[Cutoffs] = Cutoffs(training=1e-3, sampling=1e-3, likelihood=1e-3)

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

    cutoffs: ClassVar[Cutoffs] = Cutoffs(training=1e-5, sampling=1e-5, likelihood=0.0)

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: they need "
                "0 < sigma_min < sigma_max; the published values are 0.01 and 50."
            )

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
