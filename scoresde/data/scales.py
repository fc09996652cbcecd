r"""Comparison of the size of data with the noise of a process.

A model learns data with noise of every size from :math:`\sigma / \alpha` at the training cut-off
to that at :math:`t = 1`. A feature, or a combination of features, that varies less than the
smallest noise is not resolved. Data larger than the largest noise are still distinguishable from
the prior at the start of sampling. If two columns are nearly equal, the small combination is their
difference. It is measured by the smallest *principal* standard deviation, the root of the smallest
eigenvalue of the covariance.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.data.base import Dataset
from scoresde.sde import SDE
from scoresde.streams import Streams, random_rows

_EXAMPLES = 4096
_NUMBERS = 2**21  # numbers to examine, at most
_FEATURES = 512  # features in a covariance, at most
_RESOLVED = 0.02  # relative to the size of the data: about the error of a network
_LOADING = 0.3  # relative to the largest: loadings that are part of a combination
_SIGNAL = 0.1  # relative to the noise: the largest acceptable signal at t = 1
_LEAST_ALPHA = 0.01
_NAMED = 8


def check_scales(data: Dataset, process: object, eps: float | None = None) -> list[str]:
    """Compares the size of data in model units with the noise of a process.

    It uses a few thousand training examples, and a covariance of at most 512 features. Quantised
    data may have arbitrarily small features, since their step is known.

    Arguments:
        data: The data set.
        process: Process of the model; if it is not an SDE, nothing is compared.
        eps: Training cut-off. If None, that of the SDE.

    Returns:
        One sentence for each problem, with the names of the features; an empty list if no
        problem is found.

    Example:
        >>> from scoresde import VPSDE
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> x[:, 2] = x[:, 0]
        >>> check_scales(Dataset.of("tied", [x] * 3), VPSDE())[0][:52]
        'Columns 0, 2 are nearly tied: a combination of them '
    """
    if not isinstance(process, SDE):
        return []
    count = min(_EXAMPLES, max(2, _NUMBERS // math.prod(data.shape)))
    streams = Streams(0, random_rows(len(data.train), count))
    x = data.batch("train", streams).x.flatten(1).double().cpu()
    shape, least = data.shape, _noise(process, process.cutoffs.training if eps is None else eps)
    found = _large(x, shape, process)
    if data.levels is None and len(x) > 1:
        found += _small(x, shape, least)
    return found


def _noise(sde: SDE, t: float) -> float:
    """Returns the standard deviation of the noise relative to data of size 1."""
    time = torch.tensor(t, dtype=torch.float64)
    with torch.no_grad():
        return float(sde.sigma(time) / sde.alpha(time).clamp(min=_LEAST_ALPHA))


def _large(x: Tensor, shape: Sequence[int], sde: SDE) -> list[str]:
    size, noise = x.square().mean(0).sqrt(), _noise(sde, 1.0)
    bound = _SIGNAL * noise
    large = (size > bound).nonzero().flatten()
    if len(large) == 0:
        return []
    return [
        f"{_names(large, shape)} of size up to {float(size.max()):.3g} in model units must be at "
        f"most {bound:.3g}, a tenth of the noise at t = 1, or sampling starts from a wrong prior "
        "and the network receives numbers far from 1; standardise the data, or use a process with "
        "more noise."
    ]


def _small(x: Tensor, shape: Sequence[int], least: float) -> list[str]:
    std, size = x.std(0, correction=0), float(x.square().mean().sqrt())
    bound = max(least, _RESOLVED * size)
    low = (std < bound) & (x != 0).any(0)  # a constant known to the codec is 0
    found = []
    if bool(low.any()):
        found.append(
            f"{_names(low.nonzero().flatten(), shape)} of standard deviation down to "
            f"{float(std[low].min()):.2g} in model units must be above the least noise, "
            f"{least:.2g}, and above a fiftieth of the data's size, {size:.2g}, or samples of "
            "them are noise; standardise each separately, or remove them."
        )
    kept = ((std > 0) & ~low).nonzero().flatten()
    if 2 <= len(kept) <= _FEATURES and len(x) > 2 * len(kept):
        found += _tied(x[:, kept], kept, shape, least, bound)
    return found


def _tied(x: Tensor, kept: Tensor, shape: Sequence[int], least: float, bound: float) -> list[str]:
    """Describes the combination of features that varies least, if it varies too little."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    std = values.clamp(min=0).sqrt()
    count = int((std < bound).sum())
    if count == 0:
        return []
    loading = vectors[:, 0].abs()
    together = loading > _LOADING * loading.max()
    together[loading.topk(2).indices] = True  # a tie has at least two features
    part = kept[together]
    more = f" (and {count - 1} more)" if count > 1 else ""
    return [
        f"{_names(part, shape)} are nearly tied: a combination of them has the standard deviation "
        f"{float(std[0]):.2g} in model units{more}, but the least noise is {least:.2g} and a "
        f"network resolves about {bound:.2g}. Samples do not preserve the tie, and log-densities "
        "depend on it; remove one of them, or replace it by their difference."
    ]


def _names(features: Tensor, shape: Sequence[int]) -> str:
    """Formats features by their indices: ``Columns 0, 3``, or ``Features (0, 1, 1)``."""
    axes = torch.unravel_index(features, tuple(shape))
    places = [tuple(map(int, place)) for place in zip(*axes, strict=True)]
    words = [str(p[0] if len(p) == 1 else p) for p in places[:_NAMED]]
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    kind = "Column" if len(shape) == 1 else "Feature"
    return f"{kind}{'s' if len(places) > 1 else ''} {', '.join(words)}{more}"
