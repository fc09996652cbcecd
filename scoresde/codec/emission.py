r"""Likelihoods of a VAE's decoder, :math:`p(x \mid z)` around the output of its network.

They use the formulas of the last step of a diffusion (:mod:`scoresde.codec.decoder`), with a scale
:math:`s` that is learned with the networks. A common mistake is a fixed scale of 1 for data of
unit size, with which a VAE ignores its latents.

References:
    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114 (appendix C).
    Rybkin et al., *Simple and effective VAE training with calibrated decoders*, 2021,
    https://arxiv.org/abs/2006.13202 (the learned scale).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoresde.codec.decoder import Decoder, DiscretisedGaussian, First, GaussianDecoder
from scoresde.errors import InputError
from scoresde.nn.basics import check_wholes
from scoresde.recipe import describable


class Emission(nn.Module, ABC):
    """Base class for the likelihood of an example around the output of a decoder.

    Arguments:
        std: The initial scale, positive, in model units.
        shape: The shape of the scales, which broadcasts to one example: ``()`` for one scale,
            ``(C, 1, 1)`` for one per channel, the shape of an example for one per value.
        learned: Whether the scale is learned.

    Attributes:
        levels: The number of levels of the data, or None for a density of real data.
    """

    levels: int | None = None

    def __init__(self, std: float, shape: Sequence[int], learned: bool) -> None:
        super().__init__()
        if not 0 < std < math.inf:
            raise InputError(f"std must be positive and finite, got {std}; 0.1 is usual.")
        start = torch.full(check_wholes("shape", shape), math.log(std))
        self.log_std = nn.Parameter(start, requires_grad=learned)

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """The decoder that computes the likelihood."""

    @property
    def std(self) -> Tensor:
        """The scale."""
        return self.log_std.exp()

    def seen(self, x: Tensor) -> Tensor:
        """Returns the encoder's input for examples, with levels at their centres."""
        return x

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x \mid z)` in nats.

        Arguments:
            x: Examples in model units, ``(B, *)``.
            mean: The output of the decoder's network, ``(B, *)``.

        Returns:
            Sums over the values of each example, ``(B,)``.
        """
        one, variance = torch.ones((), device=x.device), (2 * self.log_std).exp()
        first = First(mean, one, one, lambda: mean, variance)
        return self.decoder.log_prob(self.seen(x), first).to(mean)


@describable
class GaussianEmission(Emission):
    r"""The density :math:`N(x; D(z), s^2 I)` of real data.

    Arguments:
        std: The initial scale s, positive, in model units.
        shape: The shape of the scales, which broadcasts to one example; ``()`` for one scale.
        learned: Whether the scale is learned.
    """

    def __init__(self, std: float = 1.0, shape: Sequence[int] = (), learned: bool = True) -> None:
        super().__init__(std, shape, learned)

    @property
    def decoder(self) -> GaussianDecoder:
        return GaussianDecoder()


@describable
class LevelEmission(Emission):
    r"""The probability of levels, namely of their steps under :math:`N(D(z), s^2 I)`.

    Examples may be dequantised. Only the level in which they lie is used, and the encoder sees its
    centre.

    Arguments:
        levels: The number L of levels, in [2, 32768].
        std: The initial scale s, positive, in model units.
        shape: The shape of the scales, which broadcasts to one example; ``()`` for one scale.
        learned: Whether the scale is learned.
        low: The lower end of the lowest level's step, in model units.
        high: The upper end of the highest level's step.
    """

    def __init__(
        self,
        levels: int,
        std: float = 0.1,
        shape: Sequence[int] = (),
        learned: bool = True,
        low: float = -1.0,
        high: float = 1.0,
    ) -> None:
        super().__init__(std, shape, learned)
        self.formula = DiscretisedGaussian(levels, low, high)
        self.levels = levels

    @property
    def decoder(self) -> DiscretisedGaussian:
        return self.formula

    def seen(self, x: Tensor) -> Tensor:
        step, low = self.formula.step, self.formula.low
        level = ((x - low) / step).floor().clamp(0, self.formula.levels - 1)
        return low + (level + 0.5) * step
