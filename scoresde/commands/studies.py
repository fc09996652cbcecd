"""The other tasks: ``ema``, ``reflow``, ``benchmark``, ``search``, ``design`` and ``import``."""

import copy
import dataclasses
import logging
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from scoresde.commands.shared import built_likelihood
from scoresde.commands.training import train
from scoresde.configuration import (
    build_data,
    check_given,
    check_told,
    chosen,
    cut_of,
    describe,
    device_of,
    evaluated_data,
    given,
    instantiate,
    load,
    measured,
    place,
    random_data,
    requested,
    stored_averages,
    try_model,
    with_codec,
)
from scoresde.errors import InputError, check_count
from scoresde.tasks.summary import format_table

log = logging.getLogger("scoresde")

_NOTHING = object()


def ema(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Compares averages of the weights of a training run by their length."""
    from scoresde.tasks.averages import compare_averages

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    check_told(model, data, config.split)
    try_model(model, data)
    return compare_averages(
        model,
        stored_averages(config),
        built_likelihood(checkpoint, config, data, model),
        data,
        config.split if given("split") else "validation",  # never choose on test data
        folder,
        config.lengths,
        examples=config.examples,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=config.progress,
    )


def reflow(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains a checkpoint's model on pairs from its own flow, for straighter paths."""
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
        raise InputError(
            f"{name} must be a Sampler such as UniPC(), got {type(sampler).__name__}."
        )
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
    """Measures the speed of a recipe on this machine; writes ``benchmark.json`` and a table."""
    from scoresde.tasks import benchmark as bench

    device, options = device_of(config.device), config.benchmark
    check_count("benchmark.rounds", options.rounds)
    _check_counts("benchmark.batch_sizes", options.batch_sizes, "[64]")
    if options.shape is not None:
        _check_counts("benchmark.shape", options.shape, "[3,32,32]")
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


def _check_counts(name: str, values: Any, example: str) -> None:
    if not isinstance(values, ListConfig) or not values:
        raise InputError(
            f"{name} must be a list of positive integers, got {values}; for example set "
            f"{name}={example}."
        )
    for value in values:
        check_count(name, value)


def search(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Runs several training runs with values chosen by Optuna."""
    from scoresde.tasks.search import Search, space_of

    options = OmegaConf.to_container(config.search, resolve=True)
    assert isinstance(options, dict)
    space = space_of(options["space"] or {})
    if not space:
        raise InputError(
            "search.space must not be empty; for example set "
            "'+search.space.optimizer.lr={low:1e-4,high:1e-2,log:true}'."
        )
    for name in space:
        present = OmegaConf.select(config, name, default=_NOTHING)
        if present is _NOTHING or isinstance(present, DictConfig):
            kind = "a missing option" if present is _NOTHING else "a whole group"
            raise InputError(
                f"search.space.{name} must be an option of this recipe, got {kind}; list its "
                "options with --cfg job."
            )

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
    """Designs noise levels and Langevin steps for data, and writes them as a recipe."""
    from scoresde.loss import NoiseDesign
    from scoresde.tasks import design as designs

    data, options = build_data(config.data), config.design
    if not isinstance(options, DictConfig):
        raise InputError(
            f"design must be a mapping, got {options}; for example set design.sigma_min=0.01."
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
    """Converts a checkpoint of another program to a scoresde checkpoint."""
    from scoresde.tasks.importing import import_checkpoint, read_foreign

    if config.checkpoint is None:
        raise InputError(
            "task=import requires checkpoint=FILE.pth, or checkpoint=FOLDER of diffusers."
        )
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
