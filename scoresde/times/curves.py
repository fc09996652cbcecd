r"""Densities of training times published for flow matching.

Each is a curve from a uniform number :math:`u` to a time. The papers state it for the straight
path, where the time is the share of noise; here it applies to the time of any process. Like
:class:`~scoresde.times.LogNormalTimes`, these densities are a choice of emphasis with weight 1:
the loss averages over the density. :class:`Corrected` divides by the density instead, which
preserves the average over uniform times and changes only its variance.

References:
    Esser et al., *Scaling rectified flow transformers for high-resolution image synthesis*, 2024,
    https://arxiv.org/abs/2403.03206 (section 3.1).
    Lee, Lin and Fanti, *Improving the training of rectified flows*, 2024,
    https://arxiv.org/abs/2405.20320 (section 4).
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE, derivative
from scoresde.times.densities import Times

_HALVINGS = 60  # of the unit interval: more than float64 resolves


class CurvedTimes(Times):
    """Base class for densities of training times; subclasses define :meth:`curve`.

    The curve covers [0, 1] and is stretched to [eps, 1].
    """

    @abstractmethod
    def curve(self, u: Tensor) -> Tensor:
        """Maps uniform numbers in (0, 1), of any shape, to (0, 1); increasing."""

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return eps + (1 - eps) * self.curve(u)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return torch.ones_like(t)

    def density(self, t: Tensor) -> Tensor:
        """Returns the density on (0, 1) at times of any shape, from the curve's slope."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            below = self.curve(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 1 / derivative(self.curve, 0.5 * (low + high))


@dataclass(frozen=True)
class LogitNormalTimes(CurvedTimes):
    r"""Times with a normally distributed logit.

    .. math:: \log \frac{t}{1 - t} \sim N(\mathrm{mean}, \mathrm{std}^2)

    For rectified flow, :math:`\sigma / \alpha` then has a log-normal density. The density of the
    times is 0 at both ends.

    References:
        Esser et al. 2024, https://arxiv.org/abs/2403.03206 (equation 19).

    Arguments:
        mean: The mean of the logit; below 0 favours times near the data, above 0 near the noise.
        std: The standard deviation of the logit, positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise InputError(f"mean must be finite, got {self.mean}; the published value is 0.")
        if not 0 < self.std < math.inf:
            raise InputError(
                f"std must be positive and finite, got {self.std}; the published value is 1."
            )

    def curve(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class ModeTimes(CurvedTimes):
    r"""Times with a mode in the middle and a density that is positive at both ends.

    .. math:: t = 1 - u' - s \left( \cos^2 \tfrac{\pi u'}{2} - 1 + u' \right), \qquad u' = 1 - u

    References:
        Esser et al. 2024, https://arxiv.org/abs/2403.03206 (equation 20).

    Arguments:
        scale: The scale :math:`s`, in :math:`[-1, 2 / (\pi - 2)]`: above 0 favours the middle,
            below 0 the ends, 0 is uniform.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise InputError(  # five digits round the bound down
                f"scale must be in [-1, {2 / (math.pi - 2):.5g}], where the curve increases, got "
                f"{self.scale}; the published value is 1.29."
            )

    def curve(self, u: Tensor) -> Tensor:
        back = 1 - u
        return u - self.scale * (torch.cos(0.5 * math.pi * back) ** 2 - u)


@dataclass(frozen=True)
class CosMapTimes(CurvedTimes):
    r"""Times at which the straight path has the log-SNRs of the cosine schedule at uniform times.

    .. math:: t = 1 - \frac{1}{1 + \tan \frac{\pi u}{2}}, \qquad
              p(t) = \frac{2}{\pi - 2 \pi t + 2 \pi t^2}

    References:
        Esser et al. 2024, https://arxiv.org/abs/2403.03206 (equation 21).
    """

    def curve(self, u: Tensor) -> Tensor:
        angle = 0.5 * math.pi * u
        sine, cosine = torch.sin(angle), torch.cos(angle)
        return sine / (sine + cosine)


@dataclass(frozen=True)
class UShapedTimes(CurvedTimes):
    r"""Times near both ends, :math:`p(t) \propto e^{a t} + e^{a (1 - t)}`, for reflow.

    With a coupling from a model's own flow, the middle is easy, since paths do not cross there.

    References:
        Lee, Lin and Fanti 2024, https://arxiv.org/abs/2405.20320 (section 4.1).

    Arguments:
        rate: The rate :math:`a`, in (0, 100).
    """

    rate: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 100:
            raise InputError(
                f"rate must be in (0, 100), got {self.rate}; the published value is 4."
            )

    def curve(self, u: Tensor) -> Tensor:
        end = math.sinh(0.5 * self.rate)
        return 0.5 + torch.asinh((2 * u - 1) * end) / self.rate


@dataclass(frozen=True)
class Corrected(Times):
    """Times with a given density, weighted to preserve the average over uniform times.

    Arguments:
        times: The density. The density of :class:`LogitNormalTimes` is 0 at both ends, where the
            weight is unbounded.
    """

    times: CurvedTimes = field(default_factory=ModeTimes)

    def __post_init__(self) -> None:
        if not isinstance(self.times, CurvedTimes):
            raise InputError(f"times must be a CurvedTimes such as ModeTimes(), got {self.times}.")

    def quantile(self, u: Tensor, sde: SDE, eps: float) -> Tensor:
        return self.times.quantile(u, sde, eps)

    def weight(self, t: Tensor, sde: SDE, eps: float) -> Tensor:
        return 1 / self.times.density((t - eps) / (1 - eps))

    def spread(self, u: Tensor) -> Tensor:
        return self.times.spread(u)
