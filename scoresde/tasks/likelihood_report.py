"""Report of a likelihood evaluation: figures, extremes, comparison with other data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scoresde.data import Dataset
from scoresde.errors import InputError
from scoresde.metrics import Estimate, auroc
from scoresde.report import Figure, Report, Score, Table, write_report
from scoresde.report import figures as plots
from scoresde.tasks.classes import class_table
from scoresde.tasks.evaluation import Evaluation
from scoresde.tasks.sampling import is_image

_EXTREMES = 16


@dataclass(frozen=True)
class Evaluated:
    """A data set with the likelihood of its examples.

    Arguments:
        data: The data set.
        evaluation: The likelihood of one of its splits.
        split: Its name.
        also: Suffix that distinguishes data sets of the same name.
    """

    data: Dataset
    evaluation: Evaluation
    split: str = "test"
    also: str = ""

    @property
    def title(self) -> str:
        """The data set and the split."""
        return f"{self.data.name}{self.also} ({self.evaluation.split})"


def report_likelihood(
    one: Evaluated,
    other: Evaluated | None,
    folder: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    configuration: str = "",
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the tables, figures and ``report.html`` of an evaluation.

    Arguments:
        one: The data.
        other: Another data set to separate from the first, or None.
        folder: The run's folder.
        title: The model's name.
        facts: Further facts for the report, as pairs of label and value.
        configuration: The whole configuration as YAML.
        remarks: Warnings at the top of the report.

    Returns:
        The numerical results.
    """
    one.evaluation.save(folder)
    results: dict[str, Any] = {"data": one.data.name, **one.evaluation.summary()}
    both = [one]
    caption = f"Examples by their {one.evaluation.unit}."
    if other is not None:
        other = replace(other, also=" (ood)") if other.title == one.title else other
        other.evaluation.save(folder, "ood")
        results |= _apart(one, other)
        caption += f" {_in_words(one, other, results)}"
        both.append(other)
    unit = one.evaluation.unit
    values = {e.title: e.evaluation.values for e in both}
    figures = [
        Figure(caption, plots.histogram(values, folder / "values.png", unit)),
        *(figure for e in both for figure in _steps(e, folder)),
        *(figure for e in both for figure in _extremes(e, folder)),
    ]
    scores = [
        Score(e.title, e.evaluation.mean, e.evaluation.standard_error, unit, _note(e.evaluation))
        for e in both
    ]
    write_report(
        Report(
            title=f"Likelihood of {title}",
            subtitle=" and ".join(e.title for e in both),
            facts=[*facts, *_facts(results)],
            scores=scores,
            figures=figures,
            configuration=configuration,
            data_sets=True,
            remarks=remarks,
            tables=[*_part_tables(both), *_class_tables(both)],
        ),
        folder / "report.html",
    )
    return results


# Descriptions of the parts of a bound, by name.
_PARTS = {
    "reconstruction": "the last step, to the data",
    "consistency": "the steps of the chain",
    "diffusion": "the reverse process",
    "prior": "what is left of the data at t = 1",
}


def _part_tables(sets: Sequence[Evaluated]) -> list[Table]:
    """Returns the parts of a bound, which add up to it."""
    sets = [e for e in sets if e.evaluation.parts]
    if not sets:
        return []
    columns = [(e.evaluation.part_means, e.evaluation) for e in sets]
    rows = [
        [name, _PARTS.get(name, ""), *(_precise(means[name]) for means, _ in columns)]
        for name in sets[0].evaluation.parts
    ]
    total = [f"{e.mean:.4f} ± {e.standard_error:.4f}" for _, e in columns]
    about = (
        f"In {sets[0].evaluation.unit}, each with its standard error over examples and noise. The "
        "parts of an example vary together, so their errors do not add up."
    )
    head = ["part", "of", *(e.title for e in sets)]
    return [Table("Parts of the bound", about, head, [*rows, ["sum", "", *total]])]


def _precise(estimate: Estimate) -> str:
    """Writes a mean that may be small: 0.0123 ± 0.0004, 2.1e-05 ± 3e-07."""
    small = 0 < abs(estimate.mean) < 1e-3
    form = ".2e" if small else ".4f"
    return f"{estimate.mean:{form}} ± {estimate.standard_error:{form}}"


