"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import Draw, Loss, LossTerms, draw
from scoresde.loss.coupling import Coupling, Independent, OptimalTransport, SourceSamples
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.flow_matching import FlowMatching
from scoresde.loss.weighting import (
    EDMWeighting,
    LikelihoodWeighting,
    NoiseWeighting,
    VelocityWeighting,
    Weighting,
)

__all__ = [
    "Coupling",
    "CrossEntropy",
    "DenoisingScoreMatching",
    "Draw",
    "EDMWeighting",
    "FlowMatching",
    "Independent",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "NoiseWeighting",
    "OptimalTransport",
    "SourceSamples",
    "VelocityWeighting",
    "Weighting",
    "draw",
]
