"""Samplers: from noise to data along the reverse SDE or the probability-flow ODE."""

from scoresde.sample.annealed_langevin import AnnealedLangevinDynamics
from scoresde.sample.base import GridSampler, Sampler, Samples, Step
from scoresde.sample.correctors import (
    AnnealedLangevin,
    BatchMeanNorm,
    Corrector,
    Langevin,
    ShrunkNorm,
    StepRule,
)
from scoresde.sample.ddim import DDIM, Euler
from scoresde.sample.euler_maruyama import EulerMaruyama
from scoresde.sample.exponential import HalfLogSNR, NoiseLevel, Time, Variable
from scoresde.sample.gotta_go_fast import GottaGoFast
from scoresde.sample.multistep import DEIS, IPNDM, DPMSolverPP, DPMSolverPPSDE, UniPC
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
from scoresde.sample.restart import Loop, Restart
from scoresde.sample.single_step import SEEDS, DPMSolver, Heun
from scoresde.sample.torch_sde import TorchSDE
from scoresde.sample.trajectory import Trajectory, slerp, trace

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "SEEDS",
    "AncestralPredictor",
    "AnnealedLangevin",
    "AnnealedLangevinDynamics",
    "BatchMeanNorm",
    "Corrector",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverPPSDE",
    "Euler",
    "EulerMaruyama",
    "EulerMaruyamaPredictor",
    "GottaGoFast",
    "GridSampler",
    "HalfLogSNR",
    "Heun",
    "Interval",
    "Langevin",
    "Loop",
    "NoiseLevel",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReferencePredictorCorrector",
    "Restart",
    "ReverseDiffusionPredictor",
    "Sampler",
    "Samples",
    "ShrunkNorm",
    "Step",
    "StepRule",
    "Time",
    "TorchSDE",
    "Trajectory",
    "UniPC",
    "Variable",
    "slerp",
    "trace",
]
