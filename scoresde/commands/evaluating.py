"""The tasks ``likelihood`` and ``classify``."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde.commands.shared import (
    PARTS,
    built_draws,
    built_likelihood,
    data_identity,
    identity_of,
    rank_of,
)
from scoresde.configuration import (
    build_data,
    check_told,
    evaluated_data,
    load,
    log_prior_of,
    try_model,
    undivided,
)
from scoresde.errors import InputError
from scoresde.tasks.parts import Parts

log = logging.getLogger("scoresde")


def likelihood(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on a split of its data, or of the given data."""
    from scoresde.tasks.evaluation import check_draws, check_levels, evaluate_likelihood
    from scoresde.tasks.likelihood_report import Evaluated, check_comparable, report_likelihood

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    check_told(model, data, config.split)
    try_model(model, data)
    exact = built_likelihood(checkpoint, config, data, model)
    draws = built_draws(config, exact, data)
    check_levels(data, exact, draws)
    check_draws(data, draws)
    sets = {PARTS: data}
    if config.get("ood") is not None:
        given_ood = OmegaConf.to_container(config.ood, resolve=True)
        other = build_data(undivided(given_ood, "ood", data.codec))
        check_comparable(data, other)
        other = replace(other.to(model.device), codec=data.codec).renamed(data.class_names)
        check_told(model, other, config.split)
        sets["parts_ood"] = other
    evaluated = []
    for name, one in sets.items():
        identity = {
            **identity_of(checkpoint, config),
            **data_identity(one, config, model),
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
    """Returns a warning if a model was not trained on integers at the centres of their levels."""
    loss = checkpoint.recipe.get("loss") or {}
    loss = loss.get("loss") or loss  # the wrapped loss
    if exact.levels is None or not data.dequantise or loss.get("decoder") is not None:
        return []
    text = (
        "The model was trained on dequantised integers, whose density is flat within a level. A "
        "bound with a decoder over levels is meant for a model of integers at the centres, and is "
        "loose for this model. likelihood=default evaluates what it was trained for."
    )
    log.warning("%s", text)
    return [text]


def classify(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Classifies examples of a split by the likelihoods of a model under each class."""
    from scoresde.tasks.classification import classify_examples
    from scoresde.tasks.classification_report import report_classes

    checkpoint, model = load(config)
    data = evaluated_data(checkpoint, config).to(model.device)
    exact = built_likelihood(checkpoint, config, data, model)
    classifier = _classifier(model, exact, config)
    check_told(model, data, config.split, optional=["label"])
    try_model(model, data)
    identity = {
        **identity_of(checkpoint, config),
        **data_identity(data, config, model),
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
    """Returns the classifier of a model with a known number of classes."""
    from scoresde.likelihood import GenerativeClassifier
    from scoresde.model import check_model, classes_of

    check_model(model)  # rejects a classifier of noisy data
    classes = classes_of(model)
    if not model.takes("label"):
        raise InputError(
            "checkpoint must contain a model with classes for task=classify, got a model without; "
            "train one with network.classes=C on data with labels."
        )
    if classes is None:
        raise InputError(
            "network must contain a Conditioning(classes=C) for task=classify, got a network "
            "without; from Python use "
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
