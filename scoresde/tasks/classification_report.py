"""Report of a classification: calibration, confusion, margins and errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.metrics import (
    MOST_FEATURES,
    Estimate,
    accuracy,
    confusion,
    logistic_regression,
    reliability,
)
from scoresde.report import Figure, Report, Table, write_report
from scoresde.report import figures as plots
from scoresde.report.classes import confusion_matrix, margins, reliability_diagram
from scoresde.tasks.classification import Classified, save_summary
from scoresde.tasks.sampling import is_image

_ERRORS = 16
_LINEAR = "logistic_regression"
_QUALITY = ("accuracy", "negative_log_posterior", "expected_calibration_error")


def report_classes(
    data: Dataset,
    one: Classified,
    folder: Path,
    *,
    title: str,
    split: str = "test",
    baseline: bool = True,
    facts: Sequence[tuple[str, str]] = (),
    configuration: str = "",
) -> dict[str, Any]:
    """Writes ``classes.npz``, ``classify.json``, the figures and ``report.html``.

    Arguments:
        data: The data set.
        one: The classification of one of its splits.
        folder: The run's folder.
        title: The model's name.
        split: The split.
        baseline: Whether logistic regression is fitted to the training split for comparison.
        facts: Further facts for the report, as pairs of label and value.
        configuration: The whole configuration as YAML.

    Returns:
        The results in numbers.
    """
    one.save(folder)
    results = {"data": data.name, **one.summary()}
    if baseline:
        results |= linear_baseline(data, one, split)
    save_summary(results, folder)
    write_report(
        Report(
            title=f"Classes by {title}",
            subtitle=f"{data.name} ({one.split})",
            facts=[*facts, *_facts(results)],
            tables=_tables(results, one),
            figures=[*_figures(one, folder), *_errors(data, one, folder, split)],
            configuration=configuration,
        ),
        folder / "report.html",
    )
    return results


def linear_baseline(data: Dataset, one: Classified, split: str) -> dict[str, float]:
    """Returns the quality of logistic regression on the same examples, or nothing.

    It requires a labelled training split other than the classified one, examples of at most 4096
    values, and the true classes.
    """
    known = data.conditions_of("train", slice(None)).get("label")
    apart = not data.undivided and split != "train"
    rows = one.known & ~one.failed
    small = data.train[:1].numel() <= MOST_FEATURES
    if known is None or one.truth is None or not (apart and small and bool(rows.any())):
        return {}
    there = (known >= 0).nonzero()[:, 0]
    if len(known[there].unique()) < 2:
        return {}
    classes = one.columns["posterior"].shape[1]
    train = data.train[there.to(data.train.device)]
    test = data.split(split)[one.rows[rows].to(data.train.device)]
    log_prob = logistic_regression(train, known[there], test, classes)
    return _quality_of(log_prob, one.truth[rows])


def _quality_of(log_prob: Tensor, truth: Tensor) -> dict[str, float]:
    label = log_prob.argmax(1)
    right = accuracy(label, truth)
    cost = Estimate.of(-log_prob.gather(1, truth[:, None])[:, 0])
    bins = reliability(log_prob.amax(1).exp().clamp(max=1), label == truth)
    return {
        f"{_LINEAR}_accuracy": right.mean,
        f"{_LINEAR}_accuracy_standard_error": right.standard_error,
        f"{_LINEAR}_negative_log_posterior": cost.mean,
        f"{_LINEAR}_negative_log_posterior_standard_error": cost.standard_error,
        f"{_LINEAR}_expected_calibration_error": bins.expected_error,
        f"{_LINEAR}_calibration_floor": bins.floor,
    }


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    error = results["median_margin_error"]
    known = "unknown (one probe)" if error is None else f"{error:.3g} nats"
    facts = [
        ("examples", f"{results['count']}, {results['with_class']} with a known class"),
        ("classes", str(results["classes"])),
        ("median margin", f"{results['median_margin']:.3g} nats"),
        ("median standard error of a margin", known),
        ("network passes for all classes", f"{results['nfe']:.0f} for each example"),
        ("seconds", f"{results['seconds']:.0f}"),
        ("examples that failed", str(results["failed"])),
        ("seed", str(results["seed"])),
    ]
    if "information" in results:
        facts.insert(4, ("information I(c; x)", f"{_pair(results, 'information')} nats"))
    return facts


def _pair(results: dict[str, Any], name: str, digits: int = 3) -> str:
    """Writes an estimate with its standard error."""
    return f"{results[name]:.{digits}f} ± {results[f'{name}_standard_error']:.{digits}f}"


def _tables(results: dict[str, Any], one: Classified) -> list[Table]:
    tables = [_predicted(one)] if "accuracy" not in results else [_classifiers(results)]
    return [*tables, *_costs(results)]


def _classifiers(results: dict[str, Any]) -> Table:
    names = {"": "this model"} | {f"{_LINEAR}_": "logistic regression"}
    rows = [
        [
            name,
            "likelihoods" if not key else "raw values",
            _pair(results, f"{key}accuracy"),
            _pair(results, f"{key}negative_log_posterior"),
            f"{results[f'{key}expected_calibration_error']:.4f}",
            f"{results[f'{key}calibration_floor']:.4f}",
        ]
        for key, name in names.items()
        if f"{key}accuracy" in results
    ]
    about = (
        "The share of examples whose most probable class is the true one, and the mean of "
        "−log p(c | x) in nats. The calibration error (ECE) is the mean distance between "
        f"confidence and accuracy in {results['calibration_bins']} bins of equal width; its floor "
        "is the calibration error of a perfectly calibrated classifier with these confidences and "
        "this number of examples."
    )
    head = ("classifier", "by", "accuracy", "−log p(c | x)", "ECE", "its floor")
    return Table("Accuracy and calibration", about, head, rows)


def _predicted(one: Classified) -> Table:
    counts = torch.bincount(one.label[~one.failed], minlength=one.columns["posterior"].shape[1])
    rows = [[f"class {c}", "", f"{int(n)}"] for c, n in enumerate(counts)]
    about = "How many examples each class is predicted for; their true classes are unknown."
    return Table("Predicted classes", about, ("class", "", "examples"), rows)


def _costs(results: dict[str, Any]) -> list[Table]:
    there = {"given_class": "given the true class", "unlabelled": "without a class"}
    unit = results.get("unit", "")
    rows = [
        [text, unit, _pair(results, name, 4)] for name, text in there.items() if name in results
    ]
    about = (
        "The cost of an example under its true class, and under the mixture of all classes, "
        "log Σ p(c) p(x | c). The mean difference is the information I(c; x) that the model finds "
        "in an example about its class, at most the logarithm of the number of classes."
    )
    return [Table("Likelihood", about, ("likelihood", "unit", "mean"), rows)] if rows else []


def _figures(one: Classified, folder: Path) -> list[Figure]:
    values = {"all": one.columns["margin"]}
    figures, bins = [], one.reliability()
    if bins is not None and one.truth is not None:
        known, classes = one.known, one.columns["posterior"].shape[1]
        counts = confusion(one.label[known], one.truth[known], classes)
        values = {
            "right": one.columns["margin"][known & one.right],
            "wrong": one.columns["margin"][known & ~one.right],
        }
        figures = [
            Figure(
                "Accuracy against confidence, and the number of examples by confidence.",
                reliability_diagram(bins, folder / "reliability.png"),
            ),
            Figure(
                "True classes (rows) and predicted ones (columns).",
                confusion_matrix(counts, folder / "confusion.png"),
            ),
        ]
    error = one.summary()["median_margin_error"]
    caption = "Margins: the best log p(c) p(x | c) less the second best."
    return [*figures, Figure(caption, margins(values, folder / "margins.png", error))]


def _errors(data: Dataset, one: Classified, folder: Path, split: str) -> list[Figure]:
    """Plots the most confident errors, if the examples are images."""
    wrong = (one.known & ~one.right & ~one.failed).nonzero()[:, 0]
    if not is_image(data.codec) or one.truth is None or len(wrong) == 0:
        return []
    order = one.confidence[wrong].argsort(descending=True, stable=True)[:_ERRORS]
    rows = wrong[order]
    raw = data.split(split)[one.rows[rows].to(data.train.device)].cpu()
    images = data.to_unit(data.codec.encode(raw))
    texts = [f"{one.truth[i]}→{one.label[i]} {_short(float(one.confidence[i]))}" for i in rows]
    caption = (
        f"The {len(rows)} most confident of {len(wrong)} errors: true class → predicted class, "
        "and the confidence."
    )
    path = folder / "errors.png"
    return [Figure(caption, plots.labelled_grid(images, texts, path))]


def _short(share: float) -> str:
    """Formats a share in three characters: .93, 1.0."""
    return f"{share:.2f}"[1:] if share < 0.995 else "1.0"
