"""Training loop, moving averages of the weights, and self-describing checkpoints."""

from scoresde.recipe import renamed
from scoresde.train.checkpoint import Checkpoint
from scoresde.train.ema import EMA, PowerEMA
from scoresde.train.engine import (
    Engine,
    ModelLoss,
    ProcessGroup,
    Replicated,
    Sharded,
    SharedLoss,
    process_group,
)
from scoresde.train.fitting import fit
from scoresde.train.loading import Run, load
from scoresde.train.loop import train
from scoresde.train.reflow import Reflow, is_deterministic, one_step_error
from scoresde.train.saving import CheckpointManager
from scoresde.train.schedule import ConstantRate, CosineRate, Rate
from scoresde.train.snapshots import Snapshots
from scoresde.train.stopping import TrainingStopped
from scoresde.train.tracker import MLflow, TensorBoard, Tracker, Trackio, WandB, read_metrics
from scoresde.train.training import Training
from scoresde.train.update import Update
from scoresde.train.validation import level_curves, validation_loss, validation_losses

__all__ = [
    "EMA",
    "Checkpoint",
    "CheckpointManager",
    "ConstantRate",
    "CosineRate",
    "Engine",
    "MLflow",
    "ModelLoss",
    "PowerEMA",
    "ProcessGroup",
    "Rate",
    "Reflow",
    "Replicated",
    "Run",
    "Sharded",
    "SharedLoss",
    "Snapshots",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "Training",
    "TrainingStopped",
    "Update",
    "WandB",
    "fit",
    "is_deterministic",
    "level_curves",
    "load",
    "one_step_error",
    "process_group",
    "read_metrics",
    "train",
    "validation_loss",
    "validation_losses",
]

__getattr__ = renamed(__name__)
