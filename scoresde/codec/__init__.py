"""Codecs: maps between raw and model units, and their effect on a log-density."""

from scoresde.codec.affine import Affine
from scoresde.codec.autoencoder import VAE, Autoencoder, Elbo, NeuralCodec
from scoresde.codec.base import Codec
from scoresde.codec.decoder import (
    Decoder,
    DiscretisedGaussian,
    First,
    GaussianDecoder,
    Levels,
)
from scoresde.codec.emission import Emission, GaussianEmission, LevelEmission
from scoresde.codec.encoder import DiagonalGaussian, GaussianEncoder, LatentEncoder, LatentLaw
from scoresde.codec.latent import LatentCodec
from scoresde.codec.standardise import PerChannel, PerFeature, Standardisation, Whole

__all__ = [
    "VAE",
    "Affine",
    "Autoencoder",
    "Codec",
    "Decoder",
    "DiagonalGaussian",
    "DiscretisedGaussian",
    "Elbo",
    "Emission",
    "First",
    "GaussianDecoder",
    "GaussianEmission",
    "GaussianEncoder",
    "LatentCodec",
    "LatentEncoder",
    "LatentLaw",
    "LevelEmission",
    "Levels",
    "NeuralCodec",
    "PerChannel",
    "PerFeature",
    "Standardisation",
    "Whole",
]
