"""Inverse problems: models of the examples that agree with an observation."""

from scoresde.inverse.methods import DPS, MMPS, TMPD, PiGDM
from scoresde.inverse.posterior import Local, Posterior
from scoresde.inverse.solver import solve
from scoresde.inverse.steps import DDNM, DPSStep, Replacement, SDEdit
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
)

__all__ = [
    "DDNM",
    "DPS",
    "MMPS",
    "TMPD",
    "Blur",
    "DPSStep",
    "Downsampling",
    "Fourier",
    "Grey",
    "Linear",
    "LinearOperator",
    "Linearised",
    "Local",
    "Masking",
    "NonLinear",
    "Observation",
    "Operator",
    "PiGDM",
    "Posterior",
    "RandomProjection",
    "Replacement",
    "SDEdit",
    "solve",
]
