"""Inverse problems: models of the examples that agree with an observation."""

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
    "Blur",
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
]
