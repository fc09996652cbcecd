r"""Decoders: the probability of the data given the first state of a diffusion.

A diffusion model ends a little before the data, at a first time with
:math:`z = \alpha x + \sigma \epsilon`. The last step :math:`p(x \mid z)` is the distribution of
the data given this state. For data on :math:`L` levels it is a probability, and bounds then apply
to the probability of the levels, without dequantisation. For real data it is a density.

References:
    Ho et al., *Denoising diffusion probabilistic models*, 2020, https://arxiv.org/abs/2006.11239
    (equation 13).
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (section 3.3).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.codec.levels import check_levels
from scoresde.errors import InputError
from scoresde.sde import SDE
from scoresde.shapes import check_data, expand, sum_features

_OFF_CENTRE = 0.05  # largest distance of a level from its centre due to float32, in steps


@dataclass(frozen=True, eq=False)
class First:
    r"""The first state of a diffusion, with the values that a decoder may use.

    Arguments:
        x: The state :math:`z`, with shape ``(B, *)``.
        alpha: The scale of the signal in the state, ``()`` or ``(B,)``.
        sigma: The standard deviation of its noise, ``()`` or ``(B,)``.
        denoise: Function that returns the denoised data :math:`D(z)`, with shape ``(B, *)``, from
            one pass.
        variance: The variance of a Gaussian last step; it broadcasts to the state.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    denoise: Callable[[], Tensor]
    variance: Tensor

    @staticmethod
    def of(
        sde: SDE,
        x: Tensor,
        t: Tensor,
        denoise: Callable[[], Tensor],
        variance: Tensor | None = None,
    ) -> "First":
        r"""Returns the first state at a time; the variance is :math:`\sigma_t^2` by default."""
        alpha, sigma = (c(t).to(x.device) for c in (sde.alpha, sde.sigma))
        forward = expand(sigma**2, x.double())
        return First(x, alpha, sigma, denoise, forward if variance is None else variance)


class Decoder(ABC):
    """Base class for the last step of a diffusion, from its first state to the data.

    Attributes:
        levels: The number of levels of the data, or None for real data.
    """

    levels: int | None = None

    @abstractmethod
    def log_prob(self, x: Tensor, first: First) -> Tensor:
        """Returns the log-probability of levels, or the log-density of real data.

        Arguments:
            x: Data in model units, with shape ``(B, *)``; levels lie at their centres.
            first: The first state of each example.

        Returns:
            Nats, with shape ``(B,)``.
        """

    def centre(self, x: Tensor) -> Tensor:
        """Returns values on levels moved to the nearest centre, and real data unchanged."""
        return x

    def check(self, x: Tensor) -> None:
        """Checks that data can be decoded.

        Raises:
            InputError: If they are not finite, or not at the centres of the levels.
        """
        check_data(x)


@dataclass(frozen=True)
class _OnLevels(Decoder):
    """Base class for decoders over L equal steps in a range.

    Arguments:
        levels: The number L of levels, in [2, 32768].
        low: The lower end of the lowest level's step, in model units.
        high: The upper end of the highest level's step.
    """

    # The default matches the annotation of the base class; a number of levels is always given.
    levels: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(
                f"low and high must be finite, with low < high, got {self.low} and {self.high}; "
                "levels of images usually fill [-1, 1]."
            )

    @property
    def step(self) -> float:
        """The distance between neighbouring levels in model units."""
        return (self.high - self.low) / self.levels

    def place(self, x: Tensor) -> Tensor:
        """Returns the level of each value as a real number, integer at the centres."""
        return (x - self.low) / self.step - 0.5

    def centre(self, x: Tensor) -> Tensor:
        level = self.place(x).round().clamp(0, self.levels - 1)
        return self.low + (level + 0.5) * self.step

    def check(self, x: Tensor) -> None:
        super().check(x)
        place = self.place(x)
        off = (place - place.round().clamp(0, self.levels - 1)).abs()
        if bool((off > _OFF_CENTRE).any()):
            raise InputError(
                f"x must lie at the centres of {self.levels} levels in [{self.low:.4g}, "
                f"{self.high:.4g}], got {float(x.flatten()[off.argmax()]):.6g}; use "
                "data.encode(raw, centre=True), without dequantisation."
            )


