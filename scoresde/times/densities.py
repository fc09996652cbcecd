r"""Densities of training times.

A distribution of training times maps a uniform number :math:`u` to a time by its quantile
function. For any distribution :math:`p`, the loss is weighted by :math:`1 / ((1 - \epsilon)
p(t))`. So its expectation remains the average over uniform times in :math:`[\epsilon, 1]`, and
only its variance changes. The exception is :class:`LogNormalTimes`, which is a choice of emphasis.

**Importance sampling.** With the likelihood weighting, the noise error is weighted by :math:`g^2 /
\sigma^2`. If the error itself depends little on the time, the variance is smallest for :math:`p
\propto g^2 / \sigma^2`. Since :math:`g^2 = d \sigma^2 / dt - 2 f \sigma^2` and :math:`f = d \log
\alpha / dt`,

.. math:: \frac{g^2}{\sigma^2} = \frac{d \log \sigma^2}{dt} - 2 \frac{d \log \alpha}{dt}
          = -\frac{d \lambda}{dt}, \qquad \lambda = 2 \log \frac{\alpha}{\sigma},

so for *every* linear SDE this is the uniform distribution in the log-SNR. Its normaliser is
:math:`Z = \lambda(\epsilon) - \lambda(1)`, and its quantile function is the inverse of
:math:`\lambda`, which has a closed form for VP, sub-VP, VE and rectified flow. It needs no table
and no bisection.

References:
    Song et al., *Maximum likelihood training of score-based diffusion models*, 2021,
    https://arxiv.org/abs/2101.09258 (section 5.1).
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (appendix I.1, low-discrepancy times).
    Karras et al. 2022, https://arxiv.org/abs/2206.00364 (table 1).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.sde import SDE, Chain


class Times(ABC):
    """Base class for distributions of training times on [eps, 1]."""

    @abstractmethod
    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        """Maps uniform numbers in (0, 1), of any shape, to times in [eps, 1]."""

    @abstractmethod
    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        r"""Returns :math:`1 / ((1 - \epsilon) p(t))`, with the shape of ``t``."""

    def spread(self, u: Tensor) -> Tensor:
        """Transforms the uniform numbers ``(B,)`` of a batch; by default they stay independent."""
        return u


@dataclass(frozen=True)
class UniformTimes(Times):
    """Times uniform in [eps, 1]."""

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return eps + (1 - eps) * u

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class ImportanceTimes(Times):
    r"""Times with density proportional to :math:`g^2 / \sigma^2`, uniform in the log-SNR.

    If the SNR is zero at t = 1, they are uniform in the bounded variable b instead (see
    :class:`~scoresde.sde.SDE`).
    """

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        if sde.zero_snr:
            # Below t = 1, where the weight of the noise error is infinite and the error zero.
            return sde.time_of_bounded(_bounded_at(sde, eps, u) * (1 - u)).clamp(eps, 1 - 1e-12)
        first, last = _log_snr_range(sde, eps, u)
        return sde.time(first + u * (last - first)).clamp(eps, 1.0)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        if sde.zero_snr:
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            turn = alpha * sde.sigma_dot(t) - sigma * sde.alpha_dot(t)
            rate = 2 * turn / (sigma * torch.sqrt(alpha**2 + sigma**2))  # -db/dt
            return _bounded_at(sde, eps, t) / (1 - eps) / rate
        first, last = _log_snr_range(sde, eps, t)
        return (first - last) / (1 - eps) * (sde.sigma(t) / sde.g(t)) ** 2


@dataclass(frozen=True)
class LogNormalTimes(Times):
    r"""Relative noise levels :math:`\sigma / \alpha` with a log-normal distribution.

    .. math:: \log (\sigma / \alpha) = -\lambda / 2 \sim N(\mathrm{mean}, \mathrm{std}^2)

    truncated to the levels in [eps, 1]. It concentrates training on the levels at which images
    take shape. This is a choice of emphasis, not a correction: its weight is 1.

    Low noise is then rare, so a network learns little there. Samples do not need low noise, but
    the bound on the likelihood does. A tail draws a share of the times uniformly in the log-SNR,
    between the mean and the data.

    References:
        Karras et al. 2022, table 1.

    Arguments:
        mean: The mean of the logarithm.
        std: The standard deviation of the logarithm, positive.
        tail: The share of times in the tail, in [0, 1); 0 in the paper.
    """

    mean: float = -1.2
    std: float = 1.2
    tail: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise InputError(f"mean must be finite, got {self.mean}; the published value is -1.2.")
        if not 0 < self.std < math.inf:
            raise InputError(
                f"std must be positive and finite, got {self.std}; the published value is 1.2."
            )
        if not 0 <= self.tail < 1:
            raise InputError(f"tail must be in [0, 1), got {self.tail}; a typical value is 0.1.")

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        first, last = _log_snr_range(sde, eps, u)
        share = ((u.double() - self.tail) / (1 - self.tail)).clamp(min=0.0)
        low, high = (
            torch.special.ndtr((-0.5 * snr - self.mean) / self.std) for snr in (first, last)
        )
        z = torch.special.ndtri(low + share * (high - low))
        snr = -2 * (self.mean + self.std * z)
        if self.tail:
            part = u.double() / self.tail
            snr = torch.where(part < 1, first + part * (-2 * self.mean - first), snr)
        return sde.time(snr).clamp(eps, 1.0).to(u)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class ChainTimes(Times):
    r"""The N times :math:`(i + 1) / N` of a discrete chain, all equally likely.

    With the noise weighting this is the loss of DDPM, whose network never sees other times.

    References:
        Ho et al. 2020, https://arxiv.org/abs/2006.11239 (equation 14).
    """

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        if not isinstance(sde, Chain):
            raise InputError(
                f"ChainTimes requires a discrete chain such as DiscreteVP(), got {sde}."
            )
        return sde.time_of_index((u * sde.steps).floor().clamp(max=sde.steps - 1)).to(u)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LevelTimes(Times):
    r"""N equally spaced times from 0 to 1, both included, all equally likely.

    With a VE SDE these are the N geometric noise levels of SMLD. ``eps`` has no effect.

    References:
        Song and Ermon, *Generative modeling by estimating gradients of the data distribution*,
        2019, https://arxiv.org/abs/1907.05600 (equation 6).

    Arguments:
        levels: The number N of levels, at least 2.
    """

    levels: int = 1000

    def __post_init__(self) -> None:
        check_count("levels", self.levels)
        if self.levels < 2:
            raise InputError(f"levels must be at least 2, got {self.levels}.")

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return (u * self.levels).floor().clamp(max=self.levels - 1) / (self.levels - 1)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class FirstTime(Times):
    """Only the smallest time, ``eps``: a single noise level.

    A model trained with it is a score at this level. At other levels it is only the network's
    extrapolation.
    """

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.full_like(u, eps)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LowDiscrepancy(Times):
    r"""Covers the times of a batch evenly: :math:`u_i = (u_0 + i / n) \bmod 1`.

    Each :math:`u_i` is still uniform, so the loss keeps its expectation and has a smaller
    variance. The examples of a batch share :math:`u_0`.

    Arguments:
        times: The distribution to cover.
    """

    times: Times = field(default_factory=UniformTimes)

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return self.times.quantile(u, sde, eps)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return self.times.weight(t, sde, eps)

    def spread(self, u: Tensor) -> Tensor:
        return (u[0] + torch.arange(len(u), device=u.device, dtype=u.dtype) / len(u)) % 1


@dataclass(frozen=True)
class FoldedTimes(LowDiscrepancy):
    r"""Covers the times forwards and back: :math:`u_i = 1 - |2 ((u_0 + i / n) \bmod 1) - 1|`.

    The fold makes any function of time periodic. The average of a periodic function over a shifted
    grid has an error of :math:`O(n^{-2})` instead of :math:`O(n^{-1})`. Each :math:`u_i` is still
    uniform.

    References:
        Hickernell, *Obtaining O(N^(-2+e)) convergence for lattice quadrature rules*, 2002 (the
        baker's transform).
    """

    def spread(self, u: Tensor) -> Tensor:
        return 1 - (2 * super().spread(u) - 1).abs()


@torch.no_grad()
def _bounded_at(sde: SDE, eps: float, like: Tensor) -> Tensor:
    """Returns b at ``eps``, float64 ``()``, on the device of ``like``."""
    return sde.bounded(torch.full((), eps, dtype=torch.float64, device=like.device))


@torch.no_grad()
def _log_snr_range(sde: SDE, eps: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-SNR at ``eps`` and at 1, float64 ``()``, on the device of ``like``.

    They stay tensors, since a conversion would synchronise for a learned schedule on a GPU.
    """
    ends = torch.linspace(eps, 1.0, 2, dtype=torch.float64, device=like.device)
    first, last = sde.log_snr(ends).unbind()
    return first, last
