"""The number of levels of quantised data, and the integer type that holds them."""

import torch

from scoresde.errors import InputError

MAX_LEVELS = 2**15


def integer_type(levels: int) -> torch.dtype:
    """Returns the smallest type that holds the levels 0 to L-1."""
    return torch.uint8 if check_levels(levels) <= 256 else torch.int16


def check_levels(levels: int) -> int:
    """Returns the number of levels, after a check that it is supported.

    Raises:
        InputError: If it is not an integer in [2, 32768].
    """
    if not isinstance(levels, int) or isinstance(levels, bool) or not 2 <= levels <= MAX_LEVELS:
        raise InputError(
            f"levels must be an integer in [2, {MAX_LEVELS}], got {levels}; pass finer data as "
            "float32."
        )
    return levels
