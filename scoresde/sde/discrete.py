r"""The discrete chain of DDPM, as a variance-preserving SDE that is exact at its N levels.

A chain adds noise in N steps, :math:`x_i = \sqrt{1 - \beta_i} \, x_{i-1} + \sqrt{\beta_i} \, z`
for :math:`i = 0, \ldots, N - 1`, so

.. math:: x_i = \sqrt{\bar\alpha_i} \, x_{data} + \sqrt{1 - \bar\alpha_i} \, z, \qquad
          \bar\alpha_i = \prod_{j \le i} (1 - \beta_j) .

Step :math:`i` ends at the time :math:`t_i = (i + 1) / N`, and the data are at t = 0. With

.. math:: B(t_i) = -\log \bar\alpha_i, \qquad B(0) = 0

any increasing :math:`B` between these times defines a VP SDE, :math:`\alpha = e^{-B/2}`,
:math:`\sigma = \sqrt{1 - e^{-B}}`, :math:`f = -B'/2`, :math:`g = \sqrt{B'}`, whose marginals *and
transitions* at the times :math:`t_i` are those of the chain. Here :math:`B` is the monotone cubic
interpolant. The rate :math:`B'` is then continuous, so an adaptive solver can integrate the
probability-flow ODE of a chain.

The chain of DDPM is not the VP SDE with the same rates of 0.1 and 20: at t = 0.01 their
:math:`\sigma` differ by 2.5 %.

References:
    Ho et al., *Denoising diffusion probabilistic models*, 2020, https://arxiv.org/abs/2006.11239.
    Nichol and Dhariwal, *Improved denoising diffusion probabilistic models*, 2021,
    https://arxiv.org/abs/2102.09672.
    Fritsch and Carlson, *Monotone piecewise cubic interpolation*, 1980.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.sde.base import SDE
from scoresde.sde.interpolant import Cutoffs, as_time


class Betas(ABC):
    r"""Base class for lists of the variances :math:`\beta_i` that the steps of a chain add."""

    @abstractmethod
    def __call__(self) -> np.ndarray:
        """Returns the list, float64 ``(N,)``."""


@dataclass(frozen=True)
class LinearBetas(Betas):
    r"""Variances that grow linearly from :math:`\beta_0 / N` to :math:`\beta_1 / N`.

    The defaults are DDPM's 1e-4 to 0.02 in 1000 steps.

    Arguments:
        beta_min: The rate :math:`\beta_0` of the first step per unit of time, positive.
        beta_max: The rate :math:`\beta_1` of the last step, at least ``beta_min``, below N.
        steps: The number N of steps, at least 2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    steps: int = 1000

    def __post_init__(self) -> None:
        check_count("steps", self.steps, "use the published 1000")
        if not 0 < self.beta_min <= self.beta_max < self.steps:
            raise InputError(
                "beta_min and beta_max must satisfy 0 < beta_min <= beta_max < steps, got "
                f"{self.beta_min}, {self.beta_max} and {self.steps} steps; the published values "
                "are 0.1, 20 and 1000."
            )

    def __call__(self) -> np.ndarray:
        return np.linspace(self.beta_min, self.beta_max, self.steps) / self.steps


@dataclass(frozen=True)
class CosineBetas(Betas):
    r"""Variances for which :math:`\bar\alpha` falls like a squared cosine.

    .. math:: \bar\alpha_i = \frac{c(t_i)}{c(0)}, \qquad
              c(t) = \cos^2 \left( \frac{\pi}{2} \frac{t + s}{1 + s} \right), \qquad
              \beta_i = \min \left( 1 - \frac{\bar\alpha_i}{\bar\alpha_{i-1}}, \,
              \beta_{max} \right)

    References:
        Nichol and Dhariwal 2021, equation 17.

    Arguments:
        steps: The number of steps.
        offset: The offset :math:`s`, positive, which keeps the first steps from being too small.
        limit: The largest variance, in (0, 1).
    """

    steps: int = 1000
    offset: float = 0.008
    limit: float = 0.999

    def __post_init__(self) -> None:
        check_count("steps", self.steps, "use the published 1000")
        if not (self.offset > 0 and 0 < self.limit < 1):
            raise InputError(
                f"offset must be positive and limit in (0, 1), got {self.offset} and "
                f"{self.limit}; the published values are 0.008 and 0.999."
            )

    def __call__(self) -> np.ndarray:
        t = np.arange(self.steps + 1) / self.steps
        signal = np.cos(0.5 * math.pi * (t + self.offset) / (1 + self.offset)) ** 2
        return np.minimum(1 - signal[1:] / signal[:-1], self.limit)


@dataclass(frozen=True)
class ListedBetas(Betas):
    r"""Variances given explicitly.

    Arguments:
        values: The variances :math:`\beta_i`, at least two, each in (0, 1).
    """

    values: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(map(float, self.values)))

    def __call__(self) -> np.ndarray:
        return np.array(self.values)


