r"""Times: how training draws them, and the grids that samplers walk on.

A distribution of training times maps a uniform number :math:`u` to a time by its quantile
function. Whatever the distribution :math:`p`, the loss is weighted by :math:`1 / ((1 - \epsilon)
p(t))`, so that its expectation stays the average over uniform times in :math:`[\epsilon, 1]`, and
only its variance changes (but for :class:`LogNormalTimes`, which is a choice of emphasis).

**Importance sampling.** With the likelihood weighting the noise error is weighted by :math:`g^2 /
\sigma^2`; as long as that error itself depends little on the time, the variance is least for
:math:`p \propto g^2 / \sigma^2`. Since :math:`g^2 = d
\sigma^2 / dt - 2 f \sigma^2` and :math:`f = d \log \alpha / dt`,

.. math:: \frac{g^2}{\sigma^2} = \frac{d \log \sigma^2}{dt} - 2 \frac{d \log \alpha}{dt}
          = -\frac{d \lambda}{dt}, \qquad \lambda = 2 \log \frac{\alpha}{\sigma},

so for *every* linear SDE this is the uniform distribution in the log-SNR, its normaliser is
:math:`Z = \lambda(\epsilon) - \lambda(1)`, and its quantile function is the inverse of
:math:`\lambda`, closed for the named SDEs. No table and no bisection are needed.

References:
    Song et al., *Maximum likelihood training of score-based diffusion models*, 2021,
    https://arxiv.org/abs/2101.09258 (section 5.1).
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (appendix I.1, low-discrepancy times).
    Karras et al. 2022, https://arxiv.org/abs/2206.00364 (table 1).
"""

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.sde import SDE, DiscreteVP, as_time

# --- Distributions of training times -------------------------------------------------------------


class Times(ABC):
    """Abstract distribution of training times on [eps, 1]."""

    @abstractmethod
    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        """Maps uniform numbers in (0, 1) to times in [eps, 1]; any shape."""

    @abstractmethod
    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        r"""Returns :math:`1 / ((1 - \epsilon) p(t))`, with the shape of ``t``."""

    def spread(self, u: Tensor) -> Tensor:
        """Rearranges the uniform numbers ``(B,)`` of a batch; independent ones by default."""
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
    r"""Times with density proportional to :math:`g^2 / \sigma^2`: uniform in the log-SNR."""

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        first, last = _log_snr_range(sde, eps)
        return sde.time(first + u * (last - first)).clamp(eps, 1.0)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        first, last = _log_snr_range(sde, eps)
        return (first - last) / (1 - eps) * (sde.sigma(t) / sde.g(t)) ** 2


@dataclass(frozen=True)
class LogNormalTimes(Times):
    r"""Relative noise levels :math:`\sigma / \alpha` with a log-normal distribution.

    .. math:: \log (\sigma / \alpha) = -\lambda / 2 \sim N(\mathrm{mean}, \mathrm{std}^2)

    truncated to the levels that occur in [eps, 1]. It concentrates training where images take
    shape. This is a choice of emphasis, not a correction: its weight is 1.

    References:
        Karras et al. 2022, table 1.

    Arguments:
        mean: The mean of the logarithm.
        std: Its standard deviation, positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise InputError(f"std={self.std} is not positive; the published value is 1.2.")

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        first, last = (
            torch.special.ndtr(as_time((-0.5 * snr - self.mean) / self.std))
            for snr in _log_snr_range(sde, eps)
        )
        z = torch.special.ndtri(first + u.double() * (last - first))
        return sde.time(-2 * (self.mean + self.std * z)).clamp(eps, 1.0).to(u)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class ChainTimes(Times):
    r"""The N times :math:`(i + 1) / N` of a discrete chain, all equally likely.

    With the noise weighting this is the loss of DDPM, whose network never sees a time between.

    References:
        Ho et al. 2020, https://arxiv.org/abs/2006.11239 (equation 14).
    """

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        if not isinstance(sde, DiscreteVP):
            raise InputError(
                f"ChainTimes needs a discrete chain, such as DiscreteVP(), not {sde}."
            )
        return sde.time_of_index((u * sde.steps).floor().clamp(max=sde.steps - 1)).to(u)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LevelTimes(Times):
    r"""N equally spaced times from 0 to 1, both included, all equally likely.

    With a VE SDE these are the N geometric noise levels of SMLD. ``eps`` does not matter.

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
            raise InputError(f"levels={self.levels} leaves no two noise levels; give at least 2.")

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return (u * self.levels).floor().clamp(max=self.levels - 1) / (self.levels - 1)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LowDiscrepancy(Times):
    r"""Covers the times of a batch evenly: :math:`u_i = (u_0 + i / n) \bmod 1`.

    Each :math:`u_i` is still uniform, so that the loss keeps its expectation and loses variance.
    The examples of a batch share :math:`u_0`.

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


def _log_snr_range(sde: SDE, eps: float) -> tuple[float, float]:
    ends = sde.log_snr(torch.tensor([eps, 1.0], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


# --- Grids of sampling times ---------------------------------------------------------------------


class Grid(ABC):
    """Abstract grid of times, on which a sampler walks from 1 down to eps."""

    @abstractmethod
    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        """Maps positions in [0, 1] to times: 0 to time 1, and 1 to eps; float64."""

    def __call__(self, steps: int, sde: SDE, eps: float) -> Tensor:
        """Returns ``steps + 1`` times from 1 to ``eps``, both exact, float64, on the CPU.

        Raises:
            InputError: If ``steps`` is not a positive integer.
        """
        u = torch.linspace(0, 1, check_count("steps", steps) + 1, dtype=torch.float64)
        times = self.interior(u, sde, eps).clamp(eps, 1.0)
        times[0], times[-1] = 1.0, eps
        return times


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Times equally spaced."""

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return 1 - (1 - eps) * u


