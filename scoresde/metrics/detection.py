r"""Separation of two data sets by a number for each example.

The area under the ROC curve is the probability that an example of the first set has the larger
number than one of the second, ties counting half,

.. math:: A = P(X > Y) + \tfrac12 P(X = Y),

the statistic of Mann and Whitney divided by :math:`m n`. Its standard error is DeLong's: with
:math:`V_i` the share of the second set below the i-th example of the first, and :math:`W_j` the
share of the first above the j-th of the second, :math:`\sqrt{s_V^2 / m + s_W^2 / n}`.

References:
    Hanley and McNeil, *The meaning and use of the area under a ROC curve*, 1982.
    DeLong, DeLong and Clarke-Pearson, *Comparing the areas under two or more correlated ROC
    curves*, 1988.
"""

import math

import torch
from torch import Tensor

from scoresde.errors import InputError


def auroc(larger: Tensor, smaller: Tensor) -> tuple[float, float]:
    """Returns the area under the ROC curve and its standard error.

    Arguments:
        larger: Numbers of the set that should have the larger ones, ``(m,)``, finite.
        smaller: Numbers of the other set, ``(n,)``, finite.

    Raises:
        InputError: If one is empty or not finite.

    Example:
        >>> auroc(torch.tensor([3.0, 2.0]), torch.tensor([2.0, 1.0]))[0]
        0.875
    """
    for name, values in (("larger", larger), ("smaller", smaller)):
        bad = int((~values.isfinite()).sum())
        if values.ndim != 1 or len(values) == 0 or bad:
            raise InputError(
                f"{name} must be finite, with shape (n,) and n at least 1, got shape "
                f"{tuple(values.shape)} with {bad} infinite or NaN values."
            )
    x, y = larger.double(), smaller.double()
    above, below = _share_below(x, y), 1 - _share_below(y, x)
    error = math.sqrt(_variance(above) / len(x) + _variance(below) / len(y))
    return float(above.mean()), error


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Returns the fraction of ``others`` below each value, with ties counted as half."""
    ordered = others.sort().values
    left = torch.searchsorted(ordered, values)
    right = torch.searchsorted(ordered, values, right=True)
    return 0.5 * (left + right).double() / len(others)


def _variance(values: Tensor) -> float:
    return float(values.var()) if len(values) > 1 else math.nan
