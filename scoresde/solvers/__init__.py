"""Integrators that know nothing of diffusion."""

from scoresde.solvers.base import Method, Solution
from scoresde.solvers.ode import AdaptiveODE
from scoresde.solvers.runge_kutta import BogackiShampine, DormandPrince, RungeKutta, Tsitouras
from scoresde.solvers.sde import BrownianIncrements, FixedStepSDE
from scoresde.solvers.shared_step import TorchDiffEq

__all__ = [
    "AdaptiveODE",
    "BogackiShampine",
    "BrownianIncrements",
    "DormandPrince",
    "FixedStepSDE",
    "Method",
    "RungeKutta",
    "Solution",
    "TorchDiffEq",
    "Tsitouras",
]
