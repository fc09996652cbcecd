"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import Draw, Loss, LossTerms, draw
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.variational import (
    LeastVariance,
    ScheduleGradient,
    VariationalLoss,
    WholeBound,
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
    "LeastVariance",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "NoiseWeighting",
    "ScheduleGradient",
    "VariationalLoss",
    "Weighting",
    "WholeBound",
    "draw",
]
