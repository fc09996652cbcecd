r"""Operators that measure examples, and observations made with them.

An observation is :math:`y = A(x_0) + n` with Gaussian noise :math:`n`. The operator :math:`A` is
an :class:`Operator`. Most operators are a :class:`LinearOperator`, which has a transpose and often
a pseudo-inverse. An :class:`Observation` adds the measurements :math:`y`, the standard deviation
of their noise, and the codec, if :math:`y` is in raw units.
"""

from scoresde.operators.base import LinearOperator, Operator
from scoresde.operators.functions import Linear, NonLinear, RandomProjection
from scoresde.operators.observation import Linearised, Observation
from scoresde.operators.pixels import Downsampling, Grey, Masking, hole, random_mask
from scoresde.operators.spectrum import Blur, Fourier

__all__ = [
    "Blur",
    "Downsampling",
    "Fourier",
    "Grey",
    "Linear",
    "LinearOperator",
    "Linearised",
    "Masking",
    "NonLinear",
    "Observation",
    "Operator",
    "RandomProjection",
    "hole",
    "random_mask",
]
