"""The variables in which the probability flow is solved."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE


class Clock(ABC):
    """Abstract variable in which the flow is solved, a function of time."""

    @abstractmethod
    def of(self, sde: SDE, t: float) -> float:
        """Returns the clock's reading at a time in [0, 1]."""

    @abstractmethod
    def time(self, sde: SDE, reading: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the times of readings, and their derivative; float64, of the same shape."""


@final
@dataclass(frozen=True)
class TimeClock(Clock):
    """The time itself."""

    def of(self, sde: SDE, t: float) -> float:
        return t

    def time(self, sde: SDE, reading: Tensor) -> tuple[Tensor, Tensor]:
        return reading, torch.ones_like(reading)


@final
@dataclass(frozen=True)
class NoiseClock(Clock):
    r"""The relative noise level, linear near the data and logarithmic far from it.

    .. math:: \tau = \operatorname{arsinh} \frac{\sigma}{\alpha \rho_0}

    The signal-to-noise ratio of the SDE must fall all the way.

    Arguments:
        scale: The noise level :math:`\rho_0`, of the size of the data, positive.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InputError(f"scale={self.scale} is not positive; the default is 0.5.")

    def of(self, sde: SDE, t: float) -> float:
        log_snr = float(sde.log_snr(torch.tensor(t, dtype=torch.float64)))
        return math.asinh(math.exp(-0.5 * log_snr) / self.scale)

    def time(self, sde: SDE, reading: Tensor) -> tuple[Tensor, Tensor]:
        t = sde.time(-2 * torch.log(self.scale * torch.sinh(reading)))
        # A reading is rounded, and the time of the last must not leave the interval.
        t = t.clamp(0.0, 1.0)
        return t, 2 * (sde.sigma(t) / sde.g(t)) ** 2 / torch.tanh(reading)
