"""Loss scaling for training in float16."""

import torch
from torch import Tensor

from scoresde.nn.speed import PRECISIONS

_LARGEST, _GROWTH = 2.0**16, 2000


class LossScale:
    r"""Scale of the loss that keeps float16 gradients within their range.

    The loss is multiplied by the scale, a power of two, and the gradients are divided by it. The
    scale is halved whenever a gradient overflows and doubled after 2000 steps without overflow.
    In any other data type it is 1.

    This is torch's rule (``torch.amp.GradScaler``), except that the gradient norm shared by all
    processes decides on overflow. All processes therefore take the same decision, without waiting
    for the device.

    References:
        Micikevicius et al., *Mixed precision training*, 2018, https://arxiv.org/abs/1710.03740.

    Arguments:
        precision: The name of the data type.
        device: The device of the gradients.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.on = PRECISIONS[precision] is torch.float16
        # The scale, and the number of steps since the last overflow.
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
        """Returns whether an overflow is due to the scale, which is expected now and then."""
        return torch.isfinite(loss) & (self.state[0] > 1)
