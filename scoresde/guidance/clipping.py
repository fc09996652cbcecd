r"""Models whose denoised estimate is kept in the range of the data.

The exact denoised estimate :math:`D(x, t)` of images in [-1, 1] lies in [-1, 1], since it is a
mean of images. A network's estimate may not, above all under strong guidance. If :math:`D'`
replaces it, Tweedie's formula gives the other views,

.. math:: \hat z' = \hat z + \frac\alpha\sigma (D - D'), \qquad
          s' = -\frac{\hat z'}{\sigma},

so it works with any sampler. The first form keeps every digit of :math:`\hat z` where nothing is
changed, even at the smallest noise. The changed score is no longer the score of a density: for
likelihoods use the model as it was trained.

References:
    Ho et al., *Denoising diffusion probabilistic models*, 2020 (clipping, in their code).
    Saharia et al., *Photorealistic text-to-image diffusion models with deep language
    understanding*, 2022, https://arxiv.org/abs/2205.11487 (section 2.3, dynamic thresholding).
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.guidance.base import Around, View, ask
from scoresde.model import ScoreFunction
from scoresde.sde import as_time
from scoresde.shapes import expand


class ChangedData(Around):
    """Base class for models whose denoised estimate is changed.

    Arguments:
        model: The score function to change.
    """

    @abstractmethod
    def change(self, data: Tensor) -> Tensor:
        """Returns the replacements for denoised estimates ``(B, *)``."""

    @abstractmethod
    def around(self, model: ScoreFunction) -> "ChangedData":
        """Returns the same change applied to another model."""

    def parts(
        self, view: View, x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[list[Tensor], Callable[..., Tensor]]:
        """Returns a view of the changed models, and a map from their denoised estimates to one.

        The view may be of several models; the first is the changed one.

        """
        return [ask(self.model, view, x, t, cond)], self.change

    def take(self, rows: Tensor) -> ScoreFunction:
        model = self.model.take(rows)
        assert isinstance(model, ScoreFunction)
        return self if model is self.model else self.around(model)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        data, change = self.parts("denoise", x, as_time(t), cond)
        return change(*data)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        t = as_time(t)
        alpha, sigma = (expand(part, x) for part in (self.sde.alpha(t), self.sde.sigma(t)))
        if self.sde.zero_snr:
            return (x - alpha * self.denoise(x, t, **cond)) / sigma
        noises, change = self.parts("noise", x, t, cond)
        data = [(x - sigma * noise) / alpha for noise in noises]
        return noises[0] + alpha / sigma * (data[0] - change(*data))

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return -self.noise(x, t, **cond) / expand(self.sde.sigma(as_time(t)), x)


class Clipped(ChangedData):
    """A model with a clipped denoised estimate.

    Arguments:
        model: The score function to change.
        low: The smallest value, in model units.
        high: The largest value, in model units, above ``low``.

    Raises:
        InputError: If the range is empty.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(torch.zeros(2), 1.0, VPSDE())
        >>> Clipped(exact).denoise(torch.tensor([[5.0, 0.0]]), torch.tensor(0.1))
        tensor([[1., 0.]])
    """

    def __init__(self, model: ScoreFunction, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(model)
        if not low < high:
            raise InputError(_empty(low, high))
        self.low, self.high = low, high

    def around(self, model: ScoreFunction) -> "Clipped":
        return Clipped(model, self.low, self.high)

    def change(self, data: Tensor) -> Tensor:
        return data.clamp(self.low, self.high)


class DynamicThreshold(ChangedData):
    r"""A model whose denoised estimate is scaled into the range of the data where it exceeds it.

    With :math:`s` the quantile of :math:`|D - c|` over the values of one example, where that lies
    above the half-width :math:`w` of the range around its middle :math:`c`, values beyond
    :math:`c \pm s` are clipped and the rest is scaled by :math:`w / s`.

    Arguments:
        model: The score function to change.
        quantile: Fraction of values that are not clipped, in (0, 1].
        low: The smallest value, in model units.
        high: The largest value, in model units, above ``low``.

    Raises:
        InputError: If the range is empty, or the quantile outside (0, 1].
    """

    def __init__(
        self, model: ScoreFunction, quantile: float = 0.995, low: float = -1.0, high: float = 1.0
    ) -> None:
        super().__init__(model)
        if not low < high:
            raise InputError(_empty(low, high))
        if not 0 < quantile <= 1:
            raise InputError(
                f"quantile must be in (0, 1], got {quantile}; a typical value is 0.995."
            )
        self.quantile = quantile
        self.range = low, high
        self.middle, self.width = 0.5 * (low + high), 0.5 * (high - low)

    def around(self, model: ScoreFunction) -> "DynamicThreshold":
        return DynamicThreshold(model, self.quantile, *self.range)

    def change(self, data: Tensor) -> Tensor:
        away = data - self.middle
        sizes = away.abs().flatten(1)
        rank = max(1, math.ceil(self.quantile * sizes.shape[1]))
        limit = expand(sizes.kthvalue(rank, 1).values.clamp(min=self.width), data)
        return self.middle + torch.clamp(away, -limit, limit) * (self.width / limit)


def _empty(low: float, high: float) -> str:
    return f"low must be less than high, got {low} and {high}; pass the range of the data."
