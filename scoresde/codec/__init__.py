"""Codecs: maps between raw and model units, and what they do to a log-density."""

from scoresde.codec.affine import Affine
from scoresde.codec.base import Codec
from scoresde.codec.decoder import (
    Decoder,
    DiscretisedGaussian,
    First,
    GaussianDecoder,
    Levels,
)
from scoresde.codec.standardise import PerChannel, PerFeature, Standardisation, Whole

__all__ = [
    "Affine",
    "Codec",
    "Decoder",
    "DiscretisedGaussian",
    "First",
    "GaussianDecoder",
    "Levels",
    "PerChannel",
    "PerFeature",
    "Standardisation",
    "Whole",
]
