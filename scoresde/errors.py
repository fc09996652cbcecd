"""The errors that a user can meet, and the check that most of them come from."""

from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used; the message names the value and the remedy.

    The command line prints the message alone and leaves with code 2; in a program it is a
    ``ValueError`` like any other.
    """


class OtherRunError(InputError):
    """The folder holds another run, which stays as it is."""


class SolverError(RuntimeError):
    """A solver could not finish; the message names the time, the cause and the remedy."""


def check_count(name: str, value: Any, remedy: str = "give at least 1") -> int:
    """Returns a positive whole number as an integer (2.0 passes, 2.5 does not).

    Raises:
        InputError: If it is anything else.
    """
    try:
        count = int(value)
        if count > 0 and count == value:
            return count
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name}={value} is not a positive integer; {remedy}.")
