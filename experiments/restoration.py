"""Restores held-out digits along a bridge, next to a Wiener filter and bicubic interpolation.

    python -m scoresde.run +experiment=digits_indi hydra.run.dir=BLUR
    python -m scoresde.run +experiment=digits_indi operator@data.operator=downsampling \
        hydra.run.dir=SMALL
    python experiments/restoration.py --runs BLUR SMALL [--out FOLDER]

Each run is restored in 1 to 50 steps with the noise of its bridge, and in 50 steps without.
PSNR, SSIM and the sliced Wasserstein distance to the true digits are means over draws, and
intervals are standard errors over them; the distance between two sets of true digits of the same
size says what is nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from scoresde import load
from scoresde.data import Dataset
from scoresde.metrics import psnr, sliced_wasserstein, spread_ratio, ssim
from scoresde.operators import Downsampling
from scoresde.recipe import build
from scoresde.sample import Restore

STEPS = (1, 2, 5, 10, 20, 50)
DRAWS = 4


def wiener(data: Dataset, source: Tensor) -> Tensor:
    """Returns the Wiener filter's estimate: the best linear one for a stationary spectrum.

    .. math:: m + C A^T (A C A^T + std^2)^{-1} (y - A m)

    The mean digit m and the spectrum of what is left, of which C is the covariance, are those of
    the training digits.
    """
    train = data.train.double() + 0.5
    shape, mean = train.shape[1:], train.mean(0)
    power = torch.fft.fft2(train - mean).abs().square().mean(0) / mean.numel()
    basis = torch.eye(mean.numel(), dtype=torch.float64).reshape(-1, *shape)
    covariance = torch.fft.ifft2(power * torch.fft.fft2(basis)).real.flatten(1)
    a = data.degradation.operator(basis).flatten(1).T
    y = measured(data, source).flatten(1)
    inner = a @ covariance @ a.T + data.degradation.std**2 * torch.eye(len(a)).double()
    change = (y - a @ mean.flatten()) @ torch.linalg.solve(inner, a @ covariance)
    return rounded(data, mean + change.reshape(-1, *shape))


def measured(data: Dataset, source: Tensor) -> Tensor:
    """Returns what was measured, of a source that the pseudo-inverse may have enlarged."""
    y = data.codec.decode(source.double(), rounded=False)
    small = isinstance(data.degradation.operator, Downsampling)
    return data.degradation.operator(y) if small else y


def bicubic(data: Dataset, source: Tensor) -> Tensor:
    """Returns the small images, enlarged by a bicubic filter."""
    factor = data.degradation.operator.factor
    large = torch.nn.functional.interpolate(
        measured(data, source), scale_factor=factor, mode="bicubic"
    )
    return rounded(data, large)


def rounded(data: Dataset, values: Tensor) -> Tensor:
    return values.floor().clamp(0, data.levels - 1).to(torch.uint8)


def scores(data: Dataset, x: Tensor, truth: Tensor) -> dict[str, float]:
    span, own = float(data.levels - 1), data.codec
    return {
        "psnr": float(psnr(x, truth, span).mean()),
        "ssim": float(ssim(x, truth, span).mean()),
        "distance": sliced_wasserstein(own.encode(x), own.encode(truth), projections=512),
    }


def several(data: Dataset, draws: Tensor, truth: Tensor) -> dict[str, Any]:
    """Returns means over draws ``(K, N, *)``, and their standard errors."""
    found = [scores(data, x, truth) for x in draws]
    table = {name: torch.tensor([one[name] for one in found]).double() for name in found[0]}
    row: dict[str, Any] = {name: float(values.mean()) for name, values in table.items()}
    row |= {f"{n}_error": float(v.std() / len(draws) ** 0.5) for n, v in table.items()}
    return {**row, "spread_ratio": spread_ratio(draws.transpose(0, 1).double(), truth.double())}


def restored(run: Any, source: Tensor, sampler: Restore, draws: int) -> Tensor:
    """Returns draws ``(K, N, *)`` in raw units."""
    sets = [
        sampler(run.model, source=source, seed=0, seeds=range(i, i + len(source)))
        for i in range(0, draws * len(source), len(source))
    ]
    return torch.stack([run.codec.decode(one.x) for one in sets])


def rows_of(run: Any, data: Dataset) -> list[dict[str, Any]]:
    truth, source = data.test, data.conditions_of("test")["source"]
    rows = [{"method": "source", "passes": 0, **scores(data, data.codec.decode(source), truth)}]
    simple = {"Wiener filter": wiener}
    if isinstance(data.degradation.operator, Downsampling):
        simple["bicubic"] = bicubic
    for name, method in simple.items():
        rows.append({"method": name, "passes": 0, **scores(data, method(data, source), truth)})
    for steps in STEPS:
        draws = restored(run, source, Restore(steps), DRAWS)
        rows.append({"method": "bridge", "passes": steps, **several(data, draws, truth)})
    mean = run.codec.encode(draws.flatten(0, 1)).unflatten(0, draws.shape[:2]).mean(0)
    many = {"method": f"bridge, mean of {DRAWS} draws", "passes": STEPS[-1] * DRAWS}
    rows.append({**many, **scores(data, run.codec.decode(mean), truth)})
    still = restored(run, source, Restore(STEPS[-1], noise=0.0), 1)[0]
    rows.append({"method": "bridge, no noise", "passes": STEPS[-1], **scores(data, still, truth)})
    nothing = data.codec.encode(data.validation[: len(truth)]), data.codec.encode(truth)
    floor = sliced_wasserstein(*nothing, projections=512)
    return [*rows, {"method": "other true digits", "passes": 0, "distance": floor}]


def table(title: str, rows: list[dict[str, Any]]) -> str:
    head = "| {} | passes | PSNR, dB | SSIM | distance | error / spread |\n" + "|---" * 6 + "|\n"
    lines = []
    for row in rows:
        cells = [row["method"], str(row["passes"])]
        for name, digits in (("psnr", 2), ("ssim", 3), ("distance", 4)):
            value = f"{row[name]:.{digits}f}" if name in row else ""
            error = row.get(f"{name}_error", 0.0)
            cells.append(value + (f" ± {error:.{digits}f}" if error > 1e-9 else ""))
        ratio = row.get("spread_ratio", float("nan"))
        cells.append(f"{ratio:.2f}" if ratio == ratio else "")
        lines.append("| " + " | ".join(cells) + " |")
    return head.format(title) + "\n".join(lines) + "\n"


def picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        way = [row for row in rows if row["method"] == "bridge"]
        axes.plot(
            [r["psnr"] for r in way], [r["distance"] for r in way], "o-", label="bridge, by steps"
        )
        for row in way:
            axes.annotate(
                row["passes"],
                (row["psnr"], row["distance"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
        for row, marker in zip(rows[:-1], "sDv", strict=False):
            if row["passes"]:
                break
            axes.plot([row["psnr"]], [row["distance"]], marker, label=row["method"])
        still = next(row for row in rows if row["method"] == "bridge, no noise")
        axes.plot([still["psnr"]], [still["distance"]], "^", label="bridge, no noise")
        axes.axhline(rows[-1]["distance"], color="grey", ls="--", lw=1, label="other true digits")
        axes.set(title=title, xlabel="PSNR, dB", ylabel="sliced Wasserstein distance")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("experiments/restoration"))
    given = parser.parse_args()
    found = {}
    for folder in given.runs:
        run = load(folder)
        data = build(run.recipe["data"])
        found[data.name] = rows_of(run, data)
        print(table(data.name, found[data.name]))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    tables = "\n".join(table(*item) for item in found.items())
    (given.out / "table.md").write_text(f"# Bridges on held-out digits\n\n{tables}")
    picture(found, given.out / "tradeoff.png")


if __name__ == "__main__":
    main()
