r"""Encoders: the distribution :math:`q(z \mid x)` of an example's latents.

References:
    Kingma and Welling, *Auto-encoding variational Bayes*, 2014, https://arxiv.org/abs/1312.6114
    (section 3 and appendix B).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.basics import check_wholes
from scoresde.recipe import describable
from scoresde.shapes import check_output, sum_features

_LOG_STD = (-15.0, 10.0)  # range of a latent's log standard deviation; float32 fails outside


class LatentLaw(ABC):
    """Base class for the law of the latents of each example, ``(B, *)``."""

    mean: Tensor

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """Returns latents for standard normal noise of their shape, ``(B, *)``."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        r"""Returns :math:`\log q(z \mid x)` in nats, ``(B, *)`` to ``(B,)``."""

    @abstractmethod
    def kl(self) -> Tensor:
        r"""Returns the divergence from N(0, I) in nats, per latent or group, ``(B, *)``.

        Its sum over all axes but the first is :math:`KL(q(z \mid x) \,\|\, N(0, I))`.
        """


@final
@dataclass(frozen=True, eq=False)
class DiagonalGaussian(LatentLaw):
    r"""Independent normal latents, :math:`N(\mu, \mathrm{diag}(s^2))`.

    .. math:: KL = \tfrac12 \sum_i \mu_i^2 + s_i^2 - \log s_i^2 - 1

    Arguments:
        mean: The mean :math:`\mu`, ``(B, *)``.
        log_std: The logarithm of the standard deviation, ``(B, *)``.
    """

    mean: Tensor
    log_std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        squares = ((z - self.mean) * (-self.log_std).exp()).square()
        return -sum_features(0.5 * squares + self.log_std + 0.5 * math.log(2 * math.pi))

    def kl(self) -> Tensor:
        # mu^2 / 2 + (e^{2 l} - 1 - 2 l) / 2: expm1 keeps the digits of s near 1.
        return 0.5 * (self.mean.square() + torch.expm1(2 * self.log_std)) - self.log_std


class LatentEncoder(nn.Module, ABC):
    """Base class for encoders, which return the law of the latents of each example.

    Attributes:
        raw_shape: The shape of one example.
        shape: The shape of its latents.
    """

    raw_shape: tuple[int, ...]
    shape: tuple[int, ...]

    @abstractmethod
    def law(self, x: Tensor) -> LatentLaw:
        """Returns the law of the latents of examples ``(B, *)``."""


@describable
class GaussianEncoder(LatentEncoder):
    """A network that returns the means and the log standard deviations of the latents.

    Arguments:
        network: A network from examples ``(B, *)`` to ``(B, 2 n, *)``: along the axis after the
            batch, the means of n latents, then their log standard deviations.
        raw_shape: The shape of one example. If None, the network's ``shape`` is used.
        shape: The shape of the latents, with n along the first axis. If None, it is derived from
            the network's ``output_shape``.
        log_variance: Whether the network returns the logarithm of the variance instead.

    Raises:
        InputError: If a shape is unknown, or differs from that of the output.
    """

    def __init__(
        self,
        network: nn.Module,
        raw_shape: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        log_variance: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.raw_shape = known_shape("raw_shape", raw_shape, network, "shape")
        if shape is None:
            both = known_shape("shape", None, network, "output_shape")
            shape = (both[0] // 2, *both[1:])
        self.shape = check_wholes("shape", shape)
        self.log_variance = log_variance

    def law(self, x: Tensor) -> DiagonalGaussian:
        output = check_output(self.network(x))
        if output.shape != (len(x), 2 * self.shape[0], *self.shape[1:]):
            raise InputError(
                f"network must return shape {(len(x), 2 * self.shape[0], *self.shape[1:])}, two "
                f"numbers for each latent of shape {self.shape}, got {tuple(output.shape)}."
            )
        mean, log_std = output.chunk(2, dim=1)
        log_std = 0.5 * log_std if self.log_variance else log_std
        return DiagonalGaussian(mean, log_std.clamp(*_LOG_STD))


def known_shape(
    name: str, given: Sequence[int] | None, network: nn.Module, attribute: str
) -> tuple[int, ...]:
    """Returns a given shape, or else the shape declared by the network.

    Raises:
        InputError: If neither is known.
    """
    found = getattr(network, attribute, None) if given is None else given
    if found is None:
        raise InputError(
            f"{name} must be set for a {type(network).__name__}, which has no {attribute}, got "
            f"None; pass {name}=[...]."
        )
    return check_wholes(name, tuple(found))
