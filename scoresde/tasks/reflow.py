"""Training of a model on pairs from its own flow."""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss import FlowMatching
from scoresde.model import Model
from scoresde.recipe import describe
from scoresde.sample import Sampler
from scoresde.sde import RectifiedFlow
from scoresde.train import Reflow, Training, one_step_error, train

log = logging.getLogger("scoresde")


def reflow(
    recipe: Mapping[str, Any],
    model: Model,
    sampler: Sampler,
    training: Training,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
    folder: Path,
    *,
    count: int,
    batch_size: int,
    cond: Mapping[str, Tensor],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Generates pairs, fine-tunes a copy of the model on them, and measures one step.

    It writes a checkpoint whose samples have the units of the model's own data.

    Arguments:
        recipe: The recipe of the model's checkpoint.
        model: The model.
        sampler: A deterministic sampler.
        training: Training settings.
        optimizer: Callable that builds an optimiser from parameters.
        folder: The run's folder.
        count: The number of pairs.
        batch_size: The number of pairs generated together.
        cond: Conditions, whose rows are used in turn.
        seed: Seed of the noise and of the training.
        progress: Whether to show the progress.

    Raises:
        InputError: If the model's path is not straight.
    """
    if not isinstance(model.process, RectifiedFlow):
        raise InputError(
            f"checkpoint must be of a model of RectifiedFlow(), got {model.process}; train one "
            "with sde=rectified, such as +experiment=moons_flow."
        )
    clock = time.perf_counter()
    rows = torch.arange(count)
    told: dict[str, Any] = {k: v[rows.to(v.device) % len(v)] for k, v in cond.items()}
    pairs = Reflow(model, sampler).pairs(
        count, seed, batch_size=batch_size, progress=progress, **told
    )
    pairs = pairs.to(model.device)
    making = time.perf_counter() - clock
    before, loss = one_step_error(model, pairs), FlowMatching()
    cautions = loss.cautions(model, pairs.conditions_of("train", slice(1)))
    for sentence in cautions:
        log.warning("%s", sentence)
    straight = train(
        copy.deepcopy(model),
        pairs,
        loss,
        training,
        optimizer,
        folder,
        recipe={**recipe, "loss": describe(loss), "cautions": cautions},
        seed=seed,
        progress=progress,
    )
    after = one_step_error(straight, pairs)
    return {
        "pairs": count,
        "one_step_error_before": before,
        "one_step_error": after,
        "seconds_pairs": making,
        "seconds": time.perf_counter() - clock,
    }
