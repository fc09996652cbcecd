"""Metrics: bits per dimension, baseline densities, sample distances, classification."""

from scoresde.metrics.baselines import (
    FAMILIES,
    MOST_FEATURES,
    Baseline,
    CovarianceFamily,
    gaussian_baseline,
    mixture_baseline,
)
from scoresde.metrics.bits import bits_per_dim, nats
from scoresde.metrics.classification import (
    Reliability,
    accuracy,
    confusion,
    logistic_regression,
    reliability,
)
from scoresde.metrics.coverage import density_coverage, expected_coverage
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
    "Reliability",
    "accuracy",
    "auroc",
    "bits_per_dim",
    "confusion",
    "density_coverage",
    "expected_coverage",
    "features",
    "gaussian_baseline",
    "logistic_regression",
    "mixture_baseline",
    "nats",
    "nearest",
    "psnr",
    "ranks",
    "reliability",
    "sliced_wasserstein",
    "spread_ratio",
    "ssim",
    "subset",
]

__getattr__ = renamed(__name__)
