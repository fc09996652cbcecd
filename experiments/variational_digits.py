"""Compares a variational diffusion model of the digits with the default recipe, by bits/dim.

    python experiments/variational_digits.py VDM VP [--draws 96] [--out FOLDER]

VDM is a run of ``+experiment=digits_vdm`` and VP one of ``+experiment=digits_vp``: the same
network, except for its Fourier features, with the same number of updates and examples. Every
figure is of all 180 test examples, in bits/dim of their 17 levels:

- of VDM, the bound of a chain of 1000 steps (``DiscreteBound``, by a random subset of the steps)
  with the decoder of its loss, its limit of many steps (``VariationalBound``), and its exact
  likelihood under truncated-normal dequantisation at its own end point;
- of VP, the exact likelihood under uniform dequantisation, what ``digits_vp`` reports.

Differences are paired: their standard error is that of the mean over the examples. Noise of the
estimates is part of the scatter over the examples, and so of every error.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from scoresde import Likelihood, VariationalBound
from scoresde.codec import Levels
from scoresde.data import TruncatedNormalDequantisation, digits
from scoresde.likelihood import DiscreteBound, LogProb, PosteriorVariance, RescaledCutoff
from scoresde.model import ScoreFunction
from scoresde.sde import LearnedSchedule
from scoresde.tasks.evaluation import Draws, Evaluation, evaluate_likelihood
from scoresde.train import Checkpoint

STEPS = 1000


def evaluate(model: ScoreFunction, tool: LogProb, draws: Draws | None = None) -> Evaluation:
    """Evaluates all test digits."""
    return evaluate_likelihood(model, tool, digits(), draws=draws, batch_size=180, progress=False)


def measure(vdm: ScoreFunction, vp: ScoreFunction, draws: int) -> dict[str, Evaluation]:
    """Returns the evaluations by their names."""
    assert isinstance(vdm.sde, LearnedSchedule)
    data = digits()
    low, high = data.codec.range
    decoder = Levels(data.levels, low, high)
    chain = DiscreteBound(decoder, STEPS, PosteriorVariance(), draws)
    with torch.no_grad():
        cloud = TruncatedNormalDequantisation.of(vdm.sde, data.codec.scale, 0.0)
    exact = Likelihood(probes=4, cutoff=RescaledCutoff(), eps=0.0)
    return {
        "vdm, bound of 1000 steps": evaluate(vdm, chain),
        "vdm, bound in continuous time": evaluate(vdm, VariationalBound(32, decoder=decoder)),
        "vdm, exact, truncated normal": evaluate(vdm, exact, Draws(4, cloud)),
        "vp, exact, uniform": evaluate(vp, Likelihood(probes=4)),
    }


def report(found: dict[str, Evaluation], log_snr: list[float]) -> dict[str, object]:
    """Returns the figures: each mean, and each paired difference from the default recipe."""
    base = found["vp, exact, uniform"].values
    rows = {}
    for name, one in found.items():
        difference = one.values - base
        rows[name] = {
            "bits_per_dim": one.mean,
            "standard_error": one.standard_error,
            "difference": float(difference.mean()),
            "difference_standard_error": float(difference.std() / math.sqrt(len(difference))),
            "nfe": float(one.nfe.double().mean()),
            "seconds": one.seconds,
        }
    return {"rows": rows, "ends of the log-SNR": log_snr}


def main() -> None:
    """Measures, prints, and writes ``table.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2)
    parser.add_argument("--draws", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    vdm, vp = (Checkpoint.load(run).build_model() for run in asked.runs)
    ends = vdm.sde.log_snr(torch.tensor([0.0, 1.0])).tolist()
    results = report(measure(vdm, vp, asked.draws), ends)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "table.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, row in results["rows"].items():
        print(name, {key: round(value, 4) for key, value in row.items()})


if __name__ == "__main__":
    main()
