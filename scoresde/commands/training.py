"""The task ``train``: a training run with its report."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from scoresde.commands.shared import PARTS, identity_of, rank_of
from scoresde.configuration import (
    allowed,
    build_data,
    cut_of,
    describe,
    device_of,
    given,
    instantiate,
    measured,
    place,
    try_model,
    with_codec,
)
from scoresde.errors import InputError
from scoresde.tasks.parts import Parts
from scoresde.tasks.summary import format_table

log = logging.getLogger("scoresde")

_CHANNELS = (1, 3, 4)  # of grey, colour, and colour with transparency


def train(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains a model, draws samples, evaluates it, and writes a report."""
    from scoresde.codec import NeuralCodec
    from scoresde.codec.latent import check_units
    from scoresde.likelihood import VariationalBound
    from scoresde.loss import only_time
    from scoresde.model import BridgeModel, Classifier, ScoreFunction
    from scoresde.tasks.inspection import Inspection
    from scoresde.tasks.report import Trained
    from scoresde.train import ProcessGroup
    from scoresde.train import train as fit

    group, device = ProcessGroup.here(), device_of(config.device)
    torch.manual_seed(config.seed)
    data = with_codec(build_data(config.data), config)
    data.split(config.split)  # fails early if the split does not exist
    codec = data.codec.placed(device)
    data = data.to(device) if config.resident else replace(data, codec=codec)
    plan = measured(OmegaConf.to_container(config, resolve=True), data)
    recipe = describe(plan, data)
    model = place(instantiate(recipe["model"], "model"), device)
    if isinstance(model, NeuralCodec):
        check_units(data.codec, model)
    else:  # a model with a process
        plan["likelihood"] = recipe["likelihood"] = cut_of(plan["likelihood"], model.process)
    training, loss = instantiate(plan["train"], "train"), instantiate(plan["loss"], "loss")
    loss.check(model)
    if isinstance(model, BridgeModel):
        _check_pairs(data)
    cautions = loss.cautions(model, data.conditions_of("train", slice(1)))
    recipe |= {"cautions": cautions} if cautions else {}  # for tasks on the checkpoint
    _say_misfits(model, data, loss, cautions)
    try_model(model, data, 0 if training.augment is None else training.augment.width)
    told = sorted(model.select(data.conditions_of("train", slice(1))))
    recipe |= {"conditions": told} if told else {}
    if "label" in told and data.class_names:
        recipe["class_names"] = list(data.class_names)
    samplers = _each(plan, "samplers")
    exact = instantiate(plan["likelihood"], "likelihood")
    quick = instantiate(plan["inspect"]["sampler"], "inspect.sampler")
    drawn, restoring = isinstance(model, ScoreFunction), isinstance(model, BridgeModel)
    if drawn and training.inspect_every is not None and only_time(loss, model.process) is not None:
        raise InputError(
            f"train.inspect_every must be null for a loss of one noise level, got "
            f"{training.inspect_every}."
        )
    if not drawn and training.inspect_every is not None:
        raise InputError(
            f"train.inspect_every must be null for a {type(model).__name__}, from which samplers "
            f"do not draw, got {training.inspect_every}."
        )
    path = path_of(config) if restoring else None
    if not restoring:
        check_no_path(config)
    for tool in () if not drawn else (*samplers.values(), exact, quick):
        tool.check(model)
    where = f"{device}" if group.size == 1 else f"{group.size} processes, {device.type}"
    if group.first:
        words = config.name, training.steps, where, tuple(data.shape)
        log.info("Training %s: %d steps on %s, examples of shape %s.", *words)
    clock = time.perf_counter()
    average = fit(
        model,
        data,
        loss,
        training,
        instantiate(plan["optimizer"], "optimizer"),
        folder,
        recipe=recipe,
        seed=config.seed,
        progress=config.progress,
        engine=instantiate(plan["distributed"], "distributed"),
        inspect=None
        if not drawn
        else Inspection(
            data,
            quick,
            folder,
            config.inspect.count,
            config.inspect.examples,
            config.seed,
            VariationalBound() if exact.levels is None else exact,
        ),
        trackers=list(_each(plan, "trackers").values()),
    )
    parts = None
    if group.size > 1:
        average, parts = _shared(average, folder, config)
    facts = [("training", f"{training.steps} steps of {training.batch_size} examples")]
    seconds = time.perf_counter() - clock
    trained = Trained(
        name=config.name,
        model=average,
        data=data,
        seconds=seconds,
        seed=config.seed,
        facts=facts,
        configuration=OmegaConf.to_yaml(plan),
        split=config.split,
        loss=loss,
        none=training.condition_dropout > 0,
    )
    if restoring:
        return _report_bridge(config, folder, trained, path) if group.first else {}
    if not drawn:
        report = _report_classifier if isinstance(model, Classifier) else _report_autoencoder
        return report(config, folder, trained) if group.first else {}
    results = _report(config, folder, trained, samplers, exact, parts)
    return results if group.first else {}


