"""A learned variance for steps of the reverse chain, between the two fixed variances."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.likelihood.variance import Variance, forward_variance, per_example
from scoresde.model import ScoreFunction, ScoreModel
from scoresde.sde import as_time


@final
@dataclass(frozen=True)
class LearnedRange(Variance):
    r"""The variance given by the second head :math:`F` of a network.

    .. math:: \log v = w \log \tau^2 + (1 - w) \log \frac{\sigma_s^2 \tau^2}{\sigma_t^2},
              \qquad w = \frac{F + 1}{2} .

    For F in [-1, 1] it lies between the two fixed variances, and for F = 0 it is their geometric
    mean. F is not restricted to this range.

    For the step to the data the lower variance is 0. Its variance is therefore not learned but the
    forward variance (the published code uses the lower variance of the second step as the lower
    end).

    References:
        Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672 (equation 15).

    Raises:
        InputError: When called, if the network has no second head.
    """

    def __call__(
        self, model: ScoreFunction, x: Tensor, t: Tensor, s: Tensor, **cond: Tensor
    ) -> Tensor:
        return self.step(model, x, t, s, **cond)[1]

    def step(
        self, model: ScoreFunction, x: Tensor, t: Tensor, s: Tensor, **cond: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(model, ScoreModel):
            raise InputError(
                f"model must be a ScoreModel for a learned variance, got {type(model).__name__}; "
                "use PosteriorVariance() or ForwardVariance()."
            )
        found = model.predict(x, t, **cond)
        return found.data, self.of_head(model, found.head, t, s)

    def of_head(self, model: ScoreFunction, head: Tensor | None, t: Tensor, s: Tensor) -> Tensor:
        """Returns the variance ``(B, *)`` given by the output of a second head.

        Arguments:
            model: The model.
            head: The output of the second head, with shape ``(B, *)``.
            t: The later times, with shape ``()`` or ``(B,)``.
            s: The earlier times, likewise.

        Raises:
            InputError: If ``head`` is None.
        """
        if head is None:
            raise InputError(
                "network must return twice the channels of its input for a learned variance, got "
                "the same number; use MLP(output_heads=2) or UNet(architecture=Architecture("
                "output_heads=2))."
            )
        ratio = torch.log(model.sde.sigma(as_time(s)) / model.sde.sigma(as_time(t)))
        forward = per_example(forward_variance(model, t, s), head)
        return forward * torch.exp((1 - head) * per_example(ratio, head))
