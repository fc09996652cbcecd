"""Training: the loop, the average of the weights, and checkpoints that describe themselves."""

from scoresde.train.checkpoint import Checkpoint
from scoresde.train.ema import EMA
from scoresde.train.loop import Training, train
from scoresde.train.schedule import ConstantRate, CosineRate, Rate
from scoresde.train.tracker import Tracker, read_metrics

__all__ = [
    "EMA",
    "Checkpoint",
    "ConstantRate",
    "CosineRate",
    "Rate",
    "Tracker",
    "Training",
    "read_metrics",
    "train",
]
