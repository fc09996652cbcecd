"""Parts of the error messages of the readers."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def either(options: Iterable[str]) -> str:
    """Returns the allowed values in words, such as "one of a, b" or "a"."""
    words = list(options)
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def kind_of(value: Any) -> str:
    """Returns the data type of a tensor, or the name of another type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
