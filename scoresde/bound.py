"""The old name of :mod:`scoresde.likelihood.bound`, for one release."""

from scoresde.recipe import renamed

__getattr__ = renamed(__name__)
