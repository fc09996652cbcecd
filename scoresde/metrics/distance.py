"""Distances between two sets of samples."""

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 128, seed: int = 0) -> float:
    r"""Returns the sliced 2-Wasserstein distance between two sets of samples.

    .. math:: SW_2^2 = \mathbb{E}_\theta \int_0^1
              \bigl( F_{\theta \cdot x}^{-1}(q) - F_{\theta \cdot y}^{-1}(q) \bigr)^2 dq

    Along each direction the empirical quantile functions are compared exactly. Two sets from the
    same distribution have a distance of order :math:`n^{-1/2}`, not 0: compare with the distance
    between two halves of the data.

    References:
        Bonneel et al., *Sliced and Radon Wasserstein barycenters of measures*, 2015.

    Arguments:
        x: Samples, with shape ``(N, *)``.
        y: Samples, with shape ``(M, *)``.
        projections: Number of random directions :math:`\theta` on the unit sphere.
        seed: Seed of the directions.

    Returns:
        The distance, in the units of the samples.

    Example:
        Along a line, all mass moves by the same distance.

        >>> x = torch.tensor([[0.0], [1.0]])
        >>> sliced_wasserstein(x, x + 3)
        3.0
    """
    if x.shape[1:] != y.shape[1:] or x.ndim < 2 or x.numel() == 0 or y.numel() == 0:
        raise InputError(
            f"x and y must be non-empty with shapes (N, *) and (M, *), got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    if projections < 1:
        raise InputError(f"projections must be at least 1, got {projections}.")
    x, y = x.flatten(1).double(), y.flatten(1).double()
    streams = Streams.of(seed, batch=projections, device=x.device)
    directions = streams.normal(x.shape[1:], Purpose.PROBE, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).T
    levels, widths = _common_levels(len(x), len(y), x.device)
    gap = _quantiles(x @ directions, levels) - _quantiles(y @ directions, levels)
    return float((widths @ gap.square()).mean().sqrt())


def _common_levels(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the midpoints and widths of the intervals on which both quantiles are constant."""
    steps = [torch.arange(k + 1, device=device).double() / k for k in (n, m)]
    ends = torch.cat(steps).sort().values
    return 0.5 * (ends[1:] + ends[:-1]), ends.diff()


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Returns the empirical quantiles of each column at levels in [0, 1]."""
    index = (levels * len(values)).long().clamp(max=len(values) - 1)
    return values.sort(0).values[index]
