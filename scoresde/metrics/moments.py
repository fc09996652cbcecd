"""Moments and quantiles of features, to compare samples with data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.streams import random_rows

LEVELS = (0.05, 0.5, 0.95)
_ROWS, _FEATURES = 2**20, 1024  # used for moments, at most


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments and quantiles of each of F features, float64.

    Arguments:
        mean: The means, ``(F,)``.
        std: Standard deviations, ``(F,)``; 0 of a single row.
        quantiles: The 5th, 50th and 95th percentiles, ``(F, 3)``.
        correlation: The correlations, ``(F, F)``; 0 for a constant feature.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor
    correlation: Tensor

    @staticmethod
    def of(raw: Tensor) -> "Moments":
        """Computes moments of the columns of a table, or channels of images, signals or fields.

        Arguments:
            raw: Examples ``(N, D)`` or ``(N, C, *)``; a random subset is used if there are too
                many.

        Raises:
            InputError: If there is no example.
        """
        if raw.ndim < 1 or not raw.numel():
            raise InputError(
                f"raw must contain at least one example, (N, *), got shape {tuple(raw.shape)}."
            )
        x = features(raw)
        centred = x - x.mean(0)
        covariance = centred.T @ centred / len(x)
        std = covariance.diagonal().sqrt()
        scale = torch.where(std > 0, std, torch.inf)
        ordered = x.sort(0).values
        places = [round(level * (len(x) - 1)) for level in LEVELS]
        return Moments(x.mean(0), std, ordered[places].T, covariance / scale / scale[:, None])

    def discrepancy(self, other: "Moments") -> Tensor:
        """Returns the discrepancy of another set in each feature, ``(F,)``.

        It is the largest difference of mean, standard deviation and quantiles, in standard
        deviations of this set.
        """
        rows = [(m.mean[:, None], m.std[:, None], m.quantiles) for m in (self, other)]
        mine, theirs = (torch.cat(row, dim=1) for row in rows)
        off = (mine - theirs).abs().amax(1)
        return off / torch.where(self.std > 0, self.std, 1.0)

    def correlations_off(self, other: "Moments") -> tuple[float, int, int]:
        """Returns the largest difference of correlations, and its two features."""
        off = (self.correlation - other.correlation).abs()
        off.fill_diagonal_(0)
        place = int(off.argmax())
        i, j = sorted(divmod(place, len(off)))
        return float(off.flatten()[place]), i, j


def subset(x: Tensor, count: int) -> Tensor:
    """Returns at most ``count`` random rows, since neighbours in a file are often similar.

    Example:
        >>> subset(torch.arange(3), 3), len(subset(torch.arange(7), 3))
        (tensor([0, 1, 2]), 3)
    """
    return x if len(x) <= count else x[random_rows(len(x), count).to(x.device)]


def features(raw: Tensor) -> Tensor:
    """Returns rows of features, float64 ``(M, F)``: columns, or channels at every position.

    Example:
        >>> features(torch.zeros(5, 13)).shape, features(torch.zeros(5, 3, 8, 8)).shape
        (torch.Size([5, 13]), torch.Size([320, 3]))
    """
    x = raw.reshape(len(raw), -1) if raw.ndim < 3 else raw.flatten(2)
    if x.ndim == 3:
        x = subset(x, max(1, _ROWS // x.shape[2])).movedim(1, 2).flatten(0, 1)
    return subset(x[:, :_FEATURES], _ROWS).double()
