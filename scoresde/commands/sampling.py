"""The tasks ``sample``, ``interpolate`` and ``encode``."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from scoresde.commands.shared import (
    PARTS,
    data_identity,
    identity_of,
    only_time_of,
    rank_of,
    refuse_one_level,
    say_cautions,
)
from scoresde.configuration import (
    allowed,
    check_given,
    check_told,
    evaluated_data,
    given,
    guided,
    instantiate,
    load,
    requested,
    try_model,
)
from scoresde.errors import InputError
from scoresde.tasks.identity import fingerprint
from scoresde.tasks.parts import Parts

log = logging.getLogger("scoresde")


def sample(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws samples from a checkpoint; each batch is stored when it is done."""
    from scoresde.tasks.sampling import save_trajectory, stream_samples

    checkpoint, drawing, guidance = _drawing(config)
    count = config.count
    if drawing.latents is not None:
        count = _count(config, len(drawing.latents))
    identity = {**identity_of(checkpoint, config), **_drawn_from(drawing, guidance)}
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
    """Compares samples with a split, or with its examples of the same classes."""
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
    """Computes the latents of data."""
    from scoresde.tasks.latents import encode_data

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    check_told(model, data, config.split)
    try_model(model, data)
    refuse_one_level(checkpoint, model, config)
    sampler = instantiate(config.sampler, "sampler")
    identity = {
        **identity_of(checkpoint, config),
        **data_identity(data, config, model),
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
    """Returns the checkpoint, the sampling job, and the guidance."""
    from scoresde.codec import Codec
    from scoresde.sample import Sampler
    from scoresde.tasks.latents import read_latents
    from scoresde.tasks.sampling import Drawing, at_time
    from scoresde.train import is_deterministic

    checkpoint, model = load(config)
    codec = checkpoint.build("units", Codec, allowed(config)).placed(model.device)
    sampler = instantiate(config.sampler, "sampler")
    if not isinstance(sampler, Sampler):
        raise InputError(
            f"sampler must be a Sampler such as UniPC(), got {type(sampler).__name__}."
        )
    only = only_time_of(checkpoint, model, config)
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
    if checkpoint.recipe.get("cautions") and not is_deterministic(
        sampler, model, codec.shape, cond
    ):
        say_cautions(checkpoint)
    return checkpoint, drawing, told


def _save_guidance(guidance: Any, folder: Path) -> None:
    """Writes ``guidance.json``: the guidance, with fingerprints of other models."""
    (folder / "guidance.json").write_text(json.dumps(guidance, indent=1) + "\n")


def _count(config: DictConfig, there: int) -> int:
    """Returns the number of samples to draw from latents: all, or the requested number."""
    if not given("count"):
        return there
    if config.count > there:
        raise InputError(
            f"count must be at most {there} for latents={config.latents}, got {config.count}."
        )
    return config.count


def _drawn_from(drawing: Any, guidance: Any) -> dict[str, Any]:
    latents = "drawn" if drawing.latents is None else fingerprint(drawing.latents)
    told = {name: fingerprint(values) for name, values in drawing.cond.items()}
    return {"sampler": drawing.sampler, "guidance": guidance, "latents": latents, **told}
