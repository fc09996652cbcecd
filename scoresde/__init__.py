"""Score-based generative modelling with stochastic and ordinary differential equations.

The library has six concepts:

- A **process** (:class:`Interpolant`, :class:`SDE`) defines how an example is turned into noise
  or another example.
- A **model** (:class:`ScoreModel`) is a network plus a process.
- A **loss** evaluates a model on a batch.
- A **sampler** or a **likelihood** (:class:`Likelihood`) is an object that is applied to a model.
- A **codec** converts between the user's data and the values that a model uses.
- A **task** connects them.

The names below are imported when they are first used, so ``import scoresde`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoresde.errors import InputError, SolverError
    from scoresde.likelihood import Likelihood, LogLikelihood, VariationalBound
    from scoresde.loss import (
        DenoisingScoreMatching,
        EDMWeighting,
        FlowMatching,
        LikelihoodWeighting,
        Loss,
        NoiseWeighting,
    )
    from scoresde.model import (
        ChainIndex,
        DataParametrisation,
        GaussianMixtureModel,
        GaussianModel,
        Model,
        NoiseLevel,
        NoiseParametrisation,
        Preconditioned,
        ScaledTime,
        ScoreFunction,
        ScoreModel,
        ScoreParametrisation,
        VelocityParametrisation,
        VParametrisation,
    )
    from scoresde.sde import (
        SDE,
        VESDE,
        VPSDE,
        Cutoffs,
        DiscreteVP,
        Interpolant,
        LearnedSchedule,
        RectifiedFlow,
        SubVPSDE,
    )
    from scoresde.train import fit, load

__version__ = "0.1.0"

_ROOMS = {
    "errors": ("InputError", "SolverError"),
    "sde": (
        *("SDE", "VESDE", "VPSDE", "Cutoffs", "DiscreteVP", "SubVPSDE"),
        *("Interpolant", "LearnedSchedule", "RectifiedFlow"),
    ),
    "model": (
        *("ChainIndex", "NoiseLevel", "ScaledTime"),
        *("DataParametrisation", "NoiseParametrisation", "Preconditioned"),
        *("ScoreParametrisation", "VParametrisation", "VelocityParametrisation"),
        *("Model", "GaussianMixtureModel", "GaussianModel", "ScoreFunction", "ScoreModel"),
    ),
    "train": ("fit", "load"),
    "likelihood": ("Likelihood", "LogLikelihood", "VariationalBound"),
    "loss": (
        *("Loss", "DenoisingScoreMatching", "FlowMatching"),
        *("EDMWeighting", "LikelihoodWeighting", "NoiseWeighting"),
    ),
}
_HOMES = {name: f"scoresde.{room}" for room, names in _ROOMS.items() for name in names}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'scoresde' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