@dataclass(frozen=True)
class Chain(SDE):
    """Base class for discrete chains of N levels as SDEs, exact at the levels, smooth between.

    Level i, counted from 0, is reached at the time (i + 1) / N.

    Arguments:
        betas: The variances of the steps; DDPM's linear ones by default.

    Raises:
        InputError: If there are fewer than two variances, or one is outside (0, 1).
    """

    betas: Betas = field(default_factory=LinearBetas)

    def __post_init__(self) -> None:
        if not isinstance(self.betas, Betas):
            raise InputError(
                "betas must be a Betas such as LinearBetas(), CosineBetas() or "
                f"ListedBetas([...]), got {type(self.betas).__name__}."
            )
        betas = self.betas()
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            span = f" from {betas.min():.4g} to {betas.max():.4g}" if betas.size else ""
            raise InputError(
                "betas must have shape (N,), N at least 2, and values in (0, 1), got shape "
                f"{betas.shape}{span}."
            )

    @property
    def steps(self) -> int:
        """The number N of steps."""
        return self._cubics.shape[1]

    @property
    def cutoffs(self) -> Cutoffs:
        """The end of the first step for training and sampling; below it a chain has no level."""
        first = 1 / self.steps
        return Cutoffs(training=first, sampling=first, likelihood=first)

    def index(self, t: Tensor) -> Tensor:
        """Returns the index of the level at a time, t N - 1; an integer at each level."""
        return as_time(t) * self.steps - 1

    def time_of_index(self, i: Tensor) -> Tensor:
        """Returns the time at which step ``i`` ends, (i + 1) / N, float64."""
        return (torch.as_tensor(i).double() + 1) / self.steps

    @property
    def prior_std(self) -> float:
        """The limit of many steps: 1."""
        return 1.0

    @abstractmethod
    def _levels(self) -> np.ndarray:
        """Returns the values to interpolate at the levels, from t = 0, float64 ``(N + 1,)``."""

    def _value(self, t: Tensor) -> Tensor:
        """Returns the interpolant."""
        (c3, c2, c1, c0), u = self._cell(as_time(t))
        return c0 + u * (c1 + u * (c2 + u * c3))

    def _slope(self, t: Tensor) -> Tensor:
        """Returns the interpolant's derivative in time."""
        (c3, c2, c1, _), u = self._cell(as_time(t))
        return self.steps * (c1 + u * (2 * c2 + 3 * u * c3))

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cubic for each time, ``(4, *)``, and the position in its step, in [0, 1]."""
        position = t * self.steps
        cell = position.detach().floor().clamp(0, self.steps - 1)
        return self._on(t.device)[:, cell.long()].to(t.dtype), position - cell

    @cached_property
    def _cubics(self) -> Tensor:
        """The coefficients of each step's cubic, highest power first, float64 ``(4, N)``."""
        from scipy.interpolate import PchipInterpolator  # slow to import

        levels = self._levels()
        return torch.from_numpy(PchipInterpolator(np.arange(len(levels)), levels).c.copy())

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def _on(self, device: torch.device) -> Tensor:
        """Returns the table on a device; it is copied there once."""
        if device not in self._copies:
            self._copies[device] = self._cubics.to(device)
        return self._copies[device]


@dataclass(frozen=True)
class DiscreteVP(Chain):
    r"""The chain of DDPM as an SDE; arguments as for :class:`Chain`.

    Example:
        >>> sde = DiscreteVP()
        >>> sde.steps, sde.index(torch.tensor(0.01))
        (1000, tensor(9.))
        >>> sde.sigma(torch.tensor([0.0, 0.01, 1.0]))
        tensor([0.0000, 0.0435, 1.0000])
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integrated_beta(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))

    def f(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integrated_beta(t)
        return -b - torch.log(-torch.expm1(-b))

    def integrated_beta(self, t: Tensor) -> Tensor:
        r"""Returns :math:`B(t)`, which is :math:`-\log \bar\alpha_i` at the end of step i."""
        return self._value(t)

    def beta(self, t: Tensor) -> Tensor:
        r"""Returns the rate :math:`B'(t)` per unit of time, positive."""
        return self._slope(t)

    def _levels(self) -> np.ndarray:
        return np.concatenate(([0.0], -np.log1p(-self.betas()).cumsum()))


@dataclass(frozen=True)
class ZeroSNRChain(Chain):
    r"""A chain with zero SNR at its last level, obtained by rescaling the variances.

    .. math:: \sqrt{\bar\alpha_i'} = \sqrt{\bar\alpha_0} \,
              \frac{\sqrt{\bar\alpha_i} - \sqrt{\bar\alpha_{N-1}}}
              {\sqrt{\bar\alpha_0} - \sqrt{\bar\alpha_{N-1}}}

    keeps the first level and moves the last to zero. Between the levels the angle :math:`\psi =
    \arctan (\alpha / \sigma)`, which falls from :math:`\pi / 2` to 0, is a monotone cubic, and
    :math:`\alpha = \sin \psi`, :math:`\sigma = \cos \psi`. See :class:`~scoresde.sde.SDE` for zero
    SNR; arguments as for :class:`Chain`.

    References:
        Lin et al., *Common diffusion noise schedules and sample steps are flawed*, 2024,
        https://arxiv.org/abs/2305.08891 (algorithm 1).

    Example:
        >>> sde = ZeroSNRChain()
        >>> float(sde.alpha(1.0)), float(sde.sigma(1.0))
        (0.0, 1.0)
    """

    zero_snr = True

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._value(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(self._value(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.cos(self._value(t)) * self._slope(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.sin(self._value(t)) * self._slope(t)

    def f(self, t: Tensor) -> Tensor:
        return self._slope(t) / torch.tan(self._value(t))

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(-2 * self._slope(t) / torch.tan(self._value(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.log(torch.tan(self._value(t)))

    def _levels(self) -> np.ndarray:
        signal = np.exp(0.5 * np.log1p(-self.betas()).cumsum())
        signal = signal[0] * (signal - signal[-1]) / (signal[0] - signal[-1])
        return np.concatenate(([0.5 * math.pi], np.arcsin(signal)))
