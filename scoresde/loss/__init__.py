"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import Draw, Loss, LossTerms, draw
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.paired import (
    DataWeighting,
    InterpolantMatching,
    Paired,
    PairWeighting,
    VelocityWeighting,
)
from scoresde.loss.weighting import (
    EDMWeighting,
    LikelihoodWeighting,
    NoiseWeighting,
    Weighting,
)

__all__ = [
    "CrossEntropy",
    "DataWeighting",
    "DenoisingScoreMatching",
    "Draw",
    "EDMWeighting",
    "InterpolantMatching",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "NoiseWeighting",
    "PairWeighting",
    "Paired",
    "VelocityWeighting",
    "Weighting",
    "draw",
]
