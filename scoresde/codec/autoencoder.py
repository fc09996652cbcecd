r"""Autoencoders: codecs made of networks, with a density (``VAE``) or without (``Autoencoder``).

A variational autoencoder has an encoder :math:`q(z \mid x)`, a decoder :math:`p(x \mid z)` and,
while it is trained, the prior :math:`p(z) = N(0, I)`. Its evidence lower bound is

.. math:: \log p(x) \ge \mathbb{E}_{q(z \mid x)} \log p(x \mid z)
          - \mathrm{KL}(q(z \mid x) \,\|\, p(z)) ,

with both terms summed over dimensions. (With the mean over pixels for one and over latents for the
other, their weights would depend on the numbers of pixels and latents.) As a codec, it leaves the
prior to a model of the latents and contributes :math:`\log p(x \mid z) - \log q(z \mid x)` at the
drawn latents to a likelihood.

*Check:* with an affine decoder, :math:`W z + \mu` and the scale s, the evidence is
:math:`N(\mu, W W^T + s^2 I)` (probabilistic PCA), the exact posterior
:math:`N(M^{-1} W^T (x - \mu), s^2 M^{-1})` with :math:`M = W^T W + s^2 I`, and the best
independent latents lose :math:`\tfrac12 (\sum_i \log M_{ii} - \log |M|)`.

References:
    Kingma and Welling, *Auto-encoding variational Bayes*, 2014, https://arxiv.org/abs/1312.6114
    (equation 3).
    Tipping and Bishop, *Probabilistic principal component analysis*, 1999 (equations 4 to 6).
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.codec.base import Codec
from scoresde.codec.emission import Emission
from scoresde.codec.encoder import DiagonalGaussian, LatentEncoder, LatentLaw, known_shape
from scoresde.errors import InputError
from scoresde.recipe import describable
from scoresde.shapes import check_batch, check_output, sum_features
from scoresde.streams import Purpose, Streams
from scoresde.trainable import Trainable


class NeuralCodec(Codec, Trainable):
    """Base class for codecs made of two networks; raw examples are floats in model units.

    Attributes:
        raw_shape: The shape of one example.
        shape: The shape of its latents.
        has_density: Whether its decoder defines a density of examples.
        data_levels: The number of levels of the data, if its likelihood is a probability of
            levels; None if it is a density.
    """

    shape: Sequence[int] = ()  # type: ignore[assignment]
    raw_shape: Sequence[int] = ()
    has_density: bool = False
    data_levels: int | None = None
    decoder: nn.Module

    @abstractmethod
    def encode(self, raw: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        """Returns latents ``(B, *)`` of examples: draws if ``streams`` is given, else means."""

    @abstractmethod
    def moments(self, raw: Tensor) -> Tensor | None:
        """Returns the moments from which latents are drawn, to be cached: draws need no network.

        Returns:
            The mean and the logarithm of the standard deviation of each latent, ``(B, 2, *)``. For
            deterministic latents, the latents, ``(B, 1, *)``. None if their law is not Gaussian.
        """

    def decode(self, x: Tensor, rounded: bool = True) -> Tensor:
        """Returns the mean example for each latent, ``(B, *)``."""
        output = check_output(self.decoder(self._seen(x)))
        if output.shape[1:] != tuple(self.raw_shape):
            raise InputError(
                f"decoder must return examples of shape {tuple(self.raw_shape)}, got "
                f"{tuple(output.shape[1:])}."
            )
        return output

    def describe(self) -> dict[str, Any]:
        """Returns the recipe of the codec with its weights."""
        from scoresde.codec.latent import LatentCodec  # imports this module

        return LatentCodec.plain(self).describe()

    def _take(self, x: Tensor) -> Tensor:
        """Returns examples as a state, after a check of their shape."""
        check_batch(x)
        if x.shape[1:] != tuple(self.raw_shape):
            raise InputError(
                f"Examples must have shape {tuple(self.raw_shape)}, got {tuple(x.shape[1:])}."
            )
        return self._seen(x)

    def _seen(self, x: Tensor) -> Tensor:
        """Returns values as a state in the data type of the weights."""
        return self.state(x).to(torch.promote_types(torch.float32, self.dtype))


@describable
class Autoencoder(NeuralCodec):
    """An autoencoder without a density of examples; log-densities exist only for the latents.

    Arguments:
        encoder: A network from examples to latents, or a :class:`LatentEncoder`.
        decoder: A network from latents to examples.
        raw_shape: The shape of one example. If None, the encoder's ``shape`` is used.
        shape: The shape of its latents. If None, the encoder's ``output_shape`` is used.

    Raises:
        InputError: If a shape is unknown, or when called, if an input or output has another shape.

    Example:
        >>> import torch
        >>> from scoresde.nn import Dense
        >>> codec = Autoencoder(Dense([8], [2]), Dense([2], [8]))
        >>> codec.decode(codec.encode(torch.zeros(3, 8))).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        raw_shape: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        if isinstance(encoder, LatentEncoder):
            self.raw_shape, self.shape = encoder.raw_shape, encoder.shape
        else:
            self.raw_shape = known_shape("raw_shape", raw_shape, encoder, "shape")
            self.shape = known_shape("shape", shape, encoder, "output_shape")

    @property
    def stochastic(self) -> bool:
        """True if the encoder draws the latents."""
        return isinstance(self.encoder, LatentEncoder)

    def encode(self, raw: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        x = self._take(raw)
        if not isinstance(self.encoder, LatentEncoder):
            return check_output(self.encoder(x))
        return draw_latents(self.encoder.law(x), streams, draw)

    def moments(self, raw: Tensor) -> Tensor | None:
        if isinstance(self.encoder, LatentEncoder):
            return _moments(self.encoder.law(self._take(raw)))
        return self.encode(raw)[:, None]

    def log_det(self, raw: Tensor, x: Tensor) -> None:
        """Returns None, since the codec has no density."""
        return None

    def squared_error(self, x: Tensor) -> Tensor:
        """Returns the squared error of the reconstruction, averaged over values, ``(B,)``."""
        x = self._take(x)
        return (self.decode(self.encode(x)) - x).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Elbo:
    """The evidence lower bound of B examples, in nats of model units, summed over dimensions.

    Arguments:
        value: The bound, the reconstruction minus the divergence, ``(B,)``.
        reconstruction: The log-likelihood of the decoder at the drawn latents, ``(B,)``.
        kl: The divergence of the encoder from N(0, I), exact, ``(B,)``.
        kls: The divergence of each latent, ``(B, *)``.
    """

    value: Tensor
    reconstruction: Tensor
    kl: Tensor
    kls: Tensor


@describable
class VAE(NeuralCodec):
    """A variational autoencoder.

    Arguments:
        encoder: The law of the latents, such as a ``GaussianEncoder``.
        decoder: A network from latents to the mean of an example.
        likelihood: The likelihood around the mean: ``GaussianEmission()`` for real data,
            ``LevelEmission(levels)`` for integers.

    Raises:
        InputError: If a part has the wrong type, or when called, if an input or output has another
            shape.

    Example:
        >>> import torch
        >>> from scoresde.codec import GaussianEmission, GaussianEncoder
        >>> from scoresde.nn import Dense
        >>> encoder = GaussianEncoder(Dense([8], [4]))
        >>> vae = VAE(encoder, Dense([2], [8]), GaussianEmission(0.5))
        >>> vae.elbo(torch.zeros(3, 8), seed=0).value.shape
        torch.Size([3])
    """

    has_density = True

    def __init__(self, encoder: LatentEncoder, decoder: nn.Module, likelihood: Emission) -> None:
        super().__init__()
        if not isinstance(encoder, LatentEncoder) or not isinstance(likelihood, Emission):
            raise InputError(
                "encoder must be a LatentEncoder such as GaussianEncoder(network), and "
                "likelihood an Emission such as GaussianEmission(), got "
                f"{type(encoder).__name__} and {type(likelihood).__name__}."
            )
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.raw_shape, self.shape = encoder.raw_shape, encoder.shape
        self.data_levels = likelihood.levels

    @property
    def stochastic(self) -> bool:
        return True

    def elbo(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
    ) -> Elbo:
        """Evaluates the bound at one draw of the latents for each example.

        Arguments:
            x: Examples in model units, with shape ``(B, *)``.
            noise: Standard normal noise of the latents' shape, ``(B, *)``. If None, it is drawn.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: The index of each example's stream; ``range(B)`` by default.
        """
        x = self.likelihood.seen(self._take(x))
        law = self.encoder.law(x)
        if noise is None:
            streams = Streams.of(seed, seeds, len(x), x.device)
            noise = streams.normal(self.shape, Purpose.ENCODE, dtype=law.mean.dtype)
        found = self.likelihood.log_prob(x, self.decode(law.sample(noise)))
        kls = law.kl()
        kl = sum_features(kls)
        return Elbo(found - kl, found, kl, kls)

    def encode(self, raw: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        x = self.likelihood.seen(self._take(raw))
        return draw_latents(self.encoder.law(x), streams, draw)

    def moments(self, raw: Tensor) -> Tensor | None:
        return _moments(self.encoder.law(self.likelihood.seen(self._take(raw))))

    def log_det(self, raw: Tensor, x: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x \mid z) - \log q(z \mid x)` at latents z, ``(B,)``."""
        seen, z = self.likelihood.seen(self._take(raw)), self.state(x)
        return self.likelihood.log_prob(seen, self.decode(z)) - self.encoder.law(seen).log_prob(z)


def draw_latents(law: LatentLaw, streams: Streams | None, draw: int) -> Tensor:
    """Returns latents of a law: a draw if ``streams`` is given, else their mean."""
    mean = law.mean
    if streams is None:
        return mean
    noise = streams.normal(mean.shape[1:], Purpose.ENCODE, draw, mean.dtype)
    return law.sample(noise.to(mean.device))


def _moments(law: LatentLaw) -> Tensor | None:
    if not isinstance(law, DiagonalGaussian):
        return None
    return torch.stack([law.mean, law.log_std], 1)