@final
@dataclass(frozen=True)
class Levels(_OnLevels):
    r"""A softmax over the centres :math:`c_k` of the levels, which depends only on the state.

    .. math:: p(x = c_k \mid z) \propto
              \exp \left( -\frac{\alpha^2}{2 \sigma^2} (z / \alpha - c_k)^2 \right)

    This is the posterior of a level if all levels are equally probable. If the noise is well below
    the step, no decoder is better. It needs no network pass, and memory for L numbers per value.

    References:
        Kingma et al. 2021 (section 3.3).

    Example:
        >>> x = torch.tensor([[-0.5], [0.5]])
        >>> first = First(x, torch.tensor(1.0), torch.tensor(0.5), lambda: x, torch.tensor(0.25))
        >>> Levels(2).log_prob(x, first).exp()
        tensor([0.8808, 0.8808])
    """

    def log_prob(self, x: Tensor, first: First) -> Tensor:
        # In float64 until here, regardless of the type of the state.
        k = torch.arange(self.levels, device=x.device, dtype=torch.float64)
        centres = (self.low + (k + 0.5) * self.step).to(first.x)
        away = (first.x / expand(first.alpha, x)).unsqueeze(-1) - centres
        logits = -0.5 * (away * expand(first.alpha / first.sigma, away)).square()
        own = self.place(x).round().clamp(0, self.levels - 1).long()
        found = logits.log_softmax(-1).gather(-1, own.unsqueeze(-1))
        return sum_features(found.squeeze(-1))


@final
@dataclass(frozen=True)
class DiscretisedGaussian(_OnLevels):
    r"""The probability of a level's step under a Gaussian around the denoised data.

    .. math:: p(x = c_k \mid z) = \Phi\left(\frac{c_k + h - D}{s}\right)
              - \Phi\left(\frac{c_k - h - D}{s}\right) ,

    where :math:`h` is half a step, the lowest step begins at :math:`-\infty` and the highest ends
    at :math:`\infty`. The difference is computed from logarithms of :math:`\Phi` in float64,
    because far from :math:`D` both values are tiny.

    References:
        Ho et al. 2020 (equation 13). In the paper the levels include -1 and 1, and h = 1 / (L - 1)
        (:meth:`reference`). Here the L steps fill the range, with levels at their centres, and
        ``h = 1 / L``.

    Example:
        >>> x = torch.tensor([[-0.5], [0.5]])
        >>> first = First(x, torch.tensor(1.0), torch.tensor(0.5), lambda: x, torch.tensor(0.25))
        >>> DiscretisedGaussian(2).log_prob(x, first).exp()
        tensor([0.8413, 0.8413], dtype=torch.float64)
    """

    @staticmethod
    def reference(levels: int) -> "DiscretisedGaussian":
        """Returns the decoder of Ho et al., for data scaled to ``2 y / (L - 1) - 1``.

        The outermost levels are -1 and 1, and half a step is 1 / (L - 1).

        Example:
            >>> DiscretisedGaussian.reference(3).place(torch.tensor([-1.0, 0.0, 1.0]))
            tensor([0., 1., 2.])
        """
        end = check_levels(levels) / (levels - 1)
        return DiscretisedGaussian(levels, -end, end)

    def log_prob(self, x: Tensor, first: First) -> Tensor:
        away = x.double() - first.denoise().double()
        std = first.variance.double().sqrt()
        lower, upper = (away - 0.5 * self.step) / std, (away + 0.5 * self.step) / std
        level = self.place(x).round()
        log_ndtr = torch.special.log_ndtr
        ends = torch.where(level <= 0, log_ndtr(upper), log_ndtr(-lower))
        inside = (level > 0) & (level < self.levels - 1)
        return sum_features(torch.where(inside, _log_between(lower, upper), ends))


@final
@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    r"""The density of real data under a Gaussian around the denoised data, N(D, s^2 I)."""

    def log_prob(self, x: Tensor, first: First) -> Tensor:
        variance = first.variance.to(x)
        squares = (x - first.denoise()).square() / variance
        return -0.5 * sum_features(squares + torch.log(2 * math.pi * variance))


def _log_between(lower: Tensor, upper: Tensor) -> Tensor:
    """Returns the logarithm of the normal probability between two ends, at any distance."""
    # Above 0 both probabilities would be near 1; the mirror image keeps their digits.
    above = lower > 0
    a, b = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_b + torch.log(-torch.expm1(log_a - log_b))
