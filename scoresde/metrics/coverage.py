r"""Density and coverage: quality and diversity of samples, by nearest neighbours.

Each of N real examples has a ball whose radius is the distance to its k-th nearest real neighbour.
With M samples

.. math:: \text{density} = \frac{1}{k M} \sum_{j=1}^M \#\{i : y_j \in B_i\}, \qquad
          \text{coverage} = \frac1N \, \#\{i : \exists j, \; y_j \in B_i\} .

For samples from the law of the data, regardless of this law, the expected density is 1, and the
expected coverage is :func:`expected_coverage`. Samples outside the data reduce the density.
Samples of only a part of the data reduce the coverage. Distances are Euclidean.

References:
    Naeem et al., *Reliable fidelity and diversity metrics for generative models*, 2020,
    https://arxiv.org/abs/2002.09797 (equations 3 and 4); here a point on a ball's surface counts.
"""

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count

_BLOCK = 2048  # rows of a matrix of distances


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Returns the density and the coverage of samples.

    Arguments:
        real: Real examples, with shape ``(N, *)``, N above k.
        generated: Samples, with shape ``(M, *)``.
        k: Number of neighbours, positive.

    Raises:
        InputError: If there are too few examples, or the shapes differ.

    Example:
        >>> x = torch.arange(20.0)[:, None]
        >>> density_coverage(x, x, k=2), density_coverage(x, x + 100, k=2)
        ((1.5, 1.0), (0.0, 0.0))
    """
    check_count("k", k)
    if real.shape[1:] != generated.shape[1:] or len(real) <= k or not len(generated):
        raise InputError(
            f"real must have more than k={k} examples, and generated at least one of the same "
            f"shape, got {tuple(real.shape)} and {tuple(generated.shape)}."
        )
    x, y = (values.double().flatten(1) for values in (real, generated))
    inside, covered = 0, 0
    for rows in x.split(_BLOCK):
        # The nearest of all is the example itself.
        radius = torch.cdist(rows, x).kthvalue(k + 1, 1, keepdim=True).values
        within = torch.cdist(rows, y) <= radius
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return inside / (k * len(y)), covered / len(x)


def expected_coverage(count: int, samples: int, k: int = 5) -> float:
    r"""Returns the expected coverage of samples from the law of the data, for any continuous law.

    .. math:: 1 - \prod_{j=1}^k \frac{N - j}{N + M - j}

    Arguments:
        count: Number N of real examples, above k.
        samples: Number M of samples, positive.
        k: Number of neighbours, positive.

    Example:
        >>> round(expected_coverage(500, 500), 4)
        0.9692
    """
    missed = 1.0
    for j in range(1, k + 1):
        missed *= (count - j) / (count + samples - j)
    return 1 - missed
