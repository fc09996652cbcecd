"""Shared parts of the tasks: the configured likelihood, and the identity of a result."""

import json
import logging
import os
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from scoresde.configuration import (
    allowed,
    changed_section,
    cut_of,
    given,
    instantiate,
    measured,
    replaced,
)
from scoresde.errors import InputError
from scoresde.recipe import build
from scoresde.tasks.identity import fingerprint
from scoresde.tasks.parts import SUBSET, Rank

log = logging.getLogger("scoresde")

PARTS = "parts"  # folder of a task's finished batches


def rank_of() -> Rank:
    """Returns the rank of this process among those started by torchrun."""
    return Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def built_likelihood(checkpoint: Any, config: DictConfig, data: Any, model: Any) -> Any:
    """Returns the likelihood of the checkpoint, with the overrides of the command line."""
    from scoresde.likelihood import Likelihood, LogProb

    refuse_one_level(checkpoint, model, config)
    # Checkpoints of fit(folder=) contain no likelihood.
    own = "likelihood" in checkpoint.recipe and not replaced("likelihood")
    if own:
        plan = changed_section(checkpoint, "likelihood", config)
    else:
        plan = OmegaConf.to_container(config.likelihood, resolve=True)  # type: ignore[assignment]
    plan = cut_of(measured(plan, data), model.process)
    exact = build(plan, allowed(config)) if own else instantiate(plan, "likelihood")
    if not isinstance(exact, LogProb):
        raise InputError(
            f"likelihood must be a Likelihood, a VariationalBound or a DiscreteBound, got "
            f"{type(exact).__name__}; use likelihood=default."
        )
    if not isinstance(exact, Likelihood):  # the bounds rely on the score
        say_cautions(checkpoint)
    return exact


def built_draws(config: DictConfig, likelihood: Any, data: Any) -> Any:
    """Returns the dequantisation settings, or None for a single uniform dequantisation."""
    from scoresde.tasks.evaluation import Draws

    if config.draws == 1 and not given("dequantisation"):
        if not config.weighted:
            return None
        if likelihood.levels is None:
            if data.levels is None:
                raise InputError(
                    f"weighted=true has no effect on {data.name}, which is real-valued: only "
                    "integers are dequantised; remove weighted=true."
                )
            raise InputError("weighted=true requires draws of at least 2, got 1.")
    return Draws(
        config.draws, instantiate(config.dequantisation, "dequantisation"), config.weighted
    )


def identity_of(checkpoint: Any, config: DictConfig) -> dict[str, str]:
    """Returns all that the numbers depend on, as texts; file locations are not included."""
    weights = checkpoint.model if config.weights == "raw" else checkpoint.ema
    recipe = checkpoint.source or checkpoint.recipe  # as written: class names may change
    plan = json.dumps(recipe.get("model"), sort_keys=True, default=str)
    print_ = fingerprint(plan, *(part for pair in sorted(weights.items()) for part in pair))
    identity = {
        "checkpoint": f"step {checkpoint.step}, {print_}",
        "seed": str(config.seed),
        "weights": str(config.weights),
        "batch_size": str(config.batch_size),
    }
    plain = config.precision == "float32"
    return identity if plain else {**identity, "precision": config.precision}


def say_cautions(checkpoint: Any) -> None:
    """Prints limitations of a checkpoint's model, such as the score with coupled noise."""
    for sentence in checkpoint.recipe.get("cautions") or ():
        log.warning("%s", sentence)


def data_identity(data: Any, config: DictConfig, model: Any) -> dict[str, str]:
    """Returns the identity of the examples that a task evaluates."""
    split = config.split
    values = data.split(split)
    some = config.examples is not None and config.examples < len(values)
    kind = f"{data.name}, {tuple(values.shape)}, levels {data.levels}, {data.scaling}"
    return {
        "data": f"{kind}, {_digest(values)}",
        "split": split,
        **({SUBSET: "a random subset"} if some else {}),
        **_told(data, split, model),
    }


def _told(data: Any, split: str, model: Any) -> dict[str, str]:
    """Returns the fingerprints of the conditions of a split that a model accepts."""
    names = model.select(data.conditions_of(split, slice(1)))
    if not names:
        return {}
    prints: dict[str, list[str]] = {name: [] for name in names}
    for rows in torch.arange(len(data.split(split))).split(4096):
        for name, values in data.conditions_of(split, rows).items():
            if name in prints:
                prints[name].append(fingerprint(values))
    return {name: fingerprint(*parts) for name, parts in prints.items()}


def _digest(values: Any) -> str:
    """Returns the fingerprint of raw examples, which may be larger than memory."""
    if isinstance(values, torch.Tensor):
        return fingerprint(values)
    return fingerprint(*(fingerprint(part) for part in values.chunks()))


def only_time_of(checkpoint: Any, model: Any, config: DictConfig) -> float | None:
    """Returns the time of a model trained at a single time, or None for other models."""
    from scoresde.loss import Loss, only_time

    try:
        loss = checkpoint.build("loss", Loss, allowed(config))
    except InputError:  # no loss, or a class of another package
        return None
    return only_time(loss, model.process)


def refuse_one_level(checkpoint: Any, model: Any, config: DictConfig) -> None:
    """Raises if a model was trained at a single time: at other times it is undefined."""
    if only_time_of(checkpoint, model, config) is not None:
        raise InputError(
            f"task={config.task} requires a model of all noise levels, got a model trained at one "
            f"level (loss={checkpoint.recipe['loss']['_target_'].rpartition('.')[2]}); train with "
            "times over all levels."
        )