def _say_misfits(model: Any, data: Any, loss: Any, cautions: list[str]) -> None:
    """Prints warnings about data that do not match the process or lack conditions."""
    from scoresde.data import check_conditions, check_scales
    from scoresde.model import ScoreFunction, ScoreModel
    from scoresde.nn import UNet
    from scoresde.train import ProcessGroup

    if not ProcessGroup.here().first:
        return
    if len(data.shape) == 2 and isinstance(model, ScoreModel) and isinstance(model.network, UNet):
        channels, length = data.shape
        log.warning(
            "Examples of shape %s are treated as signals of %d channels and length %d; "
            "store images as (N, 1, H, W).",
            (channels, length),
            channels,
            length,
        )
    if len(data.shape) == 3 and data.shape[2] in _CHANNELS and data.shape[0] not in _CHANNELS:
        log.warning(
            "Examples of shape %s are treated as images of %d channels, %d x %d pixels; if the "
            "channels are last, set data.channels_last=true.",
            tuple(data.shape),
            *data.shape,
        )
    for sentence in (*check_conditions(model, data), *cautions):
        log.warning("%s", sentence)
    if isinstance(model, ScoreFunction):
        for sentence in check_scales(data, model.sde, loss.first_time(model.sde)):
            log.warning("%s", sentence)


def _each(plan: dict[str, Any], section: str) -> dict[str, Any]:
    """Builds the objects of a section, by name."""
    named = (plan.get(section) or {}).items()
    return {name: instantiate(value, f"{section}.{name}") for name, value in named}


def _report(
    config: DictConfig,
    folder: Path,
    trained: Any,
    samplers: dict[str, Any],
    exact: Any,
    parts: Parts | None,
) -> dict[str, Any]:
    """Draws samples from a trained model, evaluates it, and writes its report."""
    from scoresde.tasks.report import report_training
    from scoresde.train import ProcessGroup

    first = ProcessGroup.here().first
    results = report_training(
        trained,
        samplers,
        exact,
        folder,
        count=config.count,
        examples=config.examples,
        batch_size=config.batch_size,
        baselines=config.baselines,
        progress=config.progress and first,
        parts=parts,
    )
    if first:
        log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
        log.info("Report: %s", folder / "report.html")
    return results


def _report_classifier(config: DictConfig, folder: Path, trained: Any) -> dict[str, Any]:
    """Evaluates a trained classifier at all noise levels, and writes its report."""
    from scoresde.tasks.classifier_report import report_classifier

    results = report_classifier(
        trained.model,
        trained.data,
        config.split,
        folder,
        title=config.name,
        facts=trained.facts,
        configuration=trained.configuration,
        examples=config.examples,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
    log.info("Report: %s", folder / "report.html")
    return results


def _report_bridge(config: DictConfig, folder: Path, trained: Any, path: Any) -> dict[str, Any]:
    """Restores held-out examples with a trained bridge model, and writes its report."""
    from scoresde.tasks.bridging import report_bridge

    results = report_bridge(
        trained,
        path,
        folder,
        count=config.count if config.examples is None else config.examples,
        draws=config.draws if given("draws") else 4,
        batch_size=config.batch_size,
        progress=config.progress,
    )
    log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
    log.info("Report: %s", folder / "report.html")
    return results


def _report_autoencoder(config: DictConfig, folder: Path, trained: Any) -> dict[str, Any]:
    """Evaluates a trained autoencoder on held-out examples, and writes its report."""
    from scoresde.tasks.autoencoder_report import report_autoencoder

    results = report_autoencoder(
        trained, folder, examples=config.examples, batch_size=config.batch_size
    )
    log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
    log.info("Report: %s", folder / "report.html")
    return results


def path_of(config: DictConfig) -> Any:
    """Returns the sampler of a bridge."""
    from scoresde.sample import Restore

    return Restore(20 if config.steps is None else config.steps, config.noise)


def check_no_path(config: DictConfig) -> None:
    """Raises if options of a bridge are set for other models."""
    for name, plain in (("steps", None), ("noise", 1.0)):
        if config[name] != plain:
            raise InputError(
                f"{name} is an option of a bridge, got {config[name]} for another model; remove "
                "it, and use sampler.steps=20 for the steps of a sampler."
            )


def _check_pairs(data: Any) -> None:
    """Raises if the data have no sources."""
    if "source" not in data.conditions_of("train", slice(1)):
        raise InputError(
            f"data must have a source for each example of a bridge, got {data.name} without "
            "sources; use data=pairs or data=folder_pairs."
        )


def _shared(average: Any, folder: Path, config: DictConfig) -> tuple[Any, Parts]:
    """Returns the trained model, whole in each process, and the store for its evaluation."""
    from scoresde.train import Checkpoint, ProcessGroup

    device = average.device
    ProcessGroup.here().agree(None)  # waits until the last checkpoint is written
    checkpoint = Checkpoint.load(folder)
    model = place(checkpoint.build_model(allowed(config)), device)
    exact = OmegaConf.to_container(config.likelihood)
    identity = {**identity_of(checkpoint, config), "likelihood": exact}
    return model, Parts(folder / PARTS, rank_of()).claim(identity)
