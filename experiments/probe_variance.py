"""Measures how far each trace estimator's log-likelihood lies from the exact one, image by image.

    python experiments/probe_variance.py --checkpoint RUN [--out FOLDER] [--examples 4]
        [--times 24] [--repeats 64] [--products 1 4 16 48] [--split test] [--allow PACKAGE]

The path is not that of the ODE but one of the same marginals, which needs no solver: test images
are noised by one and the same noise to fixed times, uniform in log-SNR from the likelihood's
cut-off (or a standard deviation of 1e-3, if that is later) to 1, and the divergence is integrated
by the trapezoid rule. As in a likelihood, a probe stays the same along the path.

The model enters once: its whole Jacobian is taken at every image and time, D backward passes each.
The estimators then work on the linear field with this Jacobian, and give what they would have
given for the model, at so little cost that each can be repeated many times. The error of an
estimate is its distance to the integral of the exact trace; the table gives its root mean square
over repeats and images in bits/dim, which is what one image's likelihood is off by, and beside it
that of the standard error that the estimator itself claims.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.divergence import (
    ColourProbing,
    Distribution,
    ExactTrace,
    Gaussian,
    Hutchinson,
    Orthogonal,
    Products,
    Rademacher,
    Sphere,
    Trace,
)
from scoresde.model import Conditioned, ScoreFunction
from scoresde.streams import Purpose, Streams
from scoresde.train import Checkpoint

DISTRIBUTIONS: tuple[Distribution, ...] = (Rademacher(), Gaussian(), Sphere(), Orthogonal())
SPACINGS = (1, 2, 3, 4, 6)
LEAST_STD = 1e-3  # of the noise: an exact score's divergence grows without bound below


@dataclass
class Course:
    """One image's path: its Jacobians ``(T, D, D)`` and the weights ``(T,)`` of its integral."""

    jacobians: Tensor
    weights: Tensor
    shape: tuple[int, ...]

    @property
    def exact(self) -> Tensor:
        traces = self.jacobians.diagonal(dim1=1, dim2=2).sum(1)
        return (self.weights * traces).sum()


