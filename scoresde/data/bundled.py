"""Real data that comes with an installed library, so that nothing is downloaded."""

from collections.abc import Sequence

import torch

from scoresde.data.base import Dataset
from scoresde.data.splits import FRACTIONS, make_splits


def digits(fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Dataset:
    """1797 scans of handwritten digits in 8 x 8 pixels of 17 levels.

    Each pixel counts the dark ones among 4 x 4 finer pixels, hence the levels 0 to 16.

    References:
        Alpaydin and Kaynak, *Optical recognition of handwritten digits*, UCI, 1998; the test
        set, as ``sklearn.datasets.load_digits`` has it.

    Arguments:
        fractions: The shares of training, validation and test examples.
        seed: Names the splits.

    Example:
        >>> dataset = digits()
        >>> dataset.shape, dataset.levels, len(dataset.train), len(dataset.test)
        ((1, 8, 8), 17, 1438, 180)
    """
    from sklearn.datasets import load_digits  # slow to import

    raw = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
    return Dataset.of("digits", make_splits(raw, fractions, seed), levels=17)
