"""The errors that a user can meet."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names the value and the remedy.

    The command line prints the message alone and leaves with code 2; in a program it is a
    ``ValueError`` like any other.
    """


class SolverError(RuntimeError):
    """A solver could not finish; the message names the time, the cause and the remedy."""
