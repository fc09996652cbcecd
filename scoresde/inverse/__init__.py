"""Inverse problems: models of the examples that agree with an observation."""

from scoresde.inverse.steps import DDNM, DPSStep, Replacement, SDEdit
from scoresde.operators import (
    Blur,
    Downsampling,
    Fourier,
    Grey,
    Linear,
    LinearOperator,
    Masking,
    NonLinear,
    Observation,
    Operator,
    RandomProjection,
)

__all__ = [
    "DDNM",
    "Blur",
    "DPSStep",
    "Downsampling",
    "Fourier",
    "Grey",
    "Linear",
    "LinearOperator",
    "Masking",
    "NonLinear",
    "Observation",
    "Operator",
    "RandomProjection",
    "Replacement",
    "SDEdit",
]
