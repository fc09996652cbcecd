"""Log-likelihoods: exact values, bounds, cut-offs, the flow and its clocks, classification."""

from scoresde.codec import Decoder, DiscretisedGaussian, GaussianDecoder, Levels
from scoresde.likelihood.base import LogProb, LogProbResult
from scoresde.likelihood.bound import BoundResult, VariationalBound
from scoresde.likelihood.classifier import Classification, GenerativeClassifier
from scoresde.likelihood.clock import Clock, NoiseClock, TimeClock
from scoresde.likelihood.cutoff import Cutoff, PlainCutoff, RescaledCutoff, VariationalCutoff
from scoresde.likelihood.discrete import DiscreteBound, DiscreteBoundResult
from scoresde.likelihood.exact import Likelihood, LogLikelihood
from scoresde.likelihood.flow import Flow, FlowSolution, as_trace
from scoresde.likelihood.latent import LatentBound, LatentBoundResult
from scoresde.likelihood.learned_range import LearnedRange
from scoresde.likelihood.prior import prior_kl, prior_mismatch, spectrum
from scoresde.likelihood.variance import (
    ForwardVariance,
    PosteriorVariance,
    ReferenceVariance,
    Variance,
)

__all__ = [
    "BoundResult",
    "Classification",
    "Clock",
    "Cutoff",
    "Decoder",
    "DiscreteBound",
    "DiscreteBoundResult",
    "DiscretisedGaussian",
    "Flow",
    "FlowSolution",
    "ForwardVariance",
    "GaussianDecoder",
    "GenerativeClassifier",
    "LatentBound",
    "LatentBoundResult",
    "LearnedRange",
    "Levels",
    "Likelihood",
    "LogLikelihood",
    "LogProb",
    "LogProbResult",
    "NoiseClock",
    "PlainCutoff",
    "PosteriorVariance",
    "ReferenceVariance",
    "RescaledCutoff",
    "TimeClock",
    "Variance",
    "VariationalBound",
    "VariationalCutoff",
    "as_trace",
    "prior_kl",
    "prior_mismatch",
    "spectrum",
]
