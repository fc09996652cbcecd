"""Measures what common random numbers save where classes are told apart by their likelihoods.

    python experiments/generative_classifier.py [--out FOLDER] [--problems 12] [--points 12]
        [--probes 16]

The models are exact mixtures with classes, so the truth is known: three classes of four isotropic
Gaussians of std 0.4 each. The means of the components are standard normal; each class moves them
along a random direction of its own, all three orthogonal, so that any two classes are a given
distance apart, the shift. Points are drawn from all classes. Their log-likelihoods under each
class are estimated under the VP probability flow, by one probe at a time: with the same probes for
every class, and with probes of its own for each. The table has the standard deviations over probes
of one log-likelihood and of the difference of two classes, and how often the most likely class is
the one from which the point comes. The variance of an estimate falls with the number of probes, so
the ratio of the variances is the factor by which probes are saved. It depends on the directions:
the table has the ratio of the mean variances over random problems, and its range over problems.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from scoresde import VPSDE, GaussianMixtureModel, Likelihood
from scoresde.metrics import accuracy

CLASSES, COMPONENTS, STD = 3, 4, 0.4
PROBLEMS = ((16, 0.25), (16, 1.0), (16, 4.0), (64, 0.5), (64, 2.0))
HEAD = (
    "| D | shift | std of log p | of a difference, own probes | of a difference, common probes "
    "| probes saved | range | right: common | own | exact |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)  # on a busy machine a second one only waits
    sizes = {name: getattr(given, name) for name in ("problems", "points", "probes")}
    rows = [measured(d, shift, **sizes) for d, shift in PROBLEMS]
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**sizes, "rows": rows}, indent=2) + "\n"
    (given.out / "table.json").write_text(text)
    table = HEAD + "".join(map(line, rows))
    (given.out / "table.md").write_text(table)
    print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/generative_classifier"))
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--probes", type=int, default=16)
    return parser.parse_args()


def problem(dimension: int, shift: float, seed: int) -> GaussianMixtureModel:
    """Returns the exact model of three classes."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(COMPONENTS, dimension, generator=generator)
    axes = torch.linalg.qr(torch.randn(dimension, CLASSES, generator=generator))[0].T
    moved = means + shift / math.sqrt(2) * axes[:, None]
    count = CLASSES * COMPONENTS
    return GaussianMixtureModel(
        torch.ones(count),
        moved.flatten(0, 1),
        torch.full((count,), STD),
        VPSDE(),
        labels=torch.arange(CLASSES).repeat_interleave(COMPONENTS),
    )


def measured(
    dimension: int, shift: float, problems: int, points: int, probes: int
) -> dict[str, float]:
    """Returns a row of the table."""
    found = [one(problem(dimension, shift, seed), points, probes) for seed in range(problems)]
    mean = {name: sum(row[name] for row in found) / problems for name in found[0]}
    ratios = [row["own"] / row["common"] for row in found]
    return {
        "dimension": dimension,
        "shift": shift,
        **{f"std_{name}": math.sqrt(mean[name]) for name in ("log_prob", "own", "common")},
        "probes_saved": mean["own"] / mean["common"],
        "least_saved": min(ratios),
        "most_saved": max(ratios),
        **{name: mean[name] for name in ("right_common", "right_own", "right_exact")},
    }


def one(model: GaussianMixtureModel, points: int, probes: int) -> dict[str, float]:
    """Returns variances over probes in one problem, and shares of right answers."""
    truth = torch.arange(points) % CLASSES
    x = model.sample(points, seed=1, label=truth)
    common, own = (estimates(model, x, probes, seeds) for seeds in ((0, 0, 0), (0, 1, 2)))
    exact = model.class_log_prob(x, model.sde.cutoffs.likelihood).argmax(1)
    return {
        "log_prob": float(common.var(2).mean()),
        "common": differences(common),
        "own": differences(own),
        "right_common": right(common, truth),
        "right_own": right(own, truth),
        "right_exact": accuracy(exact, truth).mean,
    }


def estimates(
    model: GaussianMixtureModel, x: Tensor, probes: int, seeds: tuple[int, ...]
) -> Tensor:
    """Returns log p(x | c) by each probe, ``(B, C, n)``; every class has a seed."""
    likelihood = Likelihood(probes)
    results = [
        likelihood(model, x, seed=seed, label=torch.full((len(x),), c)).estimates
        for c, seed in enumerate(seeds)
    ]
    return torch.stack([one for one in results if one is not None], 1).double()


def differences(values: Tensor) -> float:
    """Returns the mean variance over probes of the difference of two classes."""
    pairs = [(a, b) for b in range(CLASSES) for a in range(b)]
    return float(torch.stack([(values[:, a] - values[:, b]).var(1) for a, b in pairs]).mean())


def right(values: Tensor, truth: Tensor) -> float:
    """Returns how often one probe finds the class, over points and probes."""
    return float((values.argmax(1) == truth[:, None]).double().mean())


def line(row: dict[str, float]) -> str:
    cells = [
        f"{row['dimension']}",
        f"{row['shift']:g}",
        *(f"{row[name]:.3g}" for name in ("std_log_prob", "std_own", "std_common")),
        f"{row['probes_saved']:.3g}",
        f"{row['least_saved']:.3g} to {row['most_saved']:.3g}",
        *(f"{row[f'right_{name}']:.3f}" for name in ("common", "own", "exact")),
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
