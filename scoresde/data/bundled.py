"""Real data from an installed library, without a download."""

from collections.abc import Sequence

import torch

from scoresde.data.base import Dataset
from scoresde.data.splits import FRACTIONS, check_fractions, split_indices


def digits(fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Dataset:
    """1797 scans of handwritten digits in 8 x 8 pixels of 17 levels, with labels.

    Each pixel counts the dark ones among 4 x 4 finer pixels, hence the levels 0 to 16.

    References:
        Alpaydin and Kaynak, *Optical recognition of handwritten digits*, UCI, 1998; the test
        set, from ``sklearn.datasets.load_digits``.

    Arguments:
        fractions: Fractions of training, validation and test examples.
        seed: Seed of the splits.

    Example:
        >>> dataset = digits()
        >>> dataset.shape, dataset.levels, len(dataset.train), len(dataset.test)
        ((1, 8, 8), 17, 1438, 180)
    """
    from sklearn.datasets import load_digits  # slow to import

    loaded = load_digits()
    raw = torch.from_numpy(loaded.images).to(torch.uint8).unsqueeze(1)
    classes = torch.from_numpy(loaded.target).long()
    rows = split_indices(raw, check_fractions(fractions, parts=3), seed)
    splits, labels = ([values[part] for part in rows] for values in (raw, classes))
    return Dataset.of("digits", splits, levels=17, labels=labels)