@dataclass(frozen=True)
class LogSNRGrid(Grid):
    """Times equally spaced in the log-SNR; ``eps`` must leave some noise."""

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        first, last = _log_snr_range(sde, eps)
        if math.isinf(first):
            raise InputError(f"eps={eps} leaves no noise with {sde}; give a positive eps.")
        return sde.time(last + u * (first - last))


@dataclass(frozen=True)
class KarrasGrid(Grid):
    r"""Relative noise levels :math:`\tilde\sigma = \sigma / \alpha` spaced by a power.

    .. math:: \tilde\sigma_i^{1/\rho} = \tilde\sigma(1)^{1/\rho}
              + \tfrac{i}{N} (\tilde\sigma(\epsilon)^{1/\rho} - \tilde\sigma(1)^{1/\rho})

    The larger :math:`\rho`, the more steps at low noise; 1 spaces the levels equally, and
    :math:`\rho \to \infty` their logarithms (:class:`LogSNRGrid`).

    References:
        Karras et al. 2022, https://arxiv.org/abs/2206.00364 (equation 5).

    Arguments:
        rho: The power, at least 1.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise InputError(f"rho={self.rho} is not in [1, inf); the published value is 7.")

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        low, high = (math.exp(-0.5 * snr / self.rho) for snr in _log_snr_range(sde, eps))
        return sde.time(-2 * self.rho * torch.log(high + u * (low - high)))


@dataclass(frozen=True)
class PowerGrid(Grid):
    r"""Times spaced by a power, :math:`t_i^{1/p} = 1 + \tfrac{i}{N} (\epsilon^{1/p} - 1)`.

    With :math:`p = 2` it is the quadratic grid of DDIM and of DEIS.

    References:
        Song et al., *Denoising diffusion implicit models*, 2021,
        https://arxiv.org/abs/2010.02502 (appendix D.2).

    Arguments:
        power: The power, positive; above 1 steps grow finer towards ``eps``.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise InputError(f"power={self.power} is not positive; 2 gives the quadratic grid.")

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return (1 + u * (eps ** (1 / self.power) - 1)) ** self.power


@dataclass(frozen=True)
class CosineGrid(Grid):
    r"""Equal steps of the angle between signal and noise.

    .. math:: \phi = \arctan \frac{\sigma}{\alpha \sigma_d}

    In a process that preserves the variance, these are equal steps in time of the cosine schedule,
    :math:`\alpha = \cos \phi`; steps are finest, in the log-SNR, where signal and noise are alike.

    References:
        Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672 (equation 17).

    Arguments:
        sigma_data: The standard deviation :math:`\sigma_d` of the data, positive.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise InputError(
                f"sigma_data={self.sigma_data} is not positive; give the standard deviation of "
                "the data in model units (about 0.5 for images in [-1, 1])."
            )

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        low, high = (
            math.atan(math.exp(-0.5 * snr) / self.sigma_data) for snr in _log_snr_range(sde, eps)
        )
        levels = self.sigma_data * torch.tan(high + u * (low - high))
        return sde.time(-2 * torch.log(levels))


@dataclass(frozen=True)
class ExplicitGrid(Grid):
    """Times as they are given.

    Arguments:
        times: The times, falling from 1 to the sampler's ``eps``; one more than its ``steps``.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        times = tuple(float(t) for t in self.times)
        object.__setattr__(self, "times", times)
        falling = all(a > b for a, b in itertools.pairwise(times))
        if len(times) < 2 or not falling or times[0] != 1 or times[-1] < 0:
            raise InputError(f"times={times} do not fall from 1 to a time in [0, 1); sort them.")

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        steps = len(self.times) - 1
        if len(u) != steps + 1 or self.times[-1] != eps:
            raise InputError(
                f"A sampler of steps={len(u) - 1} with eps={eps} does not fit the {steps + 1} "
                f"times of its grid; give steps={steps} and eps={self.times[-1]}."
            )
        return torch.tensor(self.times, dtype=torch.float64)
