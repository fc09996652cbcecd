r"""Stochastic interpolants: latent noise between two ends, and any noise level in sampling.

.. math:: x_t = (1 - t) \, x_0 + t \, x_1 + \gamma(t) \, z, \qquad
          \gamma = a \sqrt{t (1 - t)}

The law of :math:`x_t` moves with the velocity and has the score

.. math:: u = E[x_1 - x_0 \mid x_t] + \gamma' E[z \mid x_t], \qquad
          s = -\frac{1}{\gamma} E[z \mid x_t],

so, for every :math:`\epsilon \ge 0`, the ODE (:math:`\epsilon = 0`) and the SDE

.. math:: dx = (u - \epsilon \, s) \, dt + \sqrt{2 \epsilon} \, d\bar w

from t = 1 to t = 0 have the same marginals.

**The ends.** :math:`\gamma'` is infinite at both ends, and so are :math:`\gamma' z`, whose
variance has a divergent integral, and :math:`z / \gamma`. But :math:`\gamma' E[z \mid x_t] =
-\gamma \gamma' s`, and :math:`\gamma \gamma' = a^2 (\tfrac12 - t)` is finite. So a model learns
:math:`E[x_1 - x_0 \mid x_t]` and s, and needs no cut-off where the densities of both ends are
smooth. Data on a manifold have an infinite score at t = 0. A sampler then stops at ``eps``, with
an excess variance of :math:`a^2 \epsilon (1 - \epsilon)`, which the denoised estimate removes.

References:
    Albergo, Boffi and Vanden-Eijnden, *Stochastic interpolants*, 2023,
    https://arxiv.org/abs/2303.08797 (theorems 6 to 8).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde.bridges import check_source
from scoresde.sde.interpolant import Cutoffs, Interpolant, as_time


class End(ABC):
    """Base class for the end at t = 1."""

    @abstractmethod
    def __call__(self, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Returns the ends ``(B, *)``.

        Arguments:
            noise: Standard normal noise, with shape ``(B, *)``.
            cond: The conditions of the examples.
        """


@dataclass(frozen=True)
class Source(End):
    """Another example, the condition ``source``."""

    def __call__(self, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return check_source(cond, noise).to(noise)


@dataclass(frozen=True)
class StandardNormal(End):
    """Standard normal noise."""

    def __call__(self, noise: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return noise


@dataclass(frozen=True)
class StochasticInterpolant(Interpolant):
    r"""The interpolant :math:`(1 - t) \, x_0 + t \, x_1 + a \sqrt{t (1 - t)} \, z`.

    References:
        Albergo et al. 2023, https://arxiv.org/abs/2303.08797 (definition 2.1, section 4).

    Arguments:
        scale: The scale a of the noise, in model units, positive.
        end: The end at t = 1; the condition ``source`` by default.

    Raises:
        InputError: If the scale is not positive.

    Example:
        >>> StochasticInterpolant(2.0).gamma(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0., 1., 0.])
    """

    scale: float = 1.0
    end: End = field(default_factory=Source)

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise InputError(
                f"scale must be positive and finite, got {self.scale}; a typical value is 1."
            )
        if not isinstance(self.end, End):
            raise InputError(
                f"end must be an End such as Source() or StandardNormal(), got {self.end!r}."
            )

    @property
    def cutoffs(self) -> Cutoffs:
        """0 in training, since the targets are finite at both ends; 1e-3 in sampling."""
        return Cutoffs(training=0.0, sampling=1e-3, likelihood=1e-3)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor) -> Tensor:
        return as_time(t).clone()

    def gamma(self, t: Tensor) -> Tensor:
        t = as_time(t)
        return self.scale * torch.sqrt(t * (1 - t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def gamma_rate(self, t: Tensor) -> Tensor:
        return self.scale**2 * (0.5 - as_time(t))

    def start(self, noise: Tensor, temperature: float = 1.0, **cond: Tensor) -> Tensor:
        return self.end(temperature * noise, cond)
