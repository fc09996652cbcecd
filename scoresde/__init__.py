"""Score-based generative modelling with stochastic and ordinary differential equations.

The library in six nouns: a **process** (:class:`Interpolant`, :class:`SDE`) says how an example is
turned into something else; a **model** (:class:`ScoreModel`) is a network plus a process; a
**loss** evaluates it on a batch; a **sampler** or a **likelihood** (:class:`Likelihood`) is a
value that is applied to it; a **codec** stands between the user's data and the model; a **task**
wires them together.

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
        *("ScoreParametrisation", "VParametrisation"),
        *("Model", "GaussianMixtureModel", "GaussianModel", "ScoreFunction", "ScoreModel"),
    ),
    "train": ("fit", "load"),
    "likelihood": ("Likelihood", "LogLikelihood", "VariationalBound"),
    "loss": (
        *("Loss", "DenoisingScoreMatching"),
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
