"""Means with standard errors."""

import math
from dataclasses import dataclass

from torch import Tensor

from scoresde.errors import InputError


@dataclass(frozen=True)
class Estimate:
    r"""The mean of independent values, with its standard error :math:`s / \sqrt{n}`.

    Arguments:
        mean: The mean.
        standard_error: Its standard error; NaN for a single value.
        count: Number of values.

    Example:
        >>> import torch
        >>> print(Estimate.of(torch.tensor([1.0, 2.0, 3.0])))
        2.000 ± 0.577
    """

    mean: float
    standard_error: float
    count: int

    @staticmethod
    def of(values: Tensor) -> "Estimate":
        """Estimates the mean of values, one per example, with shape ``(N,)``."""
        if values.ndim != 1 or len(values) == 0:
            raise InputError(
                "values must have shape (N,), one value per example and at least one, got "
                f"{tuple(values.shape)}."
            )
        n, values = len(values), values.double()
        error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
        return Estimate(float(values.mean()), error, n)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"
