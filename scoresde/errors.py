"""Exceptions of the library, and a check for counts."""

import operator
from typing import Any


class InputError(ValueError):
    """Invalid input; the message states the value and the remedy.

    The command line prints only the message and exits with code 2. In a program it is an ordinary
    ``ValueError``.
    """


class OtherRunError(InputError):
    """The folder holds another run, which is left unchanged."""


class SolverError(RuntimeError):
    """A solver failed; the message states the time, the cause and the remedy."""


def check_count(name: str, value: Any, remedy: str = "") -> int:
    """Returns a positive integer, of any type of integers.

    The message has the form of every message of the library, ``NAME must be CONSTRAINT, got VALUE;
    REMEDY.``

    Arguments:
        name: Name of the argument or option, as the user writes it.
        value: Value to check.
        remedy: Text after the semicolon, if the constraint does not imply the remedy.

    Raises:
        InputError: If the value is not a positive integer below 2^63.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if 0 < count < 2**63:
        return count
    if isinstance(value, float) and value.is_integer() and 0 < value < 2**63:
        remedy = f"write {int(value)}"
    advice = f"; {remedy}" if remedy else ""
    raise InputError(f"{name} must be a positive integer, got {value}{advice}.")
