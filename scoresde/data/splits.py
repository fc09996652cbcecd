"""Splits without leakage: equal examples are in the same part."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.data.checks import check_finite
from scoresde.errors import InputError
from scoresde.shapes import check_tensor
from scoresde.streams import Purpose, Streams

FRACTIONS = (0.8, 0.1, 0.1)
_DRAW = 2**32 - 1  # distinct from the draws of toy data with the same seed


def split_indices(
    raw: Tensor, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> tuple[Tensor, ...]:
    """Splits examples at random, with byte-equal examples in the same part.

    Otherwise a test set would measure memorisation, since it could contain training examples.

    Arguments:
        raw: Raw examples, with shape ``(N, *)``.
        fractions: Fraction of each part, positive; they sum to one.
        seed: Seed of the split, which is the same on every machine.

    Returns:
        The indices of each part in ascending order, int64.

    Raises:
        InputError: If the fractions are invalid, or a part is empty.

    Example:
        >>> [len(part) for part in split_indices(torch.arange(20.0))]
        [16, 2, 2]
    """
    fractions = check_fractions(fractions)
    group = _groups(raw)
    counts = torch.bincount(group)
    keys = Streams.of(seed, batch=len(counts)).uniform((), Purpose.DATA, _DRAW, torch.float64)
    order = torch.argsort(keys, stable=True)
    start = torch.empty_like(counts)
    start[order] = counts[order].cumsum(0) - counts[order]
    ends = torch.tensor(fractions, dtype=torch.float64).cumsum(0)[:-1].mul(len(raw)).round().long()
    part = torch.searchsorted(ends, start[group], right=True)
    parts = tuple(torch.nonzero(part == i).flatten() for i in range(len(fractions)))
    if not all(len(indices) for indices in parts):
        raise InputError(
            f"fractions must leave no part empty, got {fractions} of {len(raw)} examples "
            f"({len(counts)} distinct), with parts of {[len(indices) for indices in parts]}; use "
            "more examples or other fractions."
        )
    return parts


def make_splits(
    raw: Tensor, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> tuple[Tensor, ...]:
    """Splits examples into training, validation and test, as :func:`split_indices` does.

    Raises:
        InputError: Also if there are not three fractions, or an example has a NaN.
    """
    check_fractions(fractions, parts=3)
    check_tensor(raw, "raw")
    if raw.is_floating_point():
        check_finite(raw)
    return tuple(raw[indices.to(raw.device)] for indices in split_indices(raw, fractions, seed))


def check_fractions(fractions: Sequence[float], parts: int | None = None) -> tuple[float, ...]:
    """Returns the fractions of the parts after a check."""
    shares = tuple(float(share) for share in fractions)
    valid = all(share > 0 for share in shares) and abs(sum(shares) - 1) < 1e-6
    if not valid or len(shares) < 2 or len(shares) != (parts or len(shares)):
        raise InputError(
            f"fractions must be {parts or 'two or more'} positive numbers that sum to 1, such as "
            f"{FRACTIONS}, got {shares}."
        )
    return shares


def _groups(raw: Tensor) -> Tensor:
    """Numbers the distinct examples in the order of their first appearance: (N,), int64."""
    seen: dict[bytes, int] = {}
    rows = raw.cpu().contiguous().numpy()
    return torch.tensor([seen.setdefault(row.tobytes(), len(seen)) for row in rows])