def _steps(one: Evaluated, folder: Path) -> list[Figure]:
    """Draws the terms of the steps of a chain, if there are any."""
    terms = one.evaluation.steps
    if terms is None:
        return []
    good = terms[~one.evaluation.values.isnan()]
    path = folder / f"steps_{_in_file(one)}.png"
    picture = plots.bound_steps(good, path, f"{one.evaluation.unit} per step")
    caption = (
        f"{one.title}: what each of the {terms.shape[1]} steps of the chain adds to the bound, "
        "with its standard error over examples."
    )
    return [Figure(caption, picture)]


def _in_file(one: Evaluated) -> str:
    return "".join(c if c.isalnum() else "_" for c in one.data.name + one.also)


def _class_tables(sets: Sequence[Evaluated]) -> list[Table]:
    """Returns the likelihood of each class, if there are classes."""
    columns = {e.title: e.evaluation.classes for e in sets if e.evaluation.classes}
    return [class_table(columns, sets[0].evaluation.class_names)] if columns else []


def _apart(one: Evaluated, other: Evaluated) -> dict[str, Any]:
    """Measures the separation of two data sets: by the log-density, which should be larger for
    expected data, and by typicality, its distance from their mean, which should be smaller."""
    pair = [e.evaluation.log_prob[e.evaluation.log_prob.isfinite()] for e in (one, other)]
    area, error = auroc(*pair)
    mean = pair[0].mean()
    typical, typical_error = auroc(*(-(values - mean).abs() for values in pair))
    return {
        "ood": other.data.name,
        "ood_mean": other.evaluation.mean,
        "ood_standard_error": other.evaluation.standard_error,
        "auroc": area,
        "auroc_standard_error": error,
        "auroc_typicality": typical,
        "auroc_typicality_standard_error": typical_error,
    }


def _in_words(one: Evaluated, other: Evaluated, results: dict[str, Any]) -> str:
    area, typical = (_area(results, name) for name in ("auroc", "auroc_typicality"))
    words = (
        f"AUROC {area}: how often an example of {one.title} is more likely than one of "
        f"{other.title}; 0.5 is chance level."
    )
    if results["auroc"] + 2 * results["auroc_standard_error"] < 0.5:
        words += (
            f" Below 0.5 the two differ in the other direction: {other.title} is the more likely."
        )
    return f"{words} By typicality, the distance of log p from its mean, AUROC {typical}."


def _area(results: dict[str, Any], name: str) -> str:
    return f"{results[name]:.4f} ± {results[f'{name}_standard_error']:.4f}"


def check_comparable(data: Dataset, other: Dataset) -> None:
    """Checks that two data sets can be compared by their densities.

    Raises:
        InputError: If their examples are of different kinds.
    """
    if (data.raw_shape, data.levels) != (other.raw_shape, other.levels):
        raise InputError(
            f"ood must have the shape {data.raw_shape} and levels={data.levels} of the data, "
            f"got {other.name} with shape {other.raw_shape} and levels={other.levels}."
        )


def _note(evaluation: Evaluation) -> str:
    nfe = evaluation.summary()["nfe"]
    return f"NFE {nfe:.0f}, {evaluation.seconds:.0f} s for {len(evaluation.values)} examples"


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    density = f"{results['mean_log_prob']:.2f} ± {results['standard_error_log_prob']:.2f}"
    facts = [
        ("mean log-density", f"{density} nats in model units"),
        ("mismatch of the prior", f"{results['prior_mismatch_nats']:.2g} nats"),
        ("examples that failed", str(results["failed"])),
        ("seed", str(results["seed"])),
    ]
    if "auroc" in results:
        ood = results["ood"]
        facts.append((f"AUROC against {ood}", _area(results, "auroc")))
        facts.append((f"AUROC by typicality against {ood}", _area(results, "auroc_typicality")))
    return facts


def _extremes(one: Evaluated, folder: Path) -> list[Figure]:
    """Plots the images with the lowest and highest likelihood."""
    data, values = one.data, one.evaluation.values
    if not is_image(data.codec):
        return []
    order = values.argsort()
    order = order[~values[order].isnan()]
    ends = {"most": order[:_EXTREMES], "least": order[-_EXTREMES:].flip(0)}
    figures = []
    for word, rows in ends.items():
        raw = data.split(one.split).cpu()[one.evaluation.rows[rows]]
        path = folder / f"{word}_likely_{_in_file(one)}.png"
        labels = [_short(float(value)) for value in values[rows]]
        picture = plots.labelled_grid(data.to_unit(data.codec.encode(raw)), labels, path)
        caption = f"{one.title}: the {word} likely images, with their {one.evaluation.unit}."
        figures.append(Figure(caption, picture))
    return figures


def _short(value: float) -> str:
    """Formats a number in few characters: 2.05, -3071."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
