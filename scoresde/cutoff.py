"""The old name of :mod:`scoresde.likelihood.cutoff`, for one release."""

from scoresde.recipe import renamed

__getattr__ = renamed(__name__)
