r"""Correctors: Langevin steps that move a state closer to the marginal at its time.

.. math:: x \leftarrow x + \delta \, \nabla_x \log p_t(x) + \sqrt{2 \delta} \, z
          = x - \frac{\delta}{\sigma} \hat z + \sqrt{2 \delta} \, z

**Step size.** Song et al. set :math:`\delta = 2 a^2 (r \lVert z \rVert / \lVert \nabla \log p
\rVert)^2` with a target ratio :math:`r` ("snr") and norms averaged over the batch, which couples
the samples. Norms per sample are worse: where a score vanishes, as it does in the middle of any
mode in few dimensions, :math:`\delta` is infinite. The rule used here follows from three facts.

1. *Stability.* :math:`p_t` is a density convolved with :math:`N(0, \sigma^2 I)`, so
   :math:`-\nabla^2 \log p_t = I / \sigma^2 - \mathrm{Cov}[\alpha x_0 \mid x] / \sigma^4 \preceq
   I / \sigma^2`, in any dimension and for any data. A Langevin step is stable for :math:`\delta <
   2 \sigma^2`; the bound :math:`\delta \le \sigma^2` keeps half of that.
2. *Size.* By Tweedie :math:`\nabla \log p = -\hat z / \sigma` with :math:`E \lVert \hat z
   \rVert^2 \le d`, and close to :math:`d` for images, so the published rule means
   :math:`\delta \approx 2 a^2 r^2 \sigma^2 \, d / \lVert \hat z \rVert^2`.
3. *Bias.* A step that depends on the state, :math:`\delta(x)`, leaves :math:`p / \delta` invariant
   instead of :math:`p`. For :math:`\delta \propto 1 / (d_0 + \lVert \hat z \rVert^2)` with
   Gaussian noise this multiplies the variance by :math:`1 + 2 / (d_0 + d)`, and for data on a
   set of few dimensions by at most :math:`1 + 2 / (d_0 + 1)`.

Together: shrink the norm of the sample towards its expectation with the weight of :math:`d_0`
more dimensions, and keep the bound,

.. math:: \delta = \min\left( \sigma^2, \;
          2 a^2 r^2 \sigma^2 \frac{d_0 + d}{d_0 + \lVert \hat z \rVert^2} \right) .

With :math:`d_0 = 256` the bias stays below 0.8 % of the variance in any dimension; in 3072
dimensions, where the noise is as large as expected, the rule is the published one per sample, and
in 2 it is nearly the annealed one.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (algorithms 4 and 5).
    Song and Ermon, *Generative modeling by estimating gradients of the data distribution*, 2019
    (annealed Langevin dynamics).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Conditioned
from scoresde.sample.predictors import Interval
from scoresde.shapes import expand, sum_features


class StepRule(ABC):
    """Base class for rules for the size of a Langevin step."""

    @abstractmethod
    def __call__(self, base: float, sigma: float, noise: Tensor, z: Tensor) -> Tensor:
        r"""Returns :math:`\delta`, with shape ``()`` or ``(B,)``.

        Arguments:
            base: :math:`2 a^2 r^2 \sigma^2`.
            sigma: The noise level.
            noise: The predicted noise, with shape ``(B, *)``.
            z: The random direction, with shape ``(B, *)``.
        """


@dataclass(frozen=True)
class ShrunkNorm(StepRule):
    r"""The rule derived above, applied to each sample alone and stable in any dimension.

    Arguments:
        pseudo_dimensions: Weight :math:`d_0` of the expectation, positive.
    """

    pseudo_dimensions: float = 256.0

    def __post_init__(self) -> None:
        if not 0 < self.pseudo_dimensions < math.inf:
            raise InputError(
                "pseudo_dimensions must be positive and finite, got "
                f"{self.pseudo_dimensions}; the default is 256."
            )

    def __call__(self, base: float, sigma: float, noise: Tensor, z: Tensor) -> Tensor:
        squares = sum_features(noise**2)
        prior = self.pseudo_dimensions
        gain = (prior + noise.shape[1:].numel()) / (prior + squares)
        return (base * gain).clamp(max=sigma**2)


@dataclass(frozen=True)
class BatchMeanNorm(StepRule):
    r"""The published rule, with norms averaged over the batch, which couples its samples.

    .. math:: \delta = 2 a^2 \left( r \, \frac{\mathrm{mean} \lVert z \rVert}
              {\mathrm{mean} \lVert \nabla_x \log p_t(x) \rVert} \right)^2
    """

    def __call__(self, base: float, sigma: float, noise: Tensor, z: Tensor) -> Tensor:
        ratio = z.flatten(1).norm(dim=1).mean() / noise.flatten(1).norm(dim=1).mean()
        return base * ratio**2


@dataclass(frozen=True)
class Corrector(ABC):
    """Base class for correctors: Langevin steps at a fixed time, one network evaluation each.

    Arguments:
        snr: Target ratio r of the two parts of a step, positive.
        steps: Number of corrections, positive.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.snr < math.inf:
            raise InputError(
                f"snr must be positive and finite, got {self.snr}; the published value is 0.16."
            )
        check_count("steps", self.steps)

    @abstractmethod
    def size(self, base: float, sigma: float, noise: Tensor, z: Tensor) -> Tensor:
        r"""Returns :math:`\delta`; arguments as for :class:`StepRule`."""

    def __call__(self, field: Conditioned, x: Tensor, step: Interval, z: Tensor) -> Tensor:
        """Takes one Langevin step at the time ``step.t``, before the sampler takes ``step``."""
        sigma = step.sigma_t
        noise = field.noise(x, step.t)
        delta = self.size(2 * (step.a * self.snr * sigma) ** 2, sigma, noise, z)
        return x - expand(delta / sigma, x) * noise + expand((2 * delta).sqrt(), x) * z


@dataclass(frozen=True)
class Langevin(Corrector):
    """Langevin dynamics with a step size that depends on the score.

    Arguments:
        rule: Rule for the step size.
    """

    rule: StepRule = field(default_factory=ShrunkNorm)

    def size(self, base: float, sigma: float, noise: Tensor, z: Tensor) -> Tensor:
        return self.rule(base, sigma, noise, z)


@dataclass(frozen=True)
class AnnealedLangevin(Corrector):
    r"""Annealed Langevin dynamics: the step :math:`2 a^2 (r \sigma)^2` depends only on time."""

    def size(self, base: float, sigma: float, noise: Tensor, z: Tensor) -> Tensor:
        return torch.tensor(base, dtype=torch.float64)
