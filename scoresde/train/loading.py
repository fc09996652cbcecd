"""A run's model and codec, for use from Python."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoresde.codec import Codec
from scoresde.errors import InputError
from scoresde.model import Trainable
from scoresde.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class Run:
    """The result of a training run.

    Arguments:
        model: The model, ready for evaluation.
        codec: The map between the user's units and the model's.
        recipe: Plain values that describe the run.
    """

    model: Trainable
    codec: Codec
    recipe: dict[str, Any]


def load(
    path: str | Path,
    *,
    weights: str = "average",
    device: torch.device | str | None = None,
    allow: Iterable[str] = (),
) -> Run:
    """Loads a run without executing anything in its checkpoint.

    With ``run = load("RUN")`` and ``x = UniPC()(run.model, shape=...).x``, samples in the user's
    units are ``run.codec.decode(x)``.

    Arguments:
        path: The run's folder, or its checkpoint.
        weights: ``average``, ``raw`` or ``best`` (the averaged weights with the lowest held-out
            loss).
        device: The device of the model; by default the CPU.
        allow: Packages besides ``scoresde`` whose classes the checkpoint may name.

    Raises:
        InputError: If there is no such checkpoint, or a class in it is not allowed.
    """
    if weights not in ("average", "raw", "best"):
        raise InputError(f"weights must be average, raw or best, got {weights}.")
    checkpoint = Checkpoint.load_best(path) if weights == "best" else Checkpoint.load(path)
    model = checkpoint.build_model(allow, average=weights != "raw")
    codec = checkpoint.build("units", Codec, allow)
    return Run(model.to(device or "cpu"), codec.placed(device or "cpu"), checkpoint.recipe)
