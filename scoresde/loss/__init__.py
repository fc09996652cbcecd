"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import Draw, Loss, LossTerms, draw
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.design import NoiseDesign
from scoresde.loss.elbo import ELBO, ReconstructionError
from scoresde.loss.hybrid import BoundLoss, HybridLoss
from scoresde.loss.importance import ImportanceSampled
from scoresde.loss.latent import LatentELBO
from scoresde.loss.one_level import OneLevel, only_time
from scoresde.loss.score_matching import (
    ExplicitScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)
from scoresde.loss.uncertainty import UncertaintyWeighted
from scoresde.loss.variational import (
    LeastVariance,
    ScheduleGradient,
    VariationalLoss,
    WholeBound,
)
from scoresde.loss.weighting import (
    BoundWeighting,
    EDMWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    NoiseWeighting,
    SoftMinSNRWeighting,
    Weighting,
)

__all__ = [
    "ELBO",
    "BoundLoss",
    "BoundWeighting",
    "CrossEntropy",
    "DenoisingScoreMatching",
    "Draw",
    "EDMWeighting",
    "ExplicitScoreMatching",
    "HybridLoss",
    "ImportanceSampled",
    "LatentELBO",
    "LeastVariance",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "MinSNRWeighting",
    "NoiseDesign",
    "NoiseWeighting",
    "OneLevel",
    "ReconstructionError",
    "ScheduleGradient",
    "ScoreMatching",
    "SlicedScoreMatching",
    "SoftMinSNRWeighting",
    "UncertaintyWeighted",
    "VariationalLoss",
    "Weighting",
    "WholeBound",
    "draw",
    "only_time",
]
