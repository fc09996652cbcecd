"""Nearest training examples, to find copies among samples."""

from collections.abc import Iterable

import torch
from torch import Tensor

from scoresde.errors import InputError


def nearest(x: Tensor, train: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the nearest training example of each example, and its Euclidean distance.

    Arguments:
        x: Examples, with shape ``(M, *)``.
        train: Training examples in parts, each with shape ``(n, *)``, in order.

    Returns:
        The distances, float64 ``(M,)``, and the indices, int64 ``(M,)``.

    Raises:
        InputError: If there is no training example.

    Example:
        >>> nearest(torch.tensor([[0.0, 1.0]]), [torch.tensor([[5.0, 1.0], [3.0, 5.0]])])
        (tensor([5.], dtype=torch.float64), tensor([0]))
    """
    points = x.double().flatten(1)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    which, first = torch.full((len(x),), -1), 0
    for part in train:
        rows = part.double().flatten(1)
        # A matrix product finds the nearest; its distance is then computed without cancellation.
        index = (rows.square().sum(1) - 2 * points @ rows.T).argmin(1)
        distance = (points - rows[index]).square().sum(1).sqrt()
        closer = distance < best
        best = torch.where(closer, distance, best)
        which = torch.where(closer, index + first, which)
        first += len(part)
    if first == 0:
        raise InputError("train must contain at least one example, got none.")
    return best, which
