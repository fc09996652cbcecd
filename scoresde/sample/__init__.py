"""Samplers: from noise to data along the reverse SDE or the probability-flow ODE."""

from scoresde.sample.base import GridSampler, Sampler, Samples, Step
from scoresde.sample.correctors import (
    AnnealedLangevin,
    BatchMeanNorm,
    Corrector,
    Langevin,
    ShrunkNorm,
    StepRule,
)
from scoresde.sample.euler_maruyama import EulerMaruyama, TorchSDE
from scoresde.sample.predictor_corrector import PredictorCorrector
from scoresde.sample.predictors import (
    AncestralPredictor,
    EulerMaruyamaPredictor,
    Interval,
    Predictor,
    ReverseDiffusionPredictor,
)
from scoresde.sample.probability_flow import ProbabilityFlow
from scoresde.sample.reference import ReferencePredictorCorrector

__all__ = [
    "AncestralPredictor",
    "AnnealedLangevin",
    "BatchMeanNorm",
    "Corrector",
    "EulerMaruyama",
    "EulerMaruyamaPredictor",
    "GridSampler",
    "Interval",
    "Langevin",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReferencePredictorCorrector",
    "ReverseDiffusionPredictor",
    "Sampler",
    "Samples",
    "ShrunkNorm",
    "Step",
    "StepRule",
    "TorchSDE",
]
