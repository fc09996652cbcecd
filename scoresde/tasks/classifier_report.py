"""Report of a classifier: its cross entropy and accuracy at each noise level."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.data import Dataset, random_rows
from scoresde.model import Classifier
from scoresde.report import Figure, Report, Table, write_report
from scoresde.report import figures as plots
from scoresde.streams import Purpose, Streams
from scoresde.train import read_metrics
from scoresde.train.validation import log_snr_levels


@torch.no_grad()
def accuracy_by_level(
    classifier: Classifier,
    data: Dataset,
    split: str = "test",
    *,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Returns the cross entropy and the accuracy at levels that cover the log-SNR.

    Arguments:
        classifier: The classifier.
        data: The data; examples without a class are skipped.
        split: The split.
        examples: The number of examples, chosen at random; each is noised at every level. If None,
            all are used.
        batch_size: The number of examples classified together.
        seed: Seed of the noise.

    Returns:
        A row for each level: ``log_snr``, ``cross_entropy`` in nats, ``accuracy`` in [0, 1].
    """
    rows = random_rows(len(data.split(split)), examples or len(data.split(split)))
    levels = log_snr_levels(classifier.sde, classifier.sde.cutoffs.training)
    times = classifier.sde.time(levels)
    sums = torch.zeros(3, len(times), dtype=torch.float64)
    for part in rows.split(batch_size):
        batch = data.batch(split, Streams(seed, part))
        x = classifier.state(batch.x.to(classifier.device))
        streams = Streams(seed, part.to(x.device))
        for i, t in enumerate(times):
            noise = streams.normal(x.shape[1:], Purpose.NOISE, i, x.dtype)
            found = classifier(classifier.sde.perturb(x, t, noise), t).cpu()
            sums[:, i] += _sums(found, batch.cond["label"].cpu())
    count, entropy, right = sums
    values = zip(
        levels.tolist(), (entropy / count).tolist(), (right / count).tolist(), strict=True
    )
    return [{"log_snr": level, "cross_entropy": h, "accuracy": a} for level, h, a in values]


def _sums(found: Tensor, label: Tensor) -> Tensor:
    """Returns the number of labelled and of correct examples, and the cross entropy."""
    known = label >= 0
    own = -found[known].gather(1, label[known, None])
    return torch.stack([known.sum(), own.sum(), (found.argmax(1) == label)[known].sum()]).double()


def report_classifier(
    classifier: Classifier,
    data: Dataset,
    split: str,
    folder: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    configuration: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Writes ``accuracy.json`` and ``report.html`` of a trained classifier.

    Arguments:
        classifier: The classifier.
        data: The data.
        split: The split to evaluate.
        folder: The run's folder, with the training's ``metrics.jsonl``.
        title: The name of the run.
        facts: Further facts for the report, as pairs of label and value.
        configuration: The whole configuration as YAML.
        **options: As for :func:`accuracy_by_level`.

    Returns:
        The numerical results: over all levels, and at the lowest noise.
    """
    rows = accuracy_by_level(classifier, data, split, **options)
    (folder / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    cells = [
        (f"{r['log_snr']:+.2f}", "", f"{r['accuracy']:.3f}", f"{r['cross_entropy']:.3f}")
        for r in rows
    ]
    table = Table(
        "Accuracy at each noise level",
        f"Of the examples of {data.name} ({split}), each noised at every level.",
        ("log-SNR", "", "accuracy", "cross entropy in nats"),
        cells,
    )
    loss = plots.loss_curve(read_metrics(folder), folder / "loss.png")
    report = Report(
        title=title,
        subtitle=f"Classifier, {type(classifier.sde).__name__} on {data.name}",
        facts=facts,
        tables=[table],
        figures=[Figure("The cross entropy in training and on validation data.", loss)],
        configuration=configuration,
    )
    write_report(report, folder / "report.html")
    means = {k: sum(r[k] for r in rows) / len(rows) for k in ("cross_entropy", "accuracy")}
    return {**means, "accuracy_at_least_noise": rows[0]["accuracy"]}
