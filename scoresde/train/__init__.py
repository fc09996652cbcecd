"""Training: the loop, the average of the weights, and checkpoints that describe themselves."""

from scoresde.train.checkpoint import Checkpoint
from scoresde.train.ema import EMA
from scoresde.train.loop import Training, train
from scoresde.train.saving import Keeper
from scoresde.train.schedule import ConstantRate, CosineRate, Rate
from scoresde.train.stopping import TrainingStopped
from scoresde.train.tracker import Tracker, read_metrics

__all__ = [
    "EMA",
    "Checkpoint",
    "ConstantRate",
    "CosineRate",
    "Keeper",
    "Rate",
    "Tracker",
    "Training",
    "TrainingStopped",
    "read_metrics",
    "train",
]
