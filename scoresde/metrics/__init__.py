"""Figures of merit: bits per dimension, classical densities to beat, distances of samples."""

from scoresde.metrics.baselines import (
    FAMILIES,
    Baseline,
    Family,
    gaussian_baseline,
    mixture_baseline,
)
from scoresde.metrics.detection import auroc
from scoresde.metrics.distance import sliced_wasserstein
from scoresde.metrics.estimate import Estimate
from scoresde.metrics.likelihood import bits_per_dim, nats

__all__ = [
    "FAMILIES",
    "Baseline",
    "Estimate",
    "Family",
    "auroc",
    "bits_per_dim",
    "gaussian_baseline",
    "mixture_baseline",
    "nats",
    "sliced_wasserstein",
]
