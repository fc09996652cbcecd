"""Training: the loop, the average of the weights, and checkpoints that describe themselves."""

from scoresde.train.checkpoint import Checkpoint
from scoresde.train.ema import EMA, PowerEMA
from scoresde.train.engine import Engine, Group, Replicated, Sharded, joined
from scoresde.train.loop import train
from scoresde.train.saving import Keeper
from scoresde.train.schedule import ConstantRate, CosineRate, Rate
from scoresde.train.snapshots import Snapshots
from scoresde.train.stopping import TrainingStopped
from scoresde.train.tracker import MLflow, TensorBoard, Tracker, Trackio, WandB, read_metrics
from scoresde.train.training import Training
from scoresde.train.update import Update
from scoresde.train.validation import level_curves, validation_loss

__all__ = [
    "EMA",
    "Checkpoint",
    "ConstantRate",
    "CosineRate",
    "Engine",
    "Group",
    "Keeper",
    "MLflow",
    "PowerEMA",
    "Rate",
    "Replicated",
    "Sharded",
    "Snapshots",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "Training",
    "TrainingStopped",
    "Update",
    "WandB",
    "joined",
    "level_curves",
    "read_metrics",
    "train",
    "validation_loss",
]
