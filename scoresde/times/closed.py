"""Training times that include t = 1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE
from scoresde.times.densities import Times


@dataclass(frozen=True)
class ClosedTimes(Times):
    """Times uniform in [eps, 1], with an additional share exactly at t = 1.

    Sampling with a bridge starts at t = 1, where an error is not corrected by later steps, and a
    sampler with few steps evaluates few other times. This is a choice of emphasis: the weight of
    these times in the loss is 1.

    Arguments:
        share: The probability of t = 1, in [0, 1).

    Raises:
        InputError: If the share is outside [0, 1).

    Example:
        >>> import torch
        >>> from scoresde.sde import InDI
        >>> ClosedTimes(0.5).quantile(torch.tensor([0.25, 0.5, 0.9]), InDI(), 0.0)
        tensor([0.5000, 1.0000, 1.0000])
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0 <= self.share < 1:
            raise InputError(f"share must be in [0, 1), got {self.share}; a typical value is 0.1.")

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return eps + (1 - eps) * (u / (1 - self.share)).clamp(max=1.0)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)
