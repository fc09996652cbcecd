"""The tasks of the command line: each builds objects from a configuration and writes results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from scoresde.commands.evaluating import classify, likelihood
from scoresde.commands.restoring import restore
from scoresde.commands.sampling import encode, interpolate, sample
from scoresde.commands.shared import rank_of
from scoresde.commands.studies import benchmark, design, ema, import_, reflow, search
from scoresde.commands.training import train

__all__ = ["RESUMED", "TASKS", "rank_of"]

TASKS: dict[str, Callable[[DictConfig, Path], dict[str, Any]]] = {
    "train": train,
    "sample": sample,
    "restore": restore,
    "interpolate": interpolate,
    "encode": encode,
    "likelihood": likelihood,
    "classify": classify,
    "ema": ema,
    "reflow": reflow,
    "benchmark": benchmark,
    "search": search,
    "design": design,
    "import": import_,
}
# Tasks that store finished work, resume from it, and share it between processes.
RESUMED = ("sample", "restore", "encode", "likelihood", "classify", "search")
