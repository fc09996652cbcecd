"""Measures what guidance buys and costs: how well digits are recognised, and how much they vary.

    python experiments/guidance_scale.py [--checkpoint RUN] [--count 500] [--out FOLDER]

RUN is a model of the digits with classes that has seen examples without (``network.classes=10``
and a tenth of the examples without their class); without it one is trained, on examples of which
every tenth never has its class. Digits of all classes are drawn by UniPC in 20 steps, from the
same latents at every scale.

Accuracy is the share that a support vector machine, fitted to the real training digits, puts into
the class that was asked for. Variety is the mean distance between two digits of a class, averaged
over the classes and divided by that of the real test digits. Standard errors are those of a share,
and of the mean over ten classes.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.svm import SVC
from torch import Tensor

from scoresde import VPSDE, ScoreModel, fit, load
from scoresde.data import Dataset, digits
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.nn import UNet
from scoresde.sample import UniPC

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INTERVALS = {"always": None, "0.2 to 5": (0.2, 5.0)}
CLASSES = 10


def trained(data: Dataset, steps: int) -> ScoreModel:
    """Returns a model of the digits, a tenth of which have no class in training."""
    first, *rest = data.conditions["label"]
    known = torch.arange(len(first)) % 10 > 0
    some = replace(data, conditions={"label": [torch.where(known, first, -1), *rest]})
    torch.manual_seed(0)
    network = UNet(data.shape, width=16, multipliers=(1, 2, 2), blocks=1, classes=CLASSES)
    return fit(ScoreModel(network, VPSDE()), some, steps, batch_size=64)


def variety(x: Tensor, label: Tensor) -> tuple[float, float]:
    """Returns the mean distance of two examples of a class, and its standard error."""
    means = []
    for c in range(CLASSES):
        part = x[label == c].flatten(1)
        means.append(torch.pdist(part).mean())
    found = torch.stack(means)
    return float(found.mean()), float(found.std() / CLASSES**0.5)


def measure(model: ScoreModel, data: Dataset, count: int) -> list[dict[str, object]]:
    """Returns a row for each interval and scale."""
    judge = SVC(gamma="scale", C=10.0).fit(data.train.flatten(1), data.conditions["label"][0])
    real, _ = variety(data.test.float(), data.conditions["label"][2])
    right = judge.score(data.test.flatten(1), data.conditions["label"][2])
    print(f"The judge is right on {right:.3f} of the real test digits.")
    label, rows = torch.arange(count) % CLASSES, []
    for name, interval in INTERVALS.items():
        for scale in SCALES:
            guided = ClassifierFreeGuidance(model, scale, interval)
            out = UniPC(steps=20)(guided, shape=(count, *data.shape), seed=0, label=label)
            raw = data.decode(out.x.cpu())
            accuracy = judge.score(raw.flatten(1), label)
            spread, error = variety(raw.float(), label)
            row = {
                "interval": name,
                "scale": scale,
                "accuracy": accuracy,
                "accuracy_error": (accuracy * (1 - accuracy) / count) ** 0.5,
                "variety": spread / real,
                "variety_error": error / real,
                "nfe": float(out.nfe.double().mean()),
            }
            print(row)
            rows.append(row)
    return rows


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Draws the variety against the accuracy, a curve for each interval."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in INTERVALS:
        own = [row for row in rows if row["interval"] == name]
        x, y = ([row[key] for row in own] for key in ("variety", "accuracy"))
        axes.plot(x, y, marker="o", ms=4, label=f"sigma / alpha: {name}")
        for row, a, b in zip(own, x, y, strict=True):
            axes.annotate(f"{row['scale']:g}", (a, b), textcoords="offset points", xytext=(4, -9))
    axes.set(
        xlabel="variety within a class (real digits: 1)", ylabel="share recognised as asked for"
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="the run of a conditional model of the digits")
    parser.add_argument(
        "--steps", type=int, default=1500, help="of training, without a checkpoint"
    )
    parser.add_argument("--count", type=int, default=500, help="digits for each scale")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    model = load(options.checkpoint).model if options.checkpoint else trained(data, options.steps)
    rows = measure(model, data, options.count)
    options.out.mkdir(exist_ok=True)
    (options.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.out / "figure.png")


if __name__ == "__main__":
    main()
