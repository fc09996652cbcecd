"""Grids of sampling times.

References:
    Karras et al. 2022, https://arxiv.org/abs/2206.00364 (equation 5).
"""

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.sde import SDE


class Grid(ABC):
    """Base class for grids of times, on which a sampler steps from 1 down to eps."""

    @abstractmethod
    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        """Maps positions in [0, 1] to times, float64: 0 to t = 1, and 1 to t = eps."""

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
    """Equally spaced times."""

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return 1 - (1 - eps) * u


@dataclass(frozen=True)
class LogSNRGrid(Grid):
    """Times equally spaced in the log-SNR; there must be some noise at ``eps``.

    If the SNR is zero at t = 1, they are equally spaced in the bounded variable b instead (see
    :class:`~scoresde.sde.SDE`).
    """

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        first, last = _log_snr_range(sde, eps)
        if math.isinf(first):
            raise InputError(
                f"eps must be a time with noise for LogSNRGrid(), got {eps} with {sde}; use a "
                "positive eps."
            )
        if sde.zero_snr:
            return sde.time_of_bounded(u * float(sde.bounded(torch.tensor(eps).double())))
        return sde.time(last + u * (first - last))


@dataclass(frozen=True)
class KarrasGrid(Grid):
    r"""Relative noise levels :math:`\tilde\sigma = \sigma / \alpha` spaced by a power.

    .. math:: \tilde\sigma_i^{1/\rho} = \tilde\sigma(1)^{1/\rho}
              + \tfrac{i}{N} (\tilde\sigma(\epsilon)^{1/\rho} - \tilde\sigma(1)^{1/\rho})

    A larger :math:`\rho` places more steps at low noise. :math:`\rho = 1` spaces the levels
    equally, and :math:`\rho \to \infty` spaces their logarithms equally (:class:`LogSNRGrid`).

    References:
        Karras et al. 2022, https://arxiv.org/abs/2206.00364 (equation 5).

    Arguments:
        rho: The power, at least 1.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise InputError(f"rho must be in [1, inf), got {self.rho}; the published value is 7.")

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        if sde.zero_snr:
            raise InputError(
                f"{self} requires a finite noise level sigma / alpha at t = 1, got infinity for "
                f"{sde}; use LogSNRGrid()."
            )
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
        power: The power, positive; above 1, the steps become finer towards ``eps``.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise InputError(
                f"power must be positive and finite, got {self.power}; use 2 for the quadratic "
                "grid."
            )

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return (1 + u * (eps ** (1 / self.power) - 1)) ** self.power


@dataclass(frozen=True)
class CosineGrid(Grid):
    r"""Times equally spaced in the angle between signal and noise.

    .. math:: \phi = \arctan \frac{\sigma}{\alpha \sigma_d}

    For a variance-preserving process, these are equal time steps of the cosine schedule,
    :math:`\alpha = \cos \phi`. In the log-SNR, the steps are finest where signal and noise are
    equally strong.

    References:
        Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672 (equation 17).

    Arguments:
        sigma_data: The standard deviation :math:`\sigma_d` of the data, positive.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise InputError(
                f"sigma_data must be positive and finite, got {self.sigma_data}; use the standard "
                "deviation of the data in model units (about 0.5 for images in [-1, 1])."
            )

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        low, high = (
            math.atan(math.exp(-0.5 * snr) / self.sigma_data) for snr in _log_snr_range(sde, eps)
        )
        levels = self.sigma_data * torch.tan(high + u * (low - high))
        return sde.time(-2 * torch.log(levels))


@dataclass(frozen=True)
class ExplicitGrid(Grid):
    """Explicit list of times.

    Arguments:
        times: The times, decreasing from 1 to the sampler's ``eps``, ``steps`` + 1 of them.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        times = tuple(float(t) for t in self.times)
        object.__setattr__(self, "times", times)
        falling = all(a > b for a, b in itertools.pairwise(times))
        if len(times) < 2 or not falling or times[0] != 1 or times[-1] < 0:
            raise InputError(f"times must decrease from 1 to a time in [0, 1), got {times}.")

    def interior(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        steps = len(self.times) - 1
        if len(u) != steps + 1 or self.times[-1] != eps:
            raise InputError(
                f"A grid of {steps + 1} explicit times requires steps={steps} and "
                f"eps={self.times[-1]}, got steps={len(u) - 1} and eps={eps}."
            )
        return torch.tensor(self.times, dtype=torch.float64)


@torch.no_grad()
def _log_snr_range(sde: SDE, eps: float) -> tuple[float, float]:
    """Returns the log-SNR at ``eps`` and at 1."""
    first, last = sde.log_snr(torch.tensor([eps, 1.0], dtype=torch.float64)).tolist()
    return first, last
