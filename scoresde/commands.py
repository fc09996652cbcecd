"""What each task does: from a configuration to files in a folder."""

import copy
import dataclasses
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from scoresde.configuration import (
    allowed,
    build_data,
    changed_section,
    check_given,
    check_told,
    chosen,
    cut_of,
    describe,
    device_of,
    evaluated_data,
    given,
    guided,
    instantiate,
    load,
    log_prior_of,
    measured,
    place,
    random_data,
    replaced,
    requested,
    stored_averages,
    try_model,
    undivided,
    with_codec,
)
from scoresde.errors import InputError, check_count
from scoresde.recipe import build
from scoresde.tasks.identity import fingerprint
from scoresde.tasks.parts import SUBSET, Parts, Rank
from scoresde.tasks.summary import format_table

log = logging.getLogger("scoresde")

_NOTHING = object()
PARTS = "parts"  # where a task keeps the batches that are done


def rank_of() -> Rank:
    """Which of the processes that torchrun has started this is."""
    return Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def train(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains a model, samples it, evaluates it, and reports."""
    from scoresde.codec import NeuralCodec
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
    data.split(config.split)  # which must exist, before hours of training
    codec = data.codec.placed(device)
    data = data.to(device) if config.resident else replace(data, codec=codec)
    plan = measured(OmegaConf.to_container(config, resolve=True), data)
    recipe = describe(plan, data)
    model = place(instantiate(recipe["model"], "model"), device)
    if not isinstance(model, NeuralCodec):  # which has no process
        plan["likelihood"] = recipe["likelihood"] = cut_of(plan["likelihood"], model.process)
    training, loss = instantiate(plan["train"], "train"), instantiate(plan["loss"], "loss")
    loss.check(model)
    if isinstance(model, BridgeModel):
        _check_pairs(data)
    _say_misfits(model, data, loss)
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
            f"train.inspect_every must be null for a {type(model).__name__}, which no sampler "
            f"draws from noise, got {training.inspect_every}."
        )
    path = _path_of(config) if restoring else None
    if not restoring:
        _no_path(config)
    for tool in () if not drawn else (*samplers.values(), exact, quick):
        tool.check(model)
    where = f"{device}" if group.size == 1 else f"{group.size} processes, {device.type}"
    if group.first:
        log.info("Training %s: %d steps on %s.", config.name, training.steps, where)
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


def _say_misfits(model: Any, data: Any, loss: Any) -> None:
    """Says which features of the data do not suit the process, and which conditions they lack."""
    from scoresde.data import check_conditions, check_scales
    from scoresde.model import ScoreFunction, ScoreModel
    from scoresde.nn import UNet
    from scoresde.train import ProcessGroup

    if not ProcessGroup.here().first:
        return
    if len(data.shape) == 2 and isinstance(model, ScoreModel) and isinstance(model.network, UNet):
        channels, length = data.shape
        log.warning(
            "Examples of shape %s are taken as signals of %d channels and length %d; "
            "store pictures as (N, 1, H, W).",
            (channels, length),
            channels,
            length,
        )
    cautions = loss.cautions(model, data.conditions_of("train", slice(1)))
    for sentence in (*check_conditions(model, data), *cautions):
        log.warning("%s", sentence)
    if isinstance(model, ScoreFunction):
        for sentence in check_scales(data, model.sde, loss.first_time(model.sde)):
            log.warning("%s", sentence)


def _each(plan: dict[str, Any], section: str) -> dict[str, Any]:
    """Builds the objects of a section, by their names."""
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
    """Samples and evaluates a trained model, and writes its report."""
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
    """Restores held-out examples by a trained model of a bridge, and writes its report."""
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


def _path_of(config: DictConfig) -> Any:
    """Returns the sampler of a bridge."""
    from scoresde.sample import Restore

    return Restore(20 if config.steps is None else config.steps, config.noise)


def _no_path(config: DictConfig) -> None:
    """Refuses options of a bridge for other models."""
    for name, plain in (("steps", None), ("noise", 1.0)):
        if config[name] != plain:
            raise InputError(
                f"{name} is an option of a bridge, got {config[name]} for another model; leave it "
                "out, and use sampler.steps=20 for the steps of a sampler."
            )


def _check_pairs(data: Any) -> None:
    """Refuses data without sources."""
    if "source" not in data.conditions_of("train", slice(1)):
        raise InputError(
            f"data must have a source for each example of a bridge, got {data.name} without; use "
            "data=pairs or data=folder_pairs."
        )


def _shared(average: Any, folder: Path, config: DictConfig) -> tuple[Any, Parts]:
    """Returns a trained model that each process holds whole, and where they evaluate it."""
    from scoresde.train import Checkpoint, ProcessGroup

    device = average.device
    ProcessGroup.here().agree(None)  # the last checkpoint is written
    checkpoint = Checkpoint.load(folder)
    model = place(checkpoint.build_model(allowed(config)), device)
    exact = OmegaConf.to_container(config.likelihood)
    identity = {**_identity(checkpoint, config), "likelihood": exact}
    return model, Parts(folder / PARTS, rank_of()).claim(identity)


def sample(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws samples of a checkpoint, each batch kept as it comes."""
    from scoresde.tasks.sampling import save_trajectory, stream_samples

    checkpoint, drawing, guidance = _drawing(config)
    count = config.count
    if drawing.latents is not None:
        count = _count(config, len(drawing.latents))
    identity = {**_identity(checkpoint, config), **_drawn_from(drawing, guidance)}
    parts = Parts(folder / PARTS, rank_of()).claim(identity)
    results: dict[str, Any] = stream_samples(
        drawing,
        count,
        folder,
        parts,
        batch_size=config.batch_size,
        images=config.images,
        progress=config.progress and rank_of().index == 0,
    )
    if guidance is not None and rank_of().index == 0:
        _save_guidance(guidance, folder)
    if config.trajectory is not None and rank_of().index == 0:
        save_trajectory(drawing, config.trajectory, count, folder)
    if config.compare is not None and rank_of().index == 0:
        results |= _compare(checkpoint, drawing, config, folder)
    log.info("%d samples in %.1f s: %s", count, results["seconds"], folder)
    return {"count": count, **results}


def _compare(checkpoint: Any, drawing: Any, config: DictConfig, folder: Path) -> dict[str, Any]:
    """Compares samples with a split, or with those of its examples that have their classes."""
    from scoresde.metrics import density_coverage, expected_coverage
    from scoresde.tasks.tables import first_rows

    data, codec = evaluated_data(checkpoint, config), drawing.codec
    values = data.split(config.compare)
    real = values[torch.arange(len(values))].cpu()
    labels = data.conditions_of(config.compare, torch.arange(len(values))).get("label")
    asked = drawing.cond.get("label")
    if labels is not None and asked is not None and bool((asked >= 0).all()):
        real = real[torch.isin(labels.cpu(), asked.cpu())]
    drawn = first_rows(folder / "samples.npz", 2**63 - 1)
    density, coverage = density_coverage(codec.encode(real), codec.encode(drawn))
    return {
        "density": density,
        "coverage": coverage,
        "expected_coverage": expected_coverage(len(real), len(drawn)),
    }


def restore(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws examples that agree with what was observed of them, and reports."""
    from scoresde.model import BridgeModel
    from scoresde.tasks.restoration import restore as run

    checkpoint, model = load(config)
    if isinstance(model, BridgeModel):
        return _restore_by_bridge(config, folder, checkpoint, model)
    _no_path(config)
    restoration, truth, title, guidance = _restoration(config, checkpoint, model)
    identity = {
        **_identity(checkpoint, config),
        "guidance": guidance,
        "operator": OmegaConf.to_yaml(config.operator),
        "method": restoration.method,
        "sampler": restoration.sampler,
        "std": str(config.std),
        "draws": str(restoration.draws),
        "y": fingerprint(restoration.observed.y),
        **{name: fingerprint(values) for name, values in restoration.cond.items()},
    }
    results = run(
        restoration,
        folder,
        Parts(folder / PARTS, rank_of()).claim(identity),
        truth=truth,
        batch_size=config.batch_size,
        images=config.images,
        progress=config.progress and rank_of().index == 0,
        title=title,
        facts=[("operator", str(restoration.observed.operator)), ("std", str(config.std))],
        configuration=OmegaConf.to_yaml(config),
    )
    if rank_of().index == 0:
        log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
        log.info("Report: %s", folder / "report.html")
    return results


def _restore_by_bridge(
    config: DictConfig, folder: Path, checkpoint: Any, model: Any
) -> dict[str, Any]:
    """Restores sources by a model of a bridge, and reports."""
    from scoresde.tasks.bridging import restore_pairs

    job, truth, title = _bridge_job(config, checkpoint, model)
    identity = {
        **_identity(checkpoint, config),
        "sampler": job.sampler,
        "draws": str(job.draws),
        "source": fingerprint(job.source),
        **{name: fingerprint(values) for name, values in job.cond.items()},
    }
    results = restore_pairs(
        job,
        folder,
        Parts(folder / PARTS, rank_of()).claim(identity),
        truth=truth,
        batch_size=config.batch_size,
        images=config.images,
        progress=config.progress and rank_of().index == 0,
        title=title,
        facts=[("process", str(model.process)), ("sampler", str(job.sampler))],
        configuration=OmegaConf.to_yaml(config),
    )
    if rank_of().index == 0:
        log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
        log.info("Report: %s", folder / "report.html")
    return results


def _bridge_job(config: DictConfig, checkpoint: Any, model: Any) -> tuple[Any, Any, str]:
    """Returns what is restored by a bridge, the truth if known, and a title."""
    from scoresde.codec import Codec
    from scoresde.streams import random_rows
    from scoresde.tasks.bridging import BridgeJob

    for name in ("operator", "method", "sampler", "guidance", "std"):
        if given(name):
            raise InputError(
                f"{name} has no effect on a bridge, which was trained on pairs; leave it out, and "
                "use steps=20 and noise=1."
            )
    codec = checkpoint.build("units", Codec, allowed(config))
    cond, truth = requested(config, model), None
    if config.source is None:
        data = evaluated_data(checkpoint, config)
        values = data.split(config.split)
        rows = random_rows(len(values), 16 if config.examples is None else config.examples)
        cond = {**data.conditions_of(config.split, rows), **cond}
        truth, title = values[rows].cpu(), f"{data.name} ({config.split})"
    else:
        cond["source"], title = _source(config, codec), Path(config.source).stem
    truth = _truth(config, codec, truth, None if config.source is None else len(cond["source"]))
    check_given(model, cond, checkpoint.recipe)
    source = cond.pop("source").to(model.device)
    turns = torch.arange(len(source))
    cond = {name: c[turns % len(c)] for name, c in cond.items() if model.takes(name)}
    draws, path = config.draws if given("draws") else 8, _path_of(config)
    return BridgeJob(model, path, source, codec, draws, config.seed, cond), truth, title


def _source(config: DictConfig, codec: Any) -> torch.Tensor:
    """Reads the sources of a bridge, in model units; an integer k stands for k + 1/2."""
    from scoresde.tasks.sources import read_source

    values = read_source(config.source, codec.raw_shape, codec)
    middle = 0.5 if values.is_floating_point() and codec.levels is not None else 0.0
    return codec.encode(values - middle)


def _truth(config: DictConfig, codec: Any, own: Any, count: int | None) -> Any:
    """Returns the true examples: those of the data, or those of a file, as many as sources."""
    from scoresde.tasks.sources import read_source

    if config.truth is None:
        return own
    if count is None:
        raise InputError("truth must come with source, the observed examples; use source=PATH.")
    truth = read_source(config.truth, codec.raw_shape, codec)
    if len(truth) != count:
        raise InputError(f"truth must have {count} examples as source, got {len(truth)}.")
    return truth


def _restoration(config: DictConfig, checkpoint: Any, model: Any) -> tuple[Any, Any, str, Any]:
    """Returns what is restored and how, the truth if known, a title, and the guidance."""
    from scoresde.codec import Codec
    from scoresde.inverse import Observation
    from scoresde.streams import random_rows
    from scoresde.tasks.restoration import Restoration, simulate

    codec = checkpoint.build("units", Codec, allowed(config)).placed(model.device)
    model, guidance = guided(model, config, codec)
    method, sampler = _method(config)
    std = config.std
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise InputError(f"std must be the noise of the observation in raw units, got {std}.")
    cond, truth = requested(config, model), None
    if config.source is None:
        data = evaluated_data(checkpoint, config)
        values = data.split(config.split)
        rows = random_rows(len(values), 16 if config.examples is None else config.examples)
        cond = {**model.select(data.conditions_of(config.split, rows)), **cond}
        truth, title = values[rows].cpu(), f"{data.name} ({config.split})"
        operator = _operator(config, codec, truth)
        y = simulate(operator, truth, codec, std, config.seed)
    else:
        operator, y = _observed(config, codec)
        title = Path(config.source).stem
    truth = _truth(config, codec, truth, None if config.source is None else len(y))
    check_given(model, cond, checkpoint.recipe)
    observed = Observation(operator, y.to(model.device), float(std), codec)
    draws = config.draws if given("draws") else 8
    restoration = Restoration(
        *(model, method, sampler, observed, codec, len(y), draws, config.seed, cond)
    )
    return restoration, truth, title, guidance


def _observed(config: DictConfig, codec: Any) -> tuple[Any, torch.Tensor]:
    """Returns the operator, and what was observed with it, from the source."""
    from scoresde.tasks.sources import read_source

    raw = tuple(codec.raw_shape)
    if (config.get("operator") or {}).get("mask") == "nan":
        y = read_source(config.source, raw, codec)
        return _operator(config, codec, y), y.nan_to_num(0.0)
    operator = _operator(config, codec, torch.empty(0))
    shape = operator(torch.zeros(1, *raw)).shape[1:]
    return operator, read_source(config.source, shape, codec)


def _operator(config: DictConfig, codec: Any, source: torch.Tensor) -> Any:
    """Builds the operator; a mask is read from its file, or from what is NaN in the source."""
    from scoresde.operators import Masking, Operator
    from scoresde.tasks.sources import read_mask

    if config.get("operator") is None:
        raise InputError(
            "operator must say what was observed; use operator=hole, random_mask, masking "
            "operator.mask=FILE, missing, downsampling, blur or grey."
        )
    plan: Any = OmegaConf.to_container(config.operator, resolve=True)
    if plan.get("mask") == "nan":
        if not source.is_floating_point() or not bool(source.isnan().any()):
            raise InputError(
                "operator=missing requires NaN in the source, got none; use operator=masking with "
                "a mask."
            )
        return Masking(~source.isnan())
    if isinstance(plan.get("mask"), str):
        plan["mask"] = read_mask(plan["mask"], codec.raw_shape)
        return Masking(plan["mask"])
    if "shape" in plan and plan["shape"] is None:
        plan["shape"] = list(codec.raw_shape)
    operator = instantiate(plan, "operator")
    if not isinstance(operator, Operator):
        raise InputError(
            f"operator must be an Operator, got {type(operator).__name__}; see scoresde.operators."
        )
    return operator


def _method(config: DictConfig) -> tuple[Any, Any]:
    """Returns the method, and the sampler that serves it if it is a model."""
    from scoresde.inverse import StepRule
    from scoresde.sample import Sampler

    method = instantiate(config.method, "method")
    rule = isinstance(method, StepRule)
    if rule and given("sampler"):
        raise InputError(
            f"sampler has no effect on method={type(method).__name__}, which is a sampler itself; "
            "remove it, and set its steps by method.steps."
        )
    if not rule and not callable(method):
        raise InputError(f"method must be a posterior or a step rule, got {method}.")
    chosen = config.sampler if given("sampler") else config.restore.sampler
    sampler = instantiate(chosen, "sampler")
    if not isinstance(sampler, Sampler):
        raise InputError(f"sampler must be a Sampler, got {type(sampler).__name__}.")
    return method, sampler


def interpolate(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws samples between pairs of latents."""
    from scoresde.tasks.latents import interpolate_latents

    _, drawing, guidance = _drawing(config)
    count = config.count
    if drawing.latents is not None:
        count = _count(config, len(drawing.latents) // 2)
    results = interpolate_latents(
        drawing,
        count,
        config.points,
        folder,
        batch_size=config.batch_size,
        progress=config.progress,
    )
    if guidance is not None:
        _save_guidance(guidance, folder)
    log.info("%d pairs of samples, %d points each: %s", count, config.points, folder)
    return {"count": count, **results}


def encode(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Brings data to their latents."""
    from scoresde.tasks.latents import encode_data

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    check_told(model, data, config.split)
    try_model(model, data)
    _refuse_one_level(checkpoint, model, config)
    sampler = instantiate(config.sampler, "sampler")
    identity = {
        **_identity(checkpoint, config),
        **_data_identity(data, config, model),
        "sampler": sampler,
    }
    results = encode_data(
        model,
        sampler,
        data,
        config.split,
        folder,
        Parts(folder / PARTS, rank_of()).claim(identity),
        examples=config.examples,
        batch_size=config.batch_size,
        progress=config.progress and rank_of().index == 0,
    )
    log.info("Latents in %.1f s: %s", results["seconds"], folder / "latents.npz")
    return dict(results)


def _drawing(config: DictConfig) -> tuple[Any, Any, Any]:
    """Returns the checkpoint, what samples are drawn from and how, and its guidance."""
    from scoresde.codec import Codec
    from scoresde.sample import Sampler
    from scoresde.tasks.latents import read_latents
    from scoresde.tasks.sampling import Drawing, at_time

    checkpoint, model = load(config)
    codec = checkpoint.build("units", Codec, allowed(config)).placed(model.device)
    sampler = instantiate(config.sampler, "sampler")
    if not isinstance(sampler, Sampler):
        raise InputError(f"sampler is a {type(sampler).__name__}; give one of the samplers.")
    only = _only_time(checkpoint, model, config)
    if only is not None:
        sampler = at_time(sampler, only)
    model, told = guided(model, config, codec)
    latents, cond = None, requested(config, model)
    if config.latents is not None:
        there = read_latents(Path(config.latents), codec)
        latents, cond = there.x, {**model.select(there.cond), **cond}
    check_given(model, cond, checkpoint.recipe)
    names = checkpoint.recipe.get("class_names", ())
    drawing = Drawing(model, sampler, codec, config.seed, latents, cond, names)
    return checkpoint, drawing, told


def _only_time(checkpoint: Any, model: Any, config: DictConfig) -> float | None:
    """Returns the one time at which a checkpoint's model was trained, or None."""
    from scoresde.loss import Loss, only_time

    try:
        loss = checkpoint.build("loss", Loss, allowed(config))
    except InputError:  # there is none, or it is of another package
        return None
    return only_time(loss, model.process)


def _refuse_one_level(checkpoint: Any, model: Any, config: DictConfig) -> None:
    """Refuses a model that was trained at one time, of which nothing between 0 and 1 is known."""
    if _only_time(checkpoint, model, config) is not None:
        raise InputError(
            f"task={config.task} must have a model of all noise levels, got one that was trained "
            f"at one level (loss={checkpoint.recipe['loss']['_target_'].rpartition('.')[2]}); "
            "train with times over all levels."
        )


def _save_guidance(guidance: Any, folder: Path) -> None:
    """Writes ``guidance.json``: what guided the samples, other models by their fingerprints."""
    (folder / "guidance.json").write_text(json.dumps(guidance, indent=1) + "\n")


def _count(config: DictConfig, there: int) -> int:
    """Returns how many samples to draw of latents: all, or as many as are asked for."""
    if not given("count"):
        return there
    if config.count > there:
        raise InputError(f"count={config.count}, and latents={config.latents} are for {there}.")
    return config.count


def _drawn_from(drawing: Any, guidance: Any) -> dict[str, Any]:
    latents = "drawn" if drawing.latents is None else fingerprint(drawing.latents)
    told = {name: fingerprint(values) for name, values in drawing.cond.items()}
    return {"sampler": drawing.sampler, "guidance": guidance, "latents": latents, **told}


def likelihood(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on a split of its data, or of the data given."""
    from scoresde.tasks.evaluation import check_draws, check_levels, evaluate_likelihood
    from scoresde.tasks.likelihood_report import Evaluated, check_comparable, report_likelihood

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    check_told(model, data, config.split)
    try_model(model, data)
    exact = _likelihood(checkpoint, config, data, model)
    draws = _draws(config, exact)
    check_levels(data, exact, draws)
    check_draws(data, draws)
    sets = {PARTS: data}
    if config.get("ood") is not None:
        given_ood = OmegaConf.to_container(config.ood, resolve=True)
        other = build_data(undivided(given_ood, "ood", data.codec))
        other = replace(other.to(model.device), codec=data.codec).renamed(data.class_names)
        check_comparable(data, other)
        check_told(model, other, config.split)
        sets["parts_ood"] = other
    evaluated = []
    for name, one in sets.items():
        identity = {
            **_identity(checkpoint, config),
            **_data_identity(one, config, model),
            "likelihood": exact,
            "draws": draws,
        }
        parts = Parts(folder / name, rank_of()).claim(identity)
        evaluation = evaluate_likelihood(
            model,
            exact,
            one,
            config.split,
            examples=config.examples,
            batch_size=config.batch_size,
            draws=draws,
            seed=config.seed,
            parts=parts,
            progress=config.progress and rank_of().index == 0,
        )
        evaluated.append(Evaluated(one, evaluation, config.split))
    if rank_of().index > 0:
        return {}
    remarks = _untrained_for(exact, checkpoint, data)
    results = report_likelihood(
        evaluated[0],
        evaluated[1] if len(evaluated) > 1 else None,
        folder,
        title=checkpoint.recipe.get("name", "a model"),
        facts=[("likelihood", str(exact)), ("SDE", str(model.sde))],
        configuration=OmegaConf.to_yaml(config),
        remarks=remarks,
    )
    _say(config, evaluated, results, folder)
    return {**results, "likelihood": str(exact)}


def _untrained_for(exact: Any, checkpoint: Any, data: Any) -> list[str]:
    """Says if integers at the centres of their levels are not what a model was trained on."""
    loss = checkpoint.recipe.get("loss") or {}
    if exact.levels is None or not data.dequantise or loss.get("decoder") is not None:
        return []
    text = (
        "The model was trained on dequantised integers, whose density is flat within a level; a "
        "bound with a decoder over levels is for a model of integers at the centres, and is loose "
        "for this one. likelihood=default evaluates what it was trained for."
    )
    log.warning("%s", text)
    return [text]


def classify(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Classifies examples of a split by the likelihoods of a model under each class."""
    from scoresde.tasks.classification import classify_examples
    from scoresde.tasks.classification_report import report_classes

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    exact = _likelihood(checkpoint, config, data, model)
    classifier = _classifier(model, exact, config)
    check_told(model, data, config.split, optional=["label"])
    try_model(model, data)
    identity = {
        **_identity(checkpoint, config),
        **_data_identity(data, config, model),
        "classifier": classifier,
    }
    first = rank_of().index == 0
    one = classify_examples(
        model,
        classifier,
        data,
        config.split,
        examples=config.examples,
        batch_size=config.batch_size,
        seed=config.seed,
        parts=Parts(folder / PARTS, rank_of()).claim(identity),
        progress=config.progress and first,
    )
    if not first:
        return {}
    results = report_classes(
        data,
        one,
        folder,
        title=checkpoint.recipe.get("name", "a model"),
        split=config.split,
        baseline=config.baselines,
        facts=[("likelihood", str(exact)), ("SDE", str(model.sde))],
        configuration=OmegaConf.to_yaml(config),
    )
    _say_classes(results, folder)
    return {**results, "likelihood": str(exact)}


def _classifier(model: Any, exact: Any, config: DictConfig) -> Any:
    """Returns the classifier of a model whose number of classes is known."""
    from scoresde.likelihood import GenerativeClassifier
    from scoresde.model import check_model, classes_of

    check_model(model)  # and not a classifier of noisy data
    classes = classes_of(model)
    if not model.takes("label"):
        raise InputError(
            "checkpoint must hold a model with classes for task=classify, got one without; train "
            "it with network.classes=C on data with labels."
        )
    if classes is None:
        raise InputError(
            "The number of classes must be known from a Conditioning(classes=C) in the network, "
            "got a network without; from Python: "
            "scoresde.likelihood.GenerativeClassifier(Likelihood(), C)(load(RUN).model, x)."
        )
    return GenerativeClassifier(exact, classes, log_prior_of(config, classes))


def _say_classes(results: dict[str, Any], folder: Path) -> None:
    quality = "their true classes are unknown"
    if "accuracy" in results:
        quality = f"accuracy {_estimate(results, 'accuracy')}"
    if "logistic_regression_accuracy" in results:
        linear = _estimate(results, "logistic_regression_accuracy")
        quality += f", logistic regression {linear}"
    log.info(
        "%s: %s (%d examples, %d classes, NFE %.0f, %.1f s): %s",
        results["split"],
        quality,
        results["count"],
        results["classes"],
        results["nfe"],
        results["seconds"],
        folder / "classify.json",
    )
    log.info("Report: %s", folder / "report.html")


def _estimate(results: dict[str, Any], name: str) -> str:
    return f"{results[name]:.4f} ± {results[f'{name}_standard_error']:.4f}"


def _likelihood(checkpoint: Any, config: DictConfig, data: Any, model: Any) -> Any:
    from scoresde.likelihood import LogProb

    _refuse_one_level(checkpoint, model, config)
    # A training by fit(folder=) says none.
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
    return exact


def _draws(config: DictConfig, likelihood: Any) -> Any:
    """Returns how integers are dequantised, or None for the plain way."""
    from scoresde.tasks.evaluation import Draws

    if config.draws == 1 and not given("dequantisation"):
        if not config.weighted:
            return None
        if likelihood.levels is None:
            raise InputError("weighted=true has no effect on a single draw; give draws=16, say.")
    return Draws(
        config.draws, instantiate(config.dequantisation, "dequantisation"), config.weighted
    )


def _identity(checkpoint: Any, config: DictConfig) -> dict[str, str]:
    """What all numbers depend on, in words; where the files lie is no part of it."""
    weights = checkpoint.model if config.weights == "raw" else checkpoint.ema
    recipe = checkpoint.source or checkpoint.recipe  # as it was written: names move
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


def _data_identity(data: Any, config: DictConfig, model: Any) -> dict[str, str]:
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
    """Returns the fingerprints of the conditions of a split that a model takes."""
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
    """Returns the fingerprint of raw examples, also if they are larger than memory."""
    if isinstance(values, torch.Tensor):
        return fingerprint(values)
    return fingerprint(*(fingerprint(part) for part in values.chunks()))


def _say(config: DictConfig, evaluated: Sequence[Any], results: Any, folder: Path) -> None:
    for one in evaluated:
        e = one.evaluation
        log.info(
            "%s: %.4f ± %.4f %s (%d examples, NFE %.0f, %.1f s): %s",
            e.split if len(evaluated) == 1 else one.title,
            e.mean,
            e.standard_error,
            e.unit,
            len(e.values),
            e.summary()["nfe"],
            e.seconds,
            folder / "likelihood.json",
        )
    if "auroc" in results:
        names = ("auroc", "auroc_standard_error", "auroc_typicality")
        values = [results[name] for name in (*names, "auroc_typicality_standard_error")]
        log.info("AUROC: %.4f ± %.4f; by typicality: %.4f ± %.4f", *values)
    log.info("Report: %s", folder / "report.html")


def ema(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Compares averages of a training's weights by their length."""
    from scoresde.tasks.averages import compare_averages

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    check_told(model, data, config.split)
    try_model(model, data)
    return compare_averages(
        model,
        stored_averages(config),
        _likelihood(checkpoint, config, data, model),
        data,
        config.split if given("split") else "validation",  # to choose by test data is to cheat
        folder,
        config.lengths,
        examples=config.examples,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=config.progress,
    )


def reflow(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains a checkpoint's model on pairs that its own flow makes, for straighter paths."""
    from scoresde.sample import Sampler
    from scoresde.tasks.reflow import reflow as run

    checkpoint, model = load(config)
    cond = requested(config, model)
    check_given(model, cond, checkpoint.recipe)
    section, name = (config.reflow.sampler, "reflow.sampler")
    if given("sampler"):
        section, name = config.sampler, "sampler"
    sampler = instantiate(section, name)
    if not isinstance(sampler, Sampler):
        raise InputError(f"{name} must be a Sampler, got {type(sampler).__name__}.")
    plan: Any = OmegaConf.to_container(config.train, resolve=True)
    results = run(
        checkpoint.recipe | {"name": config.name, "train": plan},
        model,
        sampler,
        instantiate(plan, "train"),
        instantiate(config.optimizer, "optimizer"),
        folder,
        count=config.reflow.pairs,
        batch_size=config.batch_size,
        cond=cond,
        seed=config.seed,
        progress=config.progress,
    )
    log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
    return results


def benchmark(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Measures what this machine does with a recipe, and writes ``benchmark.json`` and a table."""
    from scoresde.tasks import benchmark as bench

    device, options = device_of(config.device), config.benchmark
    torch.manual_seed(config.seed)
    data = random_data(options.shape) if options.shape else build_data(config.data)
    data = with_codec(data, config).to(device)
    plan = measured(OmegaConf.to_container(config, resolve=True), data)
    model = place(instantiate(describe(plan, data)["model"], "model"), device)
    try_model(model, data)
    make = instantiate(plan["optimizer"], "optimizer")
    setup = bench.Bench(
        model,
        data,
        instantiate(plan["loss"], "loss"),
        replace(instantiate(plan["train"], "train"), augment=None),
        lambda fused: partial(make, fused=fused),
        options.rounds,
    )
    exact = cut_of(plan["likelihood"], model.process)
    exact = instantiate(exact, "likelihood") if options.likelihood else None
    sampler = instantiate(options.sampler, "benchmark.sampler")
    results = bench.measure(setup, list(options.batch_sizes), sampler, exact)
    bench.save(results, folder)
    log.info("%s\nTable: %s", bench.table(results), folder / bench.TABLE)
    return {"overhead": results["loop"]["overhead"]}


def search(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains again and again, with values that Optuna chooses."""
    from scoresde.tasks.search import Search, space_of

    options = OmegaConf.to_container(config.search, resolve=True)
    assert isinstance(options, dict)
    space = space_of(options["space"] or {})
    if not space:
        raise InputError(
            "search.space is empty; say what to search, such as "
            "+search.space.optimizer.lr={low:1e-4,high:1e-2,log:true}."
        )
    for name in space:
        present = OmegaConf.select(config, name, default=_NOTHING)
        if present is _NOTHING or isinstance(present, DictConfig):
            kind = "is no value of this recipe" if present is _NOTHING else "is a whole group"
            raise InputError(f"search.space.{name} {kind}; see --cfg job for its values.")

    def objective(values: dict[str, Any], place: Path) -> dict[str, Any]:
        trial = copy.deepcopy(config)
        trial.split = config.split if given("split") else "validation"
        for name, value in values.items():
            OmegaConf.update(trial, name, value)
        return train(trial, place)

    return Search(
        space,
        check_count("search.trials", options["trials"]),
        folder,
        options["metric"],
        options["direction"],
        instantiate(options["sampler"], "search.sampler") if options["sampler"] else None,
        config.seed,
    ).run(objective)


def design(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Designs noise levels and Langevin steps for data, and writes a recipe with them."""
    from scoresde.loss import NoiseDesign
    from scoresde.tasks import design as designs

    data, options = build_data(config.data), config.design
    if not isinstance(options, DictConfig):
        raise InputError(
            f"design must be a mapping, got {options}; set design.sigma_min=0.01, say."
        )
    made = NoiseDesign.of(data, **OmegaConf.to_container(options, resolve=True))  # type: ignore[arg-type]
    values: Any = OmegaConf.to_container(config.data, resolve=True)
    recipe = designs.recipe(made, data.shape, chosen("data"), values)
    about = f"Noise designed for {data.name} (Song and Ermon 2020)."
    path = designs.save(f"# @package _global_\n# {about}\n{OmegaConf.to_yaml(recipe)}", folder)
    command = f"scoresde --config-dir {shlex.quote(str(folder / designs.CONF))} "
    log.info("%s\n%s\nRecipe: %s", about, designs.summary(made, data.shape), path)
    log.info("Train:  %s+experiment=%s", command, designs.NAME)
    return {
        **dataclasses.asdict(made),
        "ratio": made.ratio,
        "step_size": made.step_size,
        "recipe": str(path),
    }


def import_(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Turns a checkpoint of another program into one of ours."""
    from scoresde.tasks.importing import import_checkpoint, read_foreign

    if config.checkpoint is None:
        raise InputError("task=import needs checkpoint=FILE.pth, or a folder of diffusers.")
    reference = config.reference
    if isinstance(reference, DictConfig):
        reference = OmegaConf.to_container(reference, resolve=True)
    imported = read_foreign(config.checkpoint, reference)
    plan = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plan, dict)
    parts = {key: plan[key] for key in ("name", "likelihood")}
    data = plan["data"] if given("data") else None
    checkpoint = import_checkpoint(imported, folder, parts, data)
    parameters = sum(value.numel() for value in checkpoint.ema.values())
    log.info("%d numbers, step %d: %s", parameters, checkpoint.step, folder / "checkpoint.pt")
    return {"parameters": parameters, "step": checkpoint.step}


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
# Those that keep what is done, go on with it, and share it between processes.
RESUMED = ("sample", "restore", "encode", "likelihood", "classify", "search")
