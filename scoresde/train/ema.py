r"""Moving averages of a model's weights, which give better samples than the weights.

.. math:: \bar\theta \leftarrow d_n \bar\theta + (1 - d_n) \theta

after :math:`n` updates. :class:`EMA` forgets exponentially; :class:`PowerEMA` weights the past by
a power of its time, so its length is a share of the training.
"""

import copy
import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scoresde.errors import InputError
from scoresde.model import Trainable
from scoresde.train.engine import own

LONGEST = 1 / math.sqrt(12)  # the length of the plain mean


class Average(ABC):
    """Base class for moving averages of a model's weights.

    Arguments:
        model: The model to average.
    """

    def __init__(self, model: Trainable) -> None:
        self.updates = 0
        self.source = model
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @abstractmethod
    def decay_at(self, n: int) -> float:
        """Returns the decay of the average at update ``n``, counted from 1."""

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's weights, and copies its buffers."""
        self.updates += 1
        move = get_ema_multi_avg_fn(self.decay_at(self.updates))
        move(_parameters(self.model), _parameters(self.source), self.updates)
        for buffer, new in zip(self.model.buffers(), self.source.buffers(), strict=True):
            buffer.copy_(new)


class EMA(Average):
    r"""The exponential moving average, :math:`d_n = \min(\text{decay}, (1 + n) / (10 + n))`.

    The second term removes the random initial weights in short runs.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (appendix H;
        the warm-up is that of its code).

    Arguments:
        model: The model to average.
        decay: The decay, in [0, 1).
    """

    def __init__(self, model: Trainable, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(
                f"decay must be in [0, 1), got {decay}; published values are 0.999 to 0.9999."
            )
        super().__init__(model)
        self.decay = decay

    def decay_at(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))


class PowerEMA(Average):
    r"""The power-function average, :math:`d_n = (1 - 1/n)^{\gamma + 1}`.

    After :math:`n` updates the weights of update :math:`i` count for
    :math:`(i^{\gamma+1} - (i-1)^{\gamma+1}) / n^{\gamma+1}`, which is the integral of

    .. math:: p_\gamma(\tau) = (\gamma + 1) \, \tau^\gamma / n^{\gamma + 1}

    over :math:`[i - 1, i]` (the product of the later decays telescopes). Its length is the
    standard deviation of :math:`p_\gamma`, as a share of :math:`n`.

    References:
        Karras et al., *Analyzing and improving the training dynamics of diffusion models*, 2024,
        https://arxiv.org/abs/2312.02696 (section 3.1).

    Arguments:
        model: The model to average.
        length: The length, in :math:`(0, 1/\sqrt{12}]`.
    """

    def __init__(self, model: Trainable, length: float = 0.1) -> None:
        super().__init__(model)
        self.length = length
        self.power = power_of_length(length)

    def decay_at(self, n: int) -> float:
        return (1 - 1 / n) ** (self.power + 1)


def power_of_length(length: float) -> float:
    r"""Returns the power :math:`\gamma` of an average of a length.

    The variance of :math:`p_\gamma` is :math:`(\gamma + 1) / ((\gamma + 2)^2 (\gamma + 3))`,
    so :math:`\gamma` is the largest root of
    :math:`\gamma^3 + 7 \gamma^2 + (16 - l^{-2}) \gamma + 12 - l^{-2}`.

    Raises:
        InputError: If there is no such root.
    """
    if (
        isinstance(length, bool)
        or not isinstance(length, int | float)
        or not 0 < length <= LONGEST
    ):
        raise InputError(
            # Six digits round the bound down.
            f"length must be a share of the training run in (0, {LONGEST:.6f}], got {length!r}; "
            "use 0.05 to 0.1."
        )
    inverse = length**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def _parameters(model: Trainable) -> list[Tensor]:
    return [own(p.data) for p in model.parameters()]
