"""The numbers that a training's network computes in."""

import torch
from torch import Tensor

from scoresde.nn.speed import PRECISIONS

_LARGEST, _GROWTH = 2.0**16, 2000


class LossScale:
    r"""Keeps the gradients of a network that computes in float16 within its range.

    The loss is multiplied by a power of two, and the gradients divided by it: halved whenever a
    gradient overflows, doubled after 2000 steps without. In any other data type it is 1.

    It is torch's rule (``torch.amp.GradScaler``); but whether a gradient has overflowed is decided
    by the one norm that all processes share, so that none goes another way, and nothing is waited
    for.

    References:
        Micikevicius et al., *Mixed precision training*, 2018, https://arxiv.org/abs/1710.03740.

    Arguments:
        precision: The name of the data type.
        device: Where the gradients are.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.on = PRECISIONS[precision] is torch.float16
        # The scale, and how many steps have gone by without an overflow.
        self.state = torch.tensor([_LARGEST if self.on else 1.0, 0.0], device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss to take the gradient of."""
        return loss * self.state[0] if self.on else loss

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Adapts the scale after a step whose gradients were finite, or not."""
        if self.on:
            scale, steps = self.state
            steps = torch.where(good, steps + 1, 0.0)
            grow = steps >= _GROWTH
            scale = torch.where(good, scale * (1.0 + grow.float()), (scale / 2).clamp(min=1.0))
            self.state = torch.stack((scale, torch.where(grow, 0.0, steps)))

    def excuses(self, loss: Tensor) -> Tensor:
        """Whether an overflow is the scale's doing, as it is meant to be now and then."""
        return torch.isfinite(loss) & (self.state[0] > 1)
