"""A learned variance of a step of the reverse chain, between the two that need no data."""

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
    r"""The variance that the second head :math:`F` of a network says.

    .. math:: \log v = w \log \tau^2 + (1 - w) \log \frac{\sigma_s^2 \tau^2}{\sigma_t^2},
              \qquad w = \frac{F + 1}{2} .

    Between F = -1 and 1 it lies between the two fixed variances; a head of zeros is their
    geometric mean. Nothing keeps F in that range.

    The step to the data has no lower end, since its posterior variance is 0. Its variance is not
    learned: it is the forward one (the published code takes the lower end of the second step).

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
        """Returns the variance ``(B, *)`` that the output of a second head says.

        Arguments:
            model: The model.
            head: The output, with shape ``(B, *)``.
            t: The later times, with shape ``()`` or ``(B,)``.
            s: The earlier times, likewise.

        Raises:
            InputError: If there is none.
        """
        if head is None:
            raise InputError(
                "network must return twice the channels of its input for a learned variance, got "
                "as many; use MLP(output_heads=2) or UNet(architecture=Architecture("
                "output_heads=2))."
            )
        ratio = torch.log(model.sde.sigma(as_time(s)) / model.sde.sigma(as_time(t)))
        forward = per_example(forward_variance(model, t, s), head)
        return forward * torch.exp((1 - head) * per_example(ratio, head))
