"""Figures of merit: bits per dimension, classical densities to beat, distances of samples."""

from scoresde.metrics.baselines import (
    FAMILIES,
    MOST_FEATURES,
    Baseline,
    CovarianceFamily,
    gaussian_baseline,
    mixture_baseline,
)
from scoresde.metrics.bits import bits_per_dim, nats
from scoresde.metrics.detection import auroc
from scoresde.metrics.distance import sliced_wasserstein
from scoresde.metrics.estimate import Estimate
from scoresde.metrics.moments import Moments, features, subset
from scoresde.metrics.nearest import nearest
from scoresde.metrics.restoration import psnr, ranks, spread_ratio, ssim
from scoresde.recipe import renamed

__all__ = [
    "FAMILIES",
    "MOST_FEATURES",
    "Baseline",
    "CovarianceFamily",
    "Estimate",
    "Moments",
    "auroc",
    "bits_per_dim",
    "features",
    "gaussian_baseline",
    "mixture_baseline",
    "nats",
    "nearest",
    "psnr",
    "ranks",
    "sliced_wasserstein",
    "spread_ratio",
    "ssim",
    "subset",
]

__getattr__ = renamed(__name__)
