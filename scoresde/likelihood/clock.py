"""Clocks: integration variables for the probability flow."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE, Interpolant


class Clock(ABC):
    """Base class for integration variables of the flow, which are functions of time."""

    @abstractmethod
    def of(self, process: Interpolant, t: float) -> float:
        """Returns the clock's reading at a time in [0, 1]."""

    @abstractmethod
    def time(self, process: Interpolant, reading: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the times of readings, and their derivative; float64, of the same shape."""


@final
@dataclass(frozen=True)
class TimeClock(Clock):
    """The time itself."""

    def of(self, process: Interpolant, t: float) -> float:
        return t

    def time(self, process: Interpolant, reading: Tensor) -> tuple[Tensor, Tensor]:
        return reading, torch.ones_like(reading)


@final
@dataclass(frozen=True)
class NoiseClock(Clock):
    r"""The relative noise level, linear near the data and logarithmic far from it.

    .. math:: \tau = \operatorname{arsinh} \frac{\sigma}{\alpha \rho_0}

    The signal-to-noise ratio of the SDE must decrease throughout. If it falls to zero, the angle
    is used instead, which is bounded,

    .. math:: \tau = \arctan \frac{\sigma}{\alpha \rho_0}, \qquad
              \frac{dt}{d\tau} = \frac{\rho_0^2 \alpha^2 + \sigma^2}
              {\rho_0 (\sigma' \alpha - \sigma \alpha')} .

    For a process that is not an SDE, the clock is the time itself.

    Arguments:
        scale: The noise level :math:`\rho_0`, of the size of the data, positive.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InputError(
                f"scale must be positive and finite, got {self.scale}; the default is 0.5."
            )

    def of(self, process: Interpolant, t: float) -> float:
        if not isinstance(process, SDE):
            return t
        time = torch.tensor(t, dtype=torch.float64)
        if process.zero_snr:
            return math.atan2(float(process.sigma(time)), self.scale * float(process.alpha(time)))
        return math.asinh(math.exp(-0.5 * float(process.log_snr(time))) / self.scale)

    def time(self, process: Interpolant, reading: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(process, SDE):
            return reading, torch.ones_like(reading)
        if process.zero_snr:
            return self._time_by_angle(process, reading)
        t = process.time(-2 * torch.log(self.scale * torch.sinh(reading)))
        # Readings are rounded, and the time of the last must not leave the interval.
        t = t.clamp(0.0, 1.0)
        return t, 2 * (process.sigma(t) / process.g(t)) ** 2 / torch.tanh(reading)

    def _time_by_angle(self, sde: SDE, reading: Tensor) -> tuple[Tensor, Tensor]:
        t = sde.time(-2 * torch.log(self.scale * torch.tan(reading))).clamp(0.0, 1.0)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        turn = sde.sigma_dot(t) * alpha - sigma * sde.alpha_dot(t)
        return t, ((self.scale * alpha) ** 2 + sigma**2) / (self.scale * turn)
