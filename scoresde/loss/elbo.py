r"""Losses of autoencoders.

.. math:: L = -\mathbb{E}_{q(z \mid x)} \log p(x \mid z)
          + \beta \sum_j \max(\lambda, \mathrm{KL}_j) ,

in nats, summed over the values of an example and over its latents j. With :math:`\beta = 1` and
:math:`\lambda = 0` it is the negative evidence lower bound.

**Collapse.** While the decoder is still poor, the divergence is the easier of the two terms to
reduce, and latents may become permanently unused. A *warm-up* raises :math:`\beta` linearly from 0
over the first updates. With *free bits*, the first :math:`\lambda` nats of each latent cost
nothing.

References:
    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114 (equation 3).
    Higgins et al., *beta-VAE*, 2017 (equation 4).
    Sonderby et al., *Ladder variational autoencoders*, 2016, https://arxiv.org/abs/1602.02282
    (the warm-up).
    Kingma et al., *Improving variational inference with inverse autoregressive flow*, 2016,
    https://arxiv.org/abs/1606.04934 (free bits; there for the mean over a batch, here for each
    example, since examples of a batch are not coupled).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from scoresde.codec import VAE, Autoencoder
from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.model import Trainable
from scoresde.shapes import sum_features
from scoresde.streams import Purpose


@dataclass(frozen=True)
class ELBO(Loss):
    """The negative evidence lower bound of a VAE.

    The parts ``reconstruction`` and ``kl`` are its two terms, in nats. Held-out examples are
    evaluated with the bound itself, regardless of the weights.

    Arguments:
        beta: The weight of the divergence, non-negative.
        free_bits: The number of nats of each latent without a cost, non-negative.
        warmup: The number of updates over which ``beta`` rises from 0; 0 for no warm-up.

    Raises:
        InputError: If an argument is out of range.
    """

    beta: float = 1.0
    free_bits: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("beta", "free_bits", "warmup"):
            check_weight(name, getattr(self, name))

    def at(self, step: int) -> "ELBO":
        return replace(self, beta=self.beta * risen(step, self.warmup), warmup=0)

    def fixed(self) -> "ELBO":
        return ELBO()

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the loss of each example in nats; arguments as for the base.

        ``noise`` is the noise of the latents, ``(B, *)``; a VAE has no times.
        """
        self.check(model)
        assert isinstance(model, VAE)
        noise = latent_noise(model, given) if given.noise is None else given.noise
        found = model.elbo(x, noise)
        cost = sum_features(found.kls.clamp(min=self.free_bits)) if self.free_bits else found.kl
        parts = {"reconstruction": found.reconstruction.detach(), "kl": found.kl.detach()}
        return LossTerms(self.beta * cost - found.reconstruction, parts)

    def check(self, model: Trainable) -> None:
        if not isinstance(model, VAE):
            raise InputError(
                f"model must be a VAE for ELBO(), got {type(model).__name__}; use "
                "VAE(encoder, decoder, likelihood)."
            )


@dataclass(frozen=True)
class ReconstructionError(Loss):
    """The squared error of an autoencoder, averaged over the values of an example."""

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the squared error of each example; arguments as for the base."""
        self.check(model)
        assert isinstance(model, Autoencoder)
        return LossTerms(model.squared_error(x))

    def check(self, model: Trainable) -> None:
        if not isinstance(model, Autoencoder):
            raise InputError(
                f"model must be an Autoencoder, got {type(model).__name__}; use ELBO() for a VAE."
            )


def check_weight(name: str, value: float) -> None:
    """Checks that a weight or a number of warm-up updates is not negative.

    Raises:
        InputError: If it is negative or not finite.
    """
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{name} must be non-negative and finite, got {value}.")


def risen(step: int, warmup: int) -> float:
    """Returns the fraction of a weight at an update, for a linear rise over ``warmup`` updates."""
    return min(1.0, step / warmup) if warmup else 1.0


def latent_noise(codec: Any, given: Given) -> Tensor:
    """Returns the noise of the latents of a part of a batch, ``(B, *)``."""
    return given.own.normal(codec.shape, Purpose.ENCODE, dtype=codec.dtype)
