"""Score-based generative modelling with stochastic and ordinary differential equations.

The story in five nouns: an :class:`SDE` says how data becomes noise; a :class:`ScoreModel` is a
network plus an SDE; a loss grades it on data; a sampler or a :class:`Likelihood` is a value that
is applied to it; a task wires them together.
"""

from scoresde.bound import VariationalBound
from scoresde.errors import InputError, SolverError
from scoresde.likelihood import Likelihood, LogLikelihood
from scoresde.loss import (
    DenoisingScoreMatching,
    EDMWeighting,
    LikelihoodWeighting,
    NoiseWeighting,
)
from scoresde.model import (
    ChainIndex,
    DataParametrisation,
    GaussianMixtureModel,
    GaussianModel,
    NoiseLevel,
    NoiseParametrisation,
    Preconditioned,
    ScaledTime,
    ScoreFunction,
    ScoreModel,
    ScoreParametrisation,
    VParametrisation,
)
from scoresde.sde import SDE, VESDE, VPSDE, Cutoffs, DiscreteVP, SubVPSDE

__version__ = "0.1.0"

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "ChainIndex",
    "Cutoffs",
    "DataParametrisation",
    "DenoisingScoreMatching",
    "DiscreteVP",
    "EDMWeighting",
    "GaussianMixtureModel",
    "GaussianModel",
    "InputError",
    "Likelihood",
    "LikelihoodWeighting",
    "LogLikelihood",
    "NoiseLevel",
    "NoiseParametrisation",
    "NoiseWeighting",
    "Preconditioned",
    "ScaledTime",
    "ScoreFunction",
    "ScoreModel",
    "ScoreParametrisation",
    "SolverError",
    "SubVPSDE",
    "VParametrisation",
    "VariationalBound",
]