def main() -> None:
    given = arguments()
    torch.manual_seed(0)
    checkpoint = Checkpoint.load(given.checkpoint)
    model = checkpoint.build_model(given.allow).eval()
    data = checkpoint.build("data", Dataset, given.allow)
    x = data.batch(given.split, Streams.of(0, batch=given.examples)).x
    clock = time.perf_counter()
    paths = [taken(model, x[i : i + 1], given.times, i) for i in range(len(x))]
    seconds = time.perf_counter() - clock
    print(f"{len(paths)} x {given.times} Jacobians of {x[0].numel()} dimensions: {seconds:.0f} s")
    rows = [
        measured(name, trace, paths, given.repeats)
        for budget in given.products
        for name, trace in estimators(budget, tuple(x.shape[1:]))
    ]
    for row in unique(rows):
        print(
            f"{row['estimator']:>12} {row['products']:4d} products   rmse "
            f"{row['rmse']:.4f} ± {row['uncertainty']:.4f} bits/dim   claimed {row['claimed']:.4f}"
        )
    result = {
        "recipe": checkpoint.recipe["name"],
        "data": f"{data.name}, {given.split}",
        **{key: vars(given)[key] for key in ("examples", "times", "repeats")},
        "shape": list(x.shape[1:]),
        "torch": torch.__version__,
        "rows": unique(rows),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(unique(rows), given.out / "figure.png", f"{data.name}, {x[0].numel()} dimensions")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder or file")
    parser.add_argument("--out", type=Path, default=Path("experiments/probe_variance"))
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--times", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=64)
    parser.add_argument("--products", type=int, nargs="+", default=[1, 4, 16, 48])
    parser.add_argument("--split", default="test")
    parser.add_argument("--allow", nargs="*", default=[], help="packages the recipe may use")
    return parser.parse_args()


# --- The path ------------------------------------------------------------------------------------


def taken(model: ScoreFunction, x: Tensor, count: int, index: int) -> Course:
    """Takes the Jacobians of the probability-flow field along an image's noised copies."""
    times, weights = grid(model, count)
    noise = Streams.of(0, [index]).normal(x.shape[1:], Purpose.NOISE).expand(count, *x.shape[1:])
    states = model.sde.perturb(x.expand_as(noise), times.float(), noise)
    field = Conditioned(model)
    states = states.requires_grad_()
    units = ExactTrace().probes(Streams.of(0, batch=1), states)
    product = Products(field.velocity(states, times.float()), states, len(units))
    rows = torch.stack([product(unit).flatten(1) for unit in units], 1)
    return Course(rows.double(), weights, tuple(x.shape[1:]))


def grid(model: ScoreFunction, count: int) -> tuple[Tensor, Tensor]:
    """Returns times uniform in log-SNR, and the weights of the trapezoid rule, float64."""
    sde, one = model.sde, torch.ones((), dtype=torch.float64)
    first = sde.log_snr(max(sde.cutoffs.likelihood, 1e-9) * one)
    first = first.clamp(max=-2 * math.log(LEAST_STD))
    steps = torch.linspace(float(first), float(sde.log_snr(one)), count, dtype=torch.float64)
    times = sde.time(steps).clamp(0, 1)
    return times, torch.gradient(times)[0] * torch.tensor([0.5, *[1] * (count - 2), 0.5])


# --- The estimators ------------------------------------------------------------------------------


def estimators(budget: int, shape: tuple[int, ...]) -> Iterator[tuple[str, Trace]]:
    """Yields what can be had for a number of products."""
    for distribution in DISTRIBUTIONS:
        if budget <= math.prod(shape) or not isinstance(distribution, Orthogonal):
            yield type(distribution).__name__, Hutchinson(budget, distribution)
    for spacing in SPACINGS:
        trace = ColourProbing(spacing)
        cost = trace.products(torch.empty(1, 1, *shape))
        if 1 < cost <= budget and cost < math.prod(shape):
            yield f"colours, {spacing}", ColourProbing(spacing, budget // cost)


def measured(name: str, trace: Trace, paths: list[Course], repeats: int) -> dict:
    """Returns the error of an estimator over paths and repeats, in bits/dim."""
    errors, claims = [], []
    for seed, path in enumerate(paths):
        estimates, products = integrated(trace, path, Streams.of(seed, batch=repeats))
        unit = math.prod(path.shape) * math.log(2)
        errors.append((estimates.mean(1) - path.exact) / unit)
        claims.append(trace.standard_error(estimates) / unit)
    squares = torch.cat(errors).square()
    rmse = squares.mean().sqrt()
    return {
        "estimator": name,
        "products": products,
        "rmse": float(rmse),
        "uncertainty": float(squares.std() / len(squares) ** 0.5 / (2 * rmse)),
        "claimed": float(torch.cat(claims).square().mean().sqrt()),
    }


def integrated(trace: Trace, path: Course, streams: Streams) -> tuple[Tensor, int]:
    """Returns the integrals ``(repeats, n)`` of the estimates, each by probes of its own."""
    x = torch.zeros(len(streams), *path.shape, dtype=torch.float64)
    probes, total = trace.probes(streams, x), torch.zeros(())
    for weight, jacobian in zip(path.weights, path.jacobians, strict=True):

        def field(x: Tensor, j: Tensor = jacobian) -> Tensor:
            return (x.flatten(1) @ j.T).reshape(x.shape)

        total = total + weight * trace(field, x, probes)[1]
    return total, trace.products(probes)


def unique(rows: list[dict]) -> list[dict]:
    """Drops rows of an estimator that a smaller budget has shown already."""
    seen = {(row["estimator"], row["products"]): row for row in rows}
    return sorted(seen.values(), key=lambda row: (row["estimator"], row["products"]))


# --- The figure ----------------------------------------------------------------------------------


def draw(rows: list[dict], file: Path, title: str) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["estimator"] for row in rows)):
        line = [row for row in rows if row["estimator"] == name]
        axes.plot(
            [row["products"] for row in line],
            [row["rmse"] for row in line],
            marker="os^Dv<>PX*"[i % 10],
            linestyle="--" if name.startswith("colours") else "-",
            label=name,
        )
    ticks = sorted({row["products"] for row in rows if row["estimator"] == "Rademacher"})
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="products with the Jacobian",
        ylabel="rmse of one image, bits/dim",
        title=title,
    )
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
