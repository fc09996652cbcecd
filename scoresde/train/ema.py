r"""The exponential moving average of a model's weights, which is what samples well.

.. math:: \bar\theta \leftarrow d \bar\theta + (1 - d) \theta, \qquad
          d = \min\left(\text{decay}, \frac{1 + n}{10 + n}\right)

after :math:`n` updates: the second term keeps the random start out of short trainings.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (appendix H;
    the warm-up is that of its code).
"""

import copy

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import ScoreFunction


class EMA:
    """A second copy of a model that follows the first.

    Arguments:
        model: The model to follow.
        decay: The decay, in [0, 1).
    """

    def __init__(self, model: ScoreFunction, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(
                f"ema={decay} is outside [0, 1); the published values are .999 to .9999."
            )
        self.decay = decay
        self.updates = 0
        self.source = model
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's weights, and copies its buffers."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, current = _parameters(self.model), _parameters(self.source)
        torch._foreach_lerp_(average, current, 1 - decay)
        for buffer, new in zip(self.model.buffers(), self.source.buffers(), strict=True):
            buffer.copy_(new)


def _parameters(model: ScoreFunction) -> list[Tensor]:
    return [p.data for p in model.parameters()]
