"""Weights of the error of the noise."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE

_LEAST_SIGNAL = 1e-4


class Weighting(ABC):
    """Abstract weight of the noise's error."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """Returns the weights, with the shape of ``t``."""


@dataclass(frozen=True)
class NoiseWeighting(Weighting):
    """Every noise level counts the same."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    r"""The weight :math:`g^2 / \sigma^2` of the bound on the likelihood.

    It grows without limit as :math:`\sigma \to 0`; use it with
    :class:`~scoresde.times.ImportanceTimes`, under which the loss has a constant weight.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.g(t) / sde.sigma(t)) ** 2


@dataclass(frozen=True)
class VelocityWeighting(Weighting):
    r"""The weight :math:`(g^2 / 2 \sigma)^2`, under which the noise's error is the velocity's.

    It equals :math:`(\sigma' - \alpha' \sigma / \alpha)^2`, on rectified flow
    :math:`1 / (1 - t)^2`.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        signal = sde.alpha(t).clamp(min=_LEAST_SIGNAL)
        return (sde.sigma_dot(t) - sde.alpha_dot(t) * sde.sigma(t) / signal) ** 2


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    r"""The weight of Karras et al. 2022.

    Their :math:`\lambda = (\tilde\sigma^2 + \sigma_d^2) / (\tilde\sigma \sigma_d)^2` weighs the
    error of the data, which is :math:`\tilde\sigma^2 = \sigma^2 / \alpha^2` times that of the
    noise.

    Arguments:
        sigma_data: The data's standard deviation, positive.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise InputError(
                f"sigma_data={self.sigma_data} is not positive; give the standard deviation of "
                "the data in model units (about 0.5 for images in [-1, 1])."
            )

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        # Where no signal is left the error of the noise is 0, and the weight must be finite.
        signal = sde.alpha(t).clamp(min=_LEAST_SIGNAL)
        return 1 + (sde.sigma(t) / (signal * self.sigma_data)) ** 2
