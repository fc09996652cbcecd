"""Inverse problems: models of examples given an observation."""

from scoresde.inverse.kernels import CovarianceKernel, IsotropicKernel, Kernel
from scoresde.inverse.methods import DPS, MMPS, TMPD, PiGDM
from scoresde.inverse.particles import Particles, Twisted
from scoresde.inverse.posterior import Local, Posterior
from scoresde.inverse.solver import solve
from scoresde.inverse.steps import DDNM, DPSStep, Replacement, SDEdit, StepRule
from scoresde.operators import (
    Blur,
    Downsampling,
    Fourier,
    Grey,
    Linear,
    Linearised,
    LinearOperator,
    Masking,
    NonLinear,
    Observation,
    Operator,
    RandomProjection,
    hole,
    random_mask,
)

__all__ = [
    "DDNM",
    "DPS",
    "MMPS",
    "TMPD",
    "Blur",
    "CovarianceKernel",
    "DPSStep",
    "Downsampling",
    "Fourier",
    "Grey",
    "IsotropicKernel",
    "Kernel",
    "Linear",
    "LinearOperator",
    "Linearised",
    "Local",
    "Masking",
    "NonLinear",
    "Observation",
    "Operator",
    "Particles",
    "PiGDM",
    "Posterior",
    "RandomProjection",
    "Replacement",
    "SDEdit",
    "StepRule",
    "Twisted",
    "hole",
    "random_mask",
    "solve",
]
