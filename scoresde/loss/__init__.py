"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import Draw, Loss, LossTerms, draw
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.elbo import ELBO, ReconstructionError
from scoresde.loss.latent import LatentELBO
from scoresde.loss.weighting import (
    EDMWeighting,
    LikelihoodWeighting,
    NoiseWeighting,
    Weighting,
)

__all__ = [
    "ELBO",
    "CrossEntropy",
    "DenoisingScoreMatching",
    "Draw",
    "EDMWeighting",
    "LatentELBO",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "NoiseWeighting",
    "ReconstructionError",
    "Weighting",
    "draw",
]
