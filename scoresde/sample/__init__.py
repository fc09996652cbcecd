"""Samplers, which turn noise or a source into data by the reverse SDE or the probability flow."""

from scoresde.recipe import renamed
from scoresde.sample.annealed_langevin import AnnealedLangevinDynamics
from scoresde.sample.base import (
    FinalState,
    GridSampler,
    Noise,
    ProgressReporter,
    Sampler,
    Samples,
    Step,
)
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
from scoresde.sample.exponential import HalfLogSNR, RelativeNoise, Time, Variable
from scoresde.sample.gotta_go_fast import GottaGoFast
from scoresde.sample.langevin import LangevinDynamics
from scoresde.sample.multistep import DEIS, IPNDM, DPMSolverPP, DPMSolverPPSDE, UniPC
from scoresde.sample.plan import LinearUpdate, Node, PlannedSampler, Stage, run_stages
from scoresde.sample.predictor_corrector import PredictorCorrector
from scoresde.sample.predictors import (
    AncestralPredictor,
    ChainPredictor,
    EulerMaruyamaPredictor,
    Interval,
    Predictor,
    ReverseDiffusionPredictor,
)
from scoresde.sample.probability_flow import ProbabilityFlow
from scoresde.sample.reference import ReferencePredictorCorrector
from scoresde.sample.restart import Restart, RestartInterval
from scoresde.sample.restore import InterpolantSDE, Restore
from scoresde.sample.single_step import SEEDS, DPMSolver, Heun
from scoresde.sample.torch_sde import TorchSDE
from scoresde.sample.trajectory import Trajectory, sample_trajectory, slerp

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "SEEDS",
    "AncestralPredictor",
    "AnnealedLangevin",
    "AnnealedLangevinDynamics",
    "BatchMeanNorm",
    "ChainPredictor",
    "Corrector",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverPPSDE",
    "Euler",
    "EulerMaruyama",
    "EulerMaruyamaPredictor",
    "FinalState",
    "GottaGoFast",
    "GridSampler",
    "HalfLogSNR",
    "Heun",
    "InterpolantSDE",
    "Interval",
    "Langevin",
    "LangevinDynamics",
    "LinearUpdate",
    "Node",
    "Noise",
    "PlannedSampler",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ProgressReporter",
    "ReferencePredictorCorrector",
    "RelativeNoise",
    "Restart",
    "RestartInterval",
    "Restore",
    "ReverseDiffusionPredictor",
    "Sampler",
    "Samples",
    "ShrunkNorm",
    "Stage",
    "Step",
    "StepRule",
    "Time",
    "TorchSDE",
    "Trajectory",
    "UniPC",
    "Variable",
    "run_stages",
    "sample_trajectory",
    "slerp",
]

__getattr__ = renamed(__name__)
