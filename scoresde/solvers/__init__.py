"""ODE and SDE solvers, independent of diffusion models."""

from scoresde.solvers.base import Method, Solution
from scoresde.solvers.brownian import BrownianPath
from scoresde.solvers.ode import AdaptiveODE
from scoresde.solvers.runge_kutta import BogackiShampine, DormandPrince, RungeKutta, Tsitouras
from scoresde.solvers.sde import BrownianInterval, Increments, Motion, Path, SDESolver
from scoresde.solvers.shared_step import TorchDiffEq
from scoresde.solvers.stochastic_heun import StochasticHeun

__all__ = [
    "AdaptiveODE",
    "BogackiShampine",
    "BrownianInterval",
    "BrownianPath",
    "DormandPrince",
    "Increments",
    "Method",
    "Motion",
    "Path",
    "RungeKutta",
    "SDESolver",
    "Solution",
    "StochasticHeun",
    "TorchDiffEq",
    "Tsitouras",
]
