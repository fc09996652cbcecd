"""Conditions of examples, such as their classes."""

from collections.abc import Sequence
from keyword import iskeyword

import torch
from torch import Tensor

from scoresde.errors import InputError

# Keywords of losses, samplers and likelihoods, which conditions must not shadow.
_TAKEN = (
    *("self", "model", "x", "t", "c", "noise", "shape", "latent", "seed", "seeds", "part"),
    *("progress", "callback", "points", "draws", "combine", "codec", "likelihood", "raw"),
    *("data", "split", "index", "nfe", "file", "seconds", "log_prob", "examples", "augment"),
)


def check_name(name: str) -> None:
    """Checks that the name of a condition is usable as a keyword argument."""
    if not isinstance(name, str) or not name.isidentifier() or iskeyword(name) or name in _TAKEN:
        raise InputError(
            f"The name of a condition must be an identifier that is not reserved, got {name!r}; "
            "use another, such as context."
        )


def check_condition(title: str, name: str, parts: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Checks that a condition matches the examples.

    Arguments:
        title: The name of the data set.
        name: The name of the condition.
        parts: Values of the condition in each split.
        sizes: Number of examples in each split.
    """
    check_name(name)
    if isinstance(parts, Tensor) or len(parts) != len(sizes):
        raise InputError(
            f"{name} must be a list of {len(sizes)} tensors, one for each split of {title}, got "
            f"{type(parts).__name__} of {len(parts)}."
        )
    tensors = all(isinstance(part, Tensor) for part in parts)
    shapes = [tuple(part.shape) for part in parts] if tensors else []
    if [shape[0] if shape else None for shape in shapes] != list(sizes):
        raise InputError(
            f"{name} must have one row for each example of {title}, {list(sizes)} in the splits, "
            f"got {shapes or [type(part).__name__ for part in parts]}."
        )
    if len({shape[1:] for shape in shapes}) > 1 or len({part.dtype for part in parts}) > 1:
        types = [str(part.dtype) for part in parts]
        raise InputError(
            f"{name} must have rows of one shape and type in all splits of {title}, got {shapes} "
            f"and {types}."
        )
    for part in parts:
        check_none(name, part)
    classes = all(part.ndim == 1 and part.dtype == torch.int64 for part in parts)
    if name == "label" and not (classes and min(int(part.min()) for part in parts) >= -1):
        least = f" with minimum {min(int(part.min()) for part in parts)}" if classes else ""
        raise InputError(
            "label must be the class of each example, int64 (N,) of integers >= -1 (-1 for none), "
            f"got {shapes} of {parts[0].dtype}{least}; for class probabilities use another name."
        )


def check_none(name: str, values: Tensor) -> None:
    """Checks that each row of a continuous condition is entirely finite or entirely NaN.

    Arguments:
        name: The name of the condition.
        values: Values of the condition, with shape ``(N, *)``.
    """
    if not values.is_floating_point() or bool(values.isfinite().all()):
        return
    each = values.reshape(len(values), -1)
    bad = ~(each.isfinite().all(1) | each.isnan().all(1))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"{name} must have rows that are finite, or NaN throughout for none, got "
            f"{int(bad.sum())} of {len(each)} that are neither, the first in row {row}: "
            f"{each[row, :4].tolist()}; replace the missing values, or set the whole row to NaN."
        )
