r"""Density and coverage: how good and how varied samples are, by nearest neighbours.

Around each of N real examples lies the ball that reaches to its k-th nearest real neighbour. With
M samples

.. math:: \text{density} = \frac{1}{k M} \sum_{j=1}^M \#\{i : y_j \in B_i\}, \qquad
          \text{coverage} = \frac1N \, \#\{i : \exists j, \; y_j \in B_i\} .

For samples of the law of the data, whatever it is, the expected density is 1, and that of the
coverage is :func:`expected_coverage`. Samples outside of the data lower the density, samples of a
part of the data the coverage. Distances are Euclidean.

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
        k: The number of neighbours, positive.

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
            f"real and generated must be more than {k} and at least 1 examples of one shape, got "
            f"{tuple(real.shape)} and {tuple(generated.shape)}."
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
    r"""Returns the expected coverage of samples of the law of the data, for any continuous law.

    .. math:: 1 - \prod_{j=1}^k \frac{N - j}{N + M - j}

    Arguments:
        count: The number N of real examples, above k.
        samples: The number M of samples, positive.
        k: The number of neighbours, positive.

    Example:
        >>> round(expected_coverage(500, 500), 4)
        0.9692
    """
    missed = 1.0
    for j in range(1, k + 1):
        missed *= (count - j) / (count + samples - j)
    return 1 - missed
