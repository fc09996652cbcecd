"""The task ``restore``: with a posterior, a sampler with observations, or a bridge."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from scoresde.commands.shared import PARTS, identity_of, rank_of, say_cautions
from scoresde.commands.training import check_no_path, path_of
from scoresde.configuration import (
    allowed,
    check_given,
    evaluated_data,
    given,
    guided,
    instantiate,
    load,
    requested,
)
from scoresde.errors import InputError
from scoresde.tasks.identity import fingerprint
from scoresde.tasks.parts import Parts
from scoresde.tasks.summary import format_table

log = logging.getLogger("scoresde")


def restore(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws examples consistent with observations, and writes a report."""
    from scoresde.model import BridgeModel
    from scoresde.tasks.restoration import restore as run

    checkpoint, model = load(config)
    if isinstance(model, BridgeModel):
        return _restore_by_bridge(config, folder, checkpoint, model)
    check_no_path(config)
    say_cautions(checkpoint)  # a posterior relies on the score
    restoration, truth, title, guidance = _restoration(config, checkpoint, model)
    identity = {
        **identity_of(checkpoint, config),
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
    """Restores sources with a bridge model, and writes a report."""
    from scoresde.tasks.bridging import restore_pairs

    job, truth, title = _bridge_job(config, checkpoint, model)
    identity = {
        **identity_of(checkpoint, config),
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
    """Returns the restoration job of a bridge, the truth if known, and a title."""
    from scoresde.codec import Codec
    from scoresde.streams import random_rows
    from scoresde.tasks.bridging import BridgeJob

    for name in ("operator", "method", "sampler", "guidance", "std"):
        if given(name):
            raise InputError(
                f"{name} has no effect on a bridge, which was trained on pairs; remove it, and "
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
    draws, path = config.draws if given("draws") else 8, path_of(config)
    return BridgeJob(model, path, source, codec, draws, config.seed, cond), truth, title


def _source(config: DictConfig, codec: Any) -> torch.Tensor:
    """Reads the sources of a bridge, in model units; an integer k represents k + 1/2."""
    from scoresde.tasks.sources import read_source

    values = read_source(config.source, codec.raw_shape, codec)
    middle = 0.5 if values.is_floating_point() and codec.levels is not None else 0.0
    return codec.encode(values - middle)


def _truth(config: DictConfig, codec: Any, own: Any, count: int | None) -> Any:
    """Returns the true examples of the sources: from the data, or from a file."""
    from scoresde.tasks.sources import read_source

    if config.truth is None:
        return own
    if count is None:
        raise InputError(
            f"truth requires the observed examples, got {config.truth} without source; set "
            "source=PATH."
        )
    truth = read_source(config.truth, codec.raw_shape, codec)
    if len(truth) != count:
        raise InputError(f"truth must have {count} examples like source, got {len(truth)}.")
    return truth


def _restoration(config: DictConfig, checkpoint: Any, model: Any) -> tuple[Any, Any, str, Any]:
    """Returns the restoration job, the truth if known, a title, and the guidance."""
    from scoresde.codec import Codec
    from scoresde.inverse import Observation
    from scoresde.streams import random_rows
    from scoresde.tasks.restoration import Restoration, simulate

    codec = checkpoint.build("units", Codec, allowed(config)).placed(model.device)
    model, guidance = guided(model, config, codec)
    method, sampler = _method(config)
    std = config.std
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise InputError(
            "std must be finite and at least 0, the noise of the observation in raw units, got "
            f"{std}."
        )
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
    """Returns the operator, and the observations from the source."""
    from scoresde.tasks.sources import read_source

    raw = tuple(codec.raw_shape)
    if (config.get("operator") or {}).get("mask") == "nan":
        y = read_source(config.source, raw, codec)
        return _operator(config, codec, y), y.nan_to_num(0.0)
    operator = _operator(config, codec, torch.empty(0))
    shape = operator(torch.zeros(1, *raw)).shape[1:]
    return operator, read_source(config.source, shape, codec)


def _operator(config: DictConfig, codec: Any, source: torch.Tensor) -> Any:
    """Builds the operator; a mask is read from its file, or from the NaN values of the source."""
    from scoresde.operators import Masking, Operator
    from scoresde.tasks.sources import read_mask

    if config.get("operator") is None:
        raise InputError(
            "operator is required for task=restore; use operator=hole, random_mask, masking "
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
    if plan.get("mask") == "???":
        raise InputError("operator.mask is required; set operator.mask=FILE.")
    if isinstance(plan.get("mask"), str):
        plan["mask"] = read_mask(plan["mask"], codec.raw_shape)
        return Masking(plan["mask"])
    if "shape" in plan and plan["shape"] is None:
        plan["shape"] = list(codec.raw_shape)
    operator = instantiate(plan, "operator")
    if not isinstance(operator, Operator):
        raise InputError(
            f"operator must be an Operator of scoresde.operators, got {type(operator).__name__}."
        )
    return operator


def _method(config: DictConfig) -> tuple[Any, Any]:
    """Returns the method, and its sampler if the method builds a posterior model."""
    from scoresde.inverse import StepRule
    from scoresde.sample import Sampler

    method = instantiate(config.method, "method")
    rule = isinstance(method, StepRule)
    if rule and given("sampler"):
        raise InputError(
            f"sampler has no effect on method={type(method).__name__}, which is a sampler itself; "
            "remove it, and set method.steps instead."
        )
    if not rule and not callable(method):
        raise InputError(
            f"method must be a posterior or a step rule, got {type(method).__name__}."
        )
    chosen = config.sampler if given("sampler") else config.restore.sampler
    sampler = instantiate(chosen, "sampler")
    if not isinstance(sampler, Sampler):
        raise InputError(
            f"sampler must be a Sampler such as UniPC(), got {type(sampler).__name__}."
        )
    return method, sampler
