"""Losses: one value per example, from a model and clean data."""

from scoresde.loss.base import BatchStreams, Draw, Given, Loss, LossTerms
from scoresde.loss.coupling import Coupling, Independent, OptimalTransport, SourceSamples
from scoresde.loss.cross_entropy import CrossEntropy
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.design import NoiseDesign
from scoresde.loss.elbo import ELBO, ReconstructionError
from scoresde.loss.flow_matching import FlowMatching
from scoresde.loss.hybrid import BoundLoss, HybridLoss
from scoresde.loss.importance import ImportanceSampled
from scoresde.loss.latent import LatentELBO
from scoresde.loss.one_level import OneLevel, only_time
from scoresde.loss.paired import (
    BridgeVelocityWeighting,
    DataWeighting,
    InterpolantMatching,
    Paired,
    PairWeighting,
)
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
    VelocityWeighting,
    Weighting,
)

__all__ = [
    "ELBO",
    "BatchStreams",
    "BoundLoss",
    "BoundWeighting",
    "BridgeVelocityWeighting",
    "Coupling",
    "CrossEntropy",
    "DataWeighting",
    "DenoisingScoreMatching",
    "Draw",
    "EDMWeighting",
    "ExplicitScoreMatching",
    "FlowMatching",
    "Given",
    "HybridLoss",
    "ImportanceSampled",
    "Independent",
    "InterpolantMatching",
    "LatentELBO",
    "LeastVariance",
    "LikelihoodWeighting",
    "Loss",
    "LossTerms",
    "MinSNRWeighting",
    "NoiseDesign",
    "NoiseWeighting",
    "OneLevel",
    "OptimalTransport",
    "PairWeighting",
    "Paired",
    "ReconstructionError",
    "ScheduleGradient",
    "ScoreMatching",
    "SlicedScoreMatching",
    "SoftMinSNRWeighting",
    "SourceSamples",
    "UncertaintyWeighted",
    "VariationalLoss",
    "VelocityWeighting",
    "Weighting",
    "WholeBound",
    "only_time",
]
