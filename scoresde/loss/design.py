r"""Noise levels and Langevin steps of an annealed model, computed from the data alone.

Techniques 1, 2, 4 and 5 of Song and Ermon 2020 (3 is the noise parametrisation, :math:`s = -F /
\sigma`). With :math:`D` dimensions and geometric levels :math:`\sigma_1 > \dots > \sigma_L` of
ratio :math:`r`:

1. :math:`\sigma_1` is the largest distance between two examples, so a chain at the first level can
   move from any example to any other.
2. The radius of :math:`N(0, \sigma^2 I)` is close to :math:`N(\sqrt D \, \sigma, \sigma^2 / 2)`.
   Half of the noise of one level must lie within three standard deviations of the previous level,

   .. math:: \Phi(\sqrt{2D} (r - 1) + 3 r) - \Phi(\sqrt{2D} (r - 1) - 3 r) = \tfrac12 .

   In few dimensions the law of the radius is too wide to bound the ratio: for D <= 4 there is no
   solution (and for D = 5 it is 19), so the ratio is at most ``largest_ratio``. A smaller ratio is
   more accurate but needs more steps: with T = 5 on the exact score of eight Gaussians in the
   plane, the variance of a mode is 1.87, 1.40 and 1.17 times the true value for ratios of 2, 1.4
   and 1.1.
3. See above.
4. T Langevin steps :math:`x + \delta s + \sqrt{2 \delta} z` with :math:`\delta = \epsilon
   \sigma_i^2 / \sigma_L^2` turn the variance :math:`r^2 \sigma_i^2`, around one example, into
   :math:`g \sigma_i^2`,

   .. math:: g(\epsilon) = q^{2T} (r^2 - k) + k, \qquad q = 1 - \frac{\epsilon}{\sigma_L^2}, \qquad
             k = \frac{2 \epsilon}{\sigma_L^2 (1 - q^2)} .

   Since g is a mean of :math:`r^2` and :math:`k`, both above 1, it is closest to 1 at the step
   that minimises it.
5. Weights are averaged with the decay 0.999.

References:
    Song and Ermon, *Improved techniques for training score-based generative models*, 2020,
    https://arxiv.org/abs/2006.09011 (techniques 1 to 5; equation 4 and proposition 2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.weighting import NoiseWeighting
from scoresde.sample import AnnealedLangevin, AnnealedLangevinDynamics
from scoresde.sde import VESDE
from scoresde.shapes import check_data
from scoresde.streams import random_rows
from scoresde.times import LevelTimes

_BLOCK = 1024  # examples whose distances to all others are in memory at once


@runtime_checkable
class Encoded(Protocol):
    """Protocol for data sets: raw training examples, and their conversion to model units."""

    @property
    def train(self) -> Any:
        """The raw training examples, ``(N, *)``."""

    @property
    def encode(self) -> Callable[..., Tensor]:
        """Converts raw examples to model units."""


@dataclass(frozen=True)
class NoiseDesign:
    """Geometric noise levels, and the Langevin steps at each of them.

    Arguments:
        sigma_max: The largest noise level in model units, above ``sigma_min``.
        sigma_min: The smallest, positive.
        levels: The number of levels L, at least 2.
        steps: The Langevin steps T at a level, positive.
        ema: The decay of the average of the weights.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> design = NoiseDesign(sigma_max=50.0, sigma_min=0.01, levels=232, steps=5)
        >>> print(f"{design.ratio:.4f} {design.step_size:.3g}")
        1.0376 6.18e-06
    """

    sigma_max: float
    sigma_min: float
    levels: int
    steps: int = 5
    ema: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                "sigma_min must be in (0, sigma_max) and sigma_max finite, got "
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max}."
            )
        if check_count("levels", self.levels) < 2:
            raise InputError(f"levels must be at least 2, got {self.levels}.")
        check_count("steps", self.steps)

    @staticmethod
    def of(
        data: Encoded | Tensor,
        sigma_min: float = 0.01,
        steps: int = 5,
        largest_ratio: float = 1.4,
        examples: int = 5000,
    ) -> "NoiseDesign":
        """Designs the noise for data.

        Arguments:
            data: A data set, whose training examples are used; or examples in model units, floats
                ``(N, *)``.
            sigma_min: The smallest level in model units, the noise that may remain on the samples.
            steps: The Langevin steps T at a level, positive.
            largest_ratio: The largest ratio of neighbouring levels, above 1; it has an effect
                below about 50 dimensions.
            examples: The largest number of examples to compare in pairs. From more examples, this
                number is drawn at random (:func:`~scoresde.streams.random_rows`), and their
                largest distance is a little smaller.

        Raises:
            InputError: If the data are not examples in model units, or their largest distance is
                below ``sigma_min``.
        """
        if check_count("examples", examples) < 2:
            raise InputError(f"examples must be at least 2, got {examples}.")
        if not _is_number(largest_ratio) or not 1 < largest_ratio < math.inf:
            raise InputError(
                f"largest_ratio must be above 1 and finite, got {largest_ratio}; the default is "
                "1.4."
            )
        x = _examples(data, examples)
        widest = largest_distance(x)
        _check_sizes(x, widest, sigma_min)
        ratio = min(level_ratio(x.shape[1]), largest_ratio)
        intervals = max(1, round(math.log(widest / sigma_min) / math.log(ratio)))
        return NoiseDesign(widest, sigma_min, intervals + 1, steps)

    @property
    def ratio(self) -> float:
        """The ratio r of neighbouring levels, above 1."""
        return (self.sigma_max / self.sigma_min) ** (1 / (self.levels - 1))

    @property
    def step_size(self) -> float:
        r"""The step :math:`\epsilon` of the last level (technique 4)."""
        return self.sigma_min**2 * _relative_step(self.ratio**2, self.steps)

    @property
    def variance_ratio(self) -> float:
        r"""The variance :math:`g` reached at a level, relative to its nominal value; above 1."""
        return _variance_ratio(self.step_size / self.sigma_min**2, self.ratio**2, self.steps)

    def sde(self) -> VESDE:
        """Returns the process with these noise levels."""
        return VESDE(self.sigma_min, self.sigma_max)

    def loss(self) -> DenoisingScoreMatching:
        """Returns the loss of NCSN: equal weights of the levels, and half the sum over D."""
        return DenoisingScoreMatching(
            NoiseWeighting(), LevelTimes(self.levels), eps=0.0, reduce_mean=False
        )

    def langevin(self) -> AnnealedLangevinDynamics:
        r"""Returns annealed Langevin dynamics with T steps at each level and a final denoising.

        Its corrector writes :math:`\delta = 2 (a \sigma)^2`, so :math:`a^2 = \epsilon / 2
        \sigma_L^2`.
        """
        size = math.sqrt(0.5 * self.step_size) / self.sigma_min
        return AnnealedLangevinDynamics(
            self.levels - 1,
            langevin=AnnealedLangevin(size, self.steps),
            eps=0.0,
            final_denoise=True,
        )


def largest_distance(x: Tensor) -> float:
    """Returns the largest distance between two rows of ``(N, D)``, computed in blocks.

    Example:
        >>> largest_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]]))
        5.0
    """
    x = x.double()
    x = x - x.mean(0)  # rounding of the squares of a common offset would hide the differences
    return max(float(torch.cdist(part, x).max()) for part in x.split(_BLOCK))


def level_ratio(dimension: int) -> float:
    """Returns the largest ratio of neighbouring levels in D dimensions (technique 2).

    It is infinite if the condition has no solution, up to D = 4.

    Example:
        >>> print(f"{level_ratio(3072):.4f} {level_ratio(2)}")
        1.0398 inf
    """
    root = math.sqrt(2 * dimension)
    if root <= 3:
        return math.inf

    def share(ratio: float) -> float:
        return _phi(root * (ratio - 1) + 3 * ratio) - _phi(root * (ratio - 1) - 3 * ratio)

    low, high = 1.0, 2.0 * root / (root - 3)  # at ``high`` the upper bound is below a half
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) > 0.5 else (low, middle)
    return 0.5 * (low + high)


def _phi(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _variance_ratio(u: float, before: float, steps: int) -> float:
    """Returns g for the relative step u and the variance ``before``."""
    k, forgotten = 2 / (2 - u), (1 - u) ** (2 * steps)
    return forgotten * before + (1 - forgotten) * k


def _relative_step(before: float, steps: int) -> float:
    r"""Returns :math:`\epsilon / \sigma_L^2` in (0, 1) with the smallest variance."""
    # A grid finds the basin, and a golden-section search the minimum in it.
    grid = [1e-6 * 1e6 ** (i / 600) for i in range(600)]
    best = min(range(len(grid)), key=lambda i: _variance_ratio(grid[i], before, steps))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    golden = 0.5 * (math.sqrt(5) - 1)
    for _ in range(80):
        a, b = high - golden * (high - low), low + golden * (high - low)
        lower = _variance_ratio(a, before, steps) < _variance_ratio(b, before, steps)
        low, high = (low, b) if lower else (a, high)
    return 0.5 * (low + high)


def _examples(data: Encoded | Tensor, most: int) -> Tensor:
    """Returns some examples in model units, ``(N, D)``, on the CPU."""
    if isinstance(data, Tensor):
        check_data(data)
        x = data[random_rows(len(data), most).to(data.device)]
    elif isinstance(data, Encoded):
        train = data.train
        x = data.encode(train[random_rows(len(train), most).to(train.device)], centre=True)
    else:
        raise InputError(
            f"data must be a Dataset or floats (N, *), got {type(data).__name__}; use "
            "torch.as_tensor for arrays."
        )
    return x.detach().cpu().flatten(1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_sizes(x: Tensor, widest: float, sigma_min: float) -> None:
    if widest == 0:
        raise InputError(f"data must contain different examples, got {len(x)} equal examples.")
    offset = float(x.double().mean(0).norm())
    if offset > widest:
        raise InputError(
            f"data must be in model units, around 0, got a mean of norm {offset:.4g} and a "
            f"largest distance of {widest:.4g}; use a Dataset, which standardises them."
        )
    if not _is_number(sigma_min) or not 0 < sigma_min < widest:
        raise InputError(
            f"sigma_min must be in (0, {widest:.4g}), below the largest distance of two examples "
            f"in model units, got {sigma_min}."
        )
