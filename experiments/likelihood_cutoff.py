r"""What a likelihood loses between the data and its cut-off, in bits/dim, on image-like data.

    python experiments/likelihood_cutoff.py [--out FOLDER] [--examples N]

The data are Gaussian with the statistics of 8-bit colour images of 32 x 32 on [-1, 1]: a power
spectrum that falls like 1/f^4 in the frequencies of the cosine transform, strongly correlated
colours, and the variance of uniform dequantisation as the floor. Being Gaussian they have closed
forms: a density smoothed at eps, evaluated on the data as they are, loses

    KL(N(0, c) || N(0, v)) = (log(v / c) + c / v - 1) / 2,    v = alpha^2 c + sigma^2

nats for each eigenvalue c (the plain cut-off; v / alpha^2 for the rescaled one, and the
variational one loses what the rescaled does: see scoresde/cutoff.py). Nothing is solved; the
variational column is also measured, with its own code on exact models. Takes seconds.

Writes table.md and table.json. (No results.json: this is no recipe that `collect.py` could list.)
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scoresde import SDE, VESDE, VPSDE, GaussianModel, SubVPSDE
from scoresde.likelihood.cutoff import Cutoff, VariationalCutoff
from scoresde.metrics import bits_per_dim
from scoresde.metrics.estimate import Estimate
from scoresde.model import Conditioned
from scoresde.streams import Purpose, Streams

STEP = 2 / 256  # one of 256 levels on [-1, 1]


def image_spectrum(size: int = 32, std: float = 0.5, correlation: float = 0.95) -> Tensor:
    """Returns the eigenvalues of the covariance, ``(3 * size * size,)``, float64.

    ``std`` is that of a pixel, and ``correlation`` that of any two of its three colours.
    """
    i = torch.arange(size, dtype=torch.float64)
    power = (1 + i[:, None] ** 2 + i**2) ** -2
    colours = torch.tensor([1 + 2 * correlation, 1 - correlation, 1 - correlation]).double()
    floor = STEP**2 / 12
    return (std**2 * colours[:, None, None] * power / power.mean()).flatten() + floor


def entropy(c: Tensor) -> float:
    """Returns the least bits/dim of any model of the data."""
    return bits_per_dim(float(-0.5 * torch.log(2 * math.pi * math.e * c).sum()), c.shape, STEP)


def plain_loss(c: Tensor, sde: SDE, eps: float) -> float:
    """Returns what the density at eps loses on the data as they are, bits/dim."""
    alpha, sigma = ends(sde, eps)
    return _bits(_excess((alpha**2 * c + sigma**2) / c))


def rescaled_loss(c: Tensor, sde: SDE, eps: float) -> float:
    """Returns what the density of the data with some noise loses, bits/dim."""
    alpha, sigma = ends(sde, eps)
    return _bits(_excess(1 + (sigma / alpha) ** 2 / c))


def measured_loss(
    cutoff: Cutoff, c: Tensor, sde: SDE, eps: float, examples: int = 64, seed: int = 0
) -> Estimate:
    """Returns what an exact model with a cut-off loses on samples of the data, bits/dim."""
    model = GaussianModel(torch.zeros_like(c), c.sqrt(), sde)
    streams = Streams.of(seed, batch=examples)
    x = c.sqrt() * streams.normal(c.shape, Purpose.DATA, dtype=torch.float64)
    truth = -0.5 * (x**2 / c + torch.log(2 * math.pi * c)).sum(1)
    state, correction = cutoff.start(Conditioned(model), x, eps, streams)
    return Estimate.of((truth - model.log_prob(state, eps) - correction) / (len(c) * math.log(2)))


def ends(sde: SDE, eps: float) -> tuple[Tensor, Tensor]:
    t = torch.tensor(eps, dtype=torch.float64)
    return sde.alpha(t), sde.sigma(t)


def _excess(ratio: Tensor) -> Tensor:
    """Returns the nats of N(0, 1) lost by N(0, ratio), for each ratio."""
    return 0.5 * (torch.log(ratio) + 1 / ratio - 1)


def _bits(nats: Tensor) -> float:
    return float(nats.mean()) / math.log(2)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    sde: SDE
    eps: float


CASES = [
    *(Case(f"VP, eps {eps:g}", VPSDE(), eps) for eps in (1e-6, 1e-5, 1e-4, 1e-3)),
    *(Case(f"sub-VP, eps {eps:g}", SubVPSDE(), eps) for eps in (1e-5, 1e-3, 3e-3, 1e-2)),
    *(
        Case(f"VE, sigma_min {std:g}", VESDE(sigma_min=std), 0.0)
        for std in (0.001, 0.002, 0.005, 0.01, 0.02)
    ),
]


def row(case: Case, c: Tensor, examples: int) -> dict[str, str | float]:
    alpha, sigma = ends(case.sde, case.eps)
    measured = measured_loss(VariationalCutoff(), c, case.sde, case.eps, examples)
    return {
        "cut-off": case.name,
        "noise": float(sigma / alpha),
        "plain": plain_loss(c, case.sde, case.eps),
        "rescaled, variational": rescaled_loss(c, case.sde, case.eps),
        "variational, measured": measured.mean,
        "standard error": measured.standard_error,
    }


def table(rows: list[dict[str, str | float]], bits: float) -> str:
    lines = [
        "# What a likelihood loses to its cut-off",
        "",
        f"Gaussian data like 8-bit colour images, whose entropy is {bits:.3f} bits/dim; losses in",
        "bits/dim, in closed form and measured. By `python experiments/likelihood_cutoff.py`.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
    ]
    for one in rows:
        name, noise, *losses = one.values()
        lines.append(
            f"| {name} | {noise:.2e} | " + " | ".join(f"{loss:.5f}" for loss in losses) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--examples", type=int, default=64, help="for the measured column")
    given = parser.parse_args()
    c = image_spectrum()
    rows = [row(case, c, given.examples) for case in CASES]
    text = table(rows, entropy(c))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(text)
    result = {"entropy": entropy(c), "examples": given.examples, "seed": 0, "rows": rows}
    (given.out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    print(text, end="")


if __name__ == "__main__":
    main()
