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
    Predictor,
    ReverseDiffusionPredictor,
)
from scoresde.sample.probability_flow import ProbabilityFlow

__all__ = [
    "AncestralPredictor",
    "AnnealedLangevin",
    "BatchMeanNorm",
    "Corrector",
    "EulerMaruyama",
    "EulerMaruyamaPredictor",
    "GridSampler",
    "Langevin",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseDiffusionPredictor",
    "Sampler",
    "Samples",
    "ShrunkNorm",
    "Step",
    "StepRule",
    "TorchSDE",
]
