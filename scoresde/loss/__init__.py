"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import Draw, Loss, LossTerms, draw
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.design import NoiseDesign
from scoresde.loss.one_level import OneLevel, only_time
from scoresde.loss.score_matching import (
    ExplicitScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)
from scoresde.loss.weighting import (
    EDMWeighting,
    LikelihoodWeighting,
    NoiseWeighting,
    Weighting,
)

__all__ = [
    "CrossEntropy",
    "DenoisingScoreMatching",
    "Draw",
    "EDMWeighting",
    "ExplicitScoreMatching",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "NoiseDesign",
    "NoiseWeighting",
    "OneLevel",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Weighting",
    "draw",
    "only_time",
]
