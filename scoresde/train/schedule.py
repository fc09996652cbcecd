"""Learning-rate schedules: a factor on the optimiser's learning rate at each step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from scoresde.errors import InputError


@dataclass(frozen=True)
class Rate(ABC):
    """Base class for learning-rate schedules with a linear warm-up.

    Arguments:
        warmup: Number of steps over which the rate rises to its full value, at least 0.
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise InputError(f"warmup must be at least 0, got {self.warmup}.")

    def __call__(self, step: int, steps: int) -> float:
        """Returns the factor, in [0, 1], at a step counted from 0, out of ``steps``."""
        return min((step + 1) / (self.warmup + 1), 1.0) * self.after(step, steps)

    @abstractmethod
    def after(self, step: int, steps: int) -> float:
        """Returns the factor without the warm-up."""


@dataclass(frozen=True)
class ConstantRate(Rate):
    """The full rate after the warm-up."""

    def after(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class CosineRate(Rate):
    r"""A rate that falls to zero along half a cosine: :math:`\tfrac12 (1 + \cos \pi k / n)`."""

    def after(self, step: int, steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / steps))
