"""Integrators that know nothing of diffusion."""

from scoresde.solvers.ode import AdaptiveODE
from scoresde.solvers.sde import BrownianIncrements, FixedStepSDE

__all__ = ["AdaptiveODE", "BrownianIncrements", "FixedStepSDE"]
