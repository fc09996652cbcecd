"""Measures what a likelihood costs at equal error: the reference's way, torchdiffeq, and ours.

    python experiments/likelihood_speed.py [--checkpoint RUN ...] [--published FILE:CONFIG ...]
                                           [--batch 64] [--rounds 3] [--out FOLDER]

Every way evaluates the same examples with the same Rademacher probe and the same float32 network.
The truth is the same integral in float64 at a tolerance of 1e-9, so that an error is the solver's
alone. Each way is run at several tolerances, in turns; what it costs at a given error is read off
between them (linear in the logarithms), since the same tolerance means something else to each.

The reference's way is written here as it is published: scipy's RK45 on one flat NumPy vector of
the whole batch, and two network passes an evaluation, one for the field and one for the
divergence.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from scoresde import VESDE, VPSDE, GaussianMixtureModel, Likelihood, SubVPSDE
from scoresde.codec import Affine
from scoresde.data import Dataset
from scoresde.divergence import Hutchinson
from scoresde.likelihood import NoiseClock, TimeClock
from scoresde.model import Conditioned, ScoreFunction
from scoresde.shapes import sum_features
from scoresde.solvers import BogackiShampine, DormandPrince, TorchDiffEq, Tsitouras
from scoresde.streams import Streams

TOLERANCES = (1e-2, 3e-3, 1e-3, 1e-4, 1e-5)
TARGETS = (3e-3, 1e-3, 3e-4)  # bits/dim, root mean square over the examples


@dataclass
class Case:
    """A model and the examples to evaluate, in its units."""

    name: str
    model: ScoreFunction
    x: Tensor


# --- The ways ------------------------------------------------------------------------------------


def reference(case: Case, model: ScoreFunction, tolerance: float) -> tuple[Tensor, float]:
    """Evaluates as score_sde_pytorch does; returns log-densities and passes per example."""
    x, n, d = case.x, len(case.x), case.x[0].numel()
    eps = model.sde.cutoffs.likelihood
    probe = Hutchinson(1).probes(Streams.of(0, batch=n), x)[0]
    passes = Conditioned(model)

    def at(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x).reshape(x.shape)

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        y, time_ = at(state[: n * d]), torch.full((n,), t, dtype=x.dtype)
        with torch.no_grad():
            drift = passes.velocity(y, time_)
        with torch.enable_grad():
            y.requires_grad_()
            (gradient,) = torch.autograd.grad((passes.velocity(y, time_) * probe).sum(), y)
        divergence = sum_features(gradient * probe)
        return np.concatenate([drift.numpy().reshape(-1), divergence.numpy()]).astype(np.float64)

    start = np.concatenate([x.numpy().reshape(-1), np.zeros(n)]).astype(np.float64)
    end = integrate.solve_ivp(
        slope, (eps, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45"
    ).y[:, -1]
    prior = model.sde.prior_log_prob(at(end[: n * d]))
    return prior + torch.from_numpy(end[n * d :]), float(passes.count)


def likelihood(method, clock=None):
    """Returns our evaluation with a method and a clock."""
    clock = clock or NoiseClock()

    def evaluate(case: Case, model: ScoreFunction, tolerance: float) -> tuple[Tensor, float]:
        result = Likelihood(1, tolerance, tolerance, method=method, clock=clock)(
            model, case.x, seed=0
        )
        return result.log_prob, float(result.nfe.double().mean())

    return evaluate


WAYS = {
    "reference (scipy RK45)": (reference, False),
    "torchdiffeq dopri5": (likelihood(TorchDiffEq("dopri5"), TimeClock()), False),
    "ours dopri5, in t": (likelihood(DormandPrince(), TimeClock()), False),
    "ours dopri5": (likelihood(DormandPrince()), False),
    "ours tsit5": (likelihood(Tsitouras()), False),
    "ours bosh3": (likelihood(BogackiShampine()), False),
    "ours dopri5, compiled": (likelihood(DormandPrince(pack=False)), True),
    "ours tsit5, compiled": (likelihood(Tsitouras(pack=False)), True),
}


# --- The cases -----------------------------------------------------------------------------------


def mixture(sde) -> Case:
    """An exact mixture in 64 dimensions."""
    generator = torch.Generator().manual_seed(5)
    means = 0.8 * torch.randn(8, 64, generator=generator)
    model = GaussianMixtureModel([1 / 8] * 8, means, [0.3] * 8, sde)
    return Case(f"mixture, {type(sde).__name__}", model, model.sample(64, seed=0))


def trained(folder: str, batch: int) -> Case:
    """A run's model with the first of its test examples."""
    from scoresde.train import Checkpoint

    checkpoint = Checkpoint.load(folder)
    model = checkpoint.build_model()
    data, units = checkpoint.build("data", Dataset), checkpoint.build("units", Affine)
    raw = data.test[:batch]
    noise = torch.rand(raw.shape, generator=torch.Generator().manual_seed(0))
    return Case(checkpoint.recipe["name"], model.eval(), units.encode_at(raw, noise))


def published(text: str, batch: int) -> Case:
    """A checkpoint of the reference, given as FILE.pth:CONFIG.json, on random smooth images."""
    from scoresde.interop.score_sde import load_checkpoint

    file, config = text.split(":")
    values = json.loads(Path(config).read_text())
    values = values.get("config", values)
    model = load_checkpoint(file, values)
    size, channels = values["data"]["image_size"], values["data"]["num_channels"]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, channels, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return Case(Path(file).stem, model.eval(), 2 * x - 1 if values["data"]["centered"] else x)


# --- Measuring -----------------------------------------------------------------------------------


def truth(case: Case) -> Tensor:
    """The same integral with the same probe, in float64 at a tight tolerance."""
    model = copy.deepcopy(case.model).double()
    x = case.x.double()
    return Likelihood(1, 1e-9, 1e-9)(model, x, seed=0).log_prob


def compiled(model: ScoreFunction) -> ScoreFunction:
    """A copy whose noise prediction is compiled, its coefficients included."""
    model = copy.deepcopy(model)
    model.noise = torch.compile(model.noise)
    return model


def measure(case: Case, rounds: int) -> list[dict]:
    """Returns a row for each way and tolerance."""
    exact, d = truth(case), case.x[0].numel()
    models = {False: case.model, True: compiled(case.model)}
    for way, is_compiled in WAYS.values():
        if is_compiled:
            way(case, models[True], TOLERANCES[0])  # compiles
    rows = []
    for tolerance in TOLERANCES:
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name, (way, is_compiled) in WAYS.items():
                clock = time.perf_counter()
                value, passes = way(case, models[is_compiled], tolerance)
                times[name].append(time.perf_counter() - clock)
                if len(times[name]) == rounds:
                    error = (value.double() - exact) / (d * math.log(2))
                    rows.append(
                        {
                            "case": case.name,
                            "way": name,
                            "tolerance": tolerance,
                            "error": float(error.square().mean().sqrt()),
                            "passes": passes,
                            "seconds": statistics.median(times[name]),
                        }
                    )
    return rows


def at_error(rows: list[dict], target: float, key: str) -> float:
    """Reads a cost off at an error, linearly in the logarithms.

    Where all runs err less, the cheapest counts; where all err more, it is NaN.
    """
    points = sorted((math.log(r["error"]), math.log(r[key])) for r in rows)
    errors, costs = zip(*points, strict=True)
    goal = math.log(target)
    if goal < errors[0]:
        return math.nan
    if goal > errors[-1]:
        return math.exp(min(costs))
    return math.exp(float(np.interp(goal, errors, costs)))


def summarise(rows: list[dict]) -> list[dict]:
    """Returns, for each case and target, passes and seconds beside the reference's."""
    summary = []
    for case in dict.fromkeys(r["case"] for r in rows):
        for target in TARGETS:
            mine = [r for r in rows if r["case"] == case]
            first = [r for r in mine if r["way"] == next(iter(WAYS))]
            base = {key: at_error(first, target, key) for key in ("passes", "seconds")}
            for way in WAYS:
                chosen = [r for r in mine if r["way"] == way]
                cost = {key: at_error(chosen, target, key) for key in base}
                summary.append(
                    {
                        "case": case,
                        "error": target,
                        "way": way,
                        "passes": cost["passes"],
                        "seconds": cost["seconds"],
                        "of_reference": cost["seconds"] / base["seconds"],
                    }
                )
    return summary


def page(result: dict, command: str) -> str:
    """Returns the figures as Markdown, a table for each case."""
    lines = [
        "# What a likelihood costs at equal error",
        "",
        f"- command: `{command}`",
        f"- hardware: {result['hardware']}; {result['batch']} examples at most, median of "
        f"{result['rounds']} alternating rounds; commit {result['commit']}",
        "",
        "Errors are root mean squares over the examples, in bits/dim, against the same integral",
        "in float64. Cells: network passes per example, and the wall-clock as a share of the",
        "reference's (scipy's RK45 through NumPy, two passes an evaluation).",
    ]
    summary = result["at_error"]
    for case in dict.fromkeys(s["case"] for s in summary):
        mine = [s for s in summary if s["case"] == case]
        targets = list(dict.fromkeys(s["error"] for s in mine))
        lines += ["", f"## {case}", ""]
        lines += ["| way | " + " | ".join(f"error {t:.0e}" for t in targets) + " |"]
        lines += ["|---" * (len(targets) + 1) + "|"]
        for way in dict.fromkeys(s["way"] for s in mine):
            cells = [s for s in mine if s["way"] == way]
            texts = [
                "–" if math.isnan(s["seconds"]) else f"{s['passes']:.0f}, {s['of_reference']:.2f}"
                for s in cells
            ]
            lines.append(f"| {way} | " + " | ".join(texts) + " |")
    lines += ["", *_short_of(summary)]
    if result["peak_memory_mib"]:
        lines += ["", "## Peak memory of an evaluation, MiB", "", "| way | |", "|---|---|"]
        lines += [f"| {way} | {mib:.0f} |" for way, mib in result["peak_memory_mib"].items()]
    return "\n".join(lines) + "\n"


def _short_of(summary: list[dict]) -> list[str]:
    """Says where ours is not as fast as it should be: 0.75 as it is, 0.5 compiled."""
    lines = ["## Where it falls short", ""]
    for way, bar in (("ours dopri5", 0.75), ("ours dopri5, compiled", 0.5)):
        slow = [s for s in summary if s["way"] == way and not s["of_reference"] <= bar]
        cells = [f"{s['case']} at {s['error']:.0e} ({s['of_reference']:.2f})" for s in slow]
        lines.append(
            f"- {way}, above {bar} of the reference's time: {', '.join(cells) or 'none'}."
        )
    lines += [
        "",
        "On the mixtures a pass is a few small matrix products, so that the bookkeeping of",
        "separate steps costs as much as the passes that it saves. The networks without training",
        "(vp_ddpmpp, ve_ncsnpp) have rough fields, on which a low order (bosh3) does best.",
    ]
    return lines


def memory(argv: list[str], way: str) -> float:
    """The peak memory of one way in a process of its own, in MiB above the model's."""
    command = [sys.executable, __file__, *argv, "--only", way]
    # Large blocks go back to the system when they are freed, so that the peak is of what is used.
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=exact).stdout
    return float(out.split()[-1])


def only(case: Case, way: str) -> None:
    """Runs one way, and prints how far its peak memory lay above that between two runs."""
    WAYS[way][0](case, case.model, 1e-1)  # what is set up once is no way's own
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory("VmRSS")
    WAYS[way][0](case, case.model, 1e-3)
    print(_memory("VmHWM") - before)


def _memory(name: str) -> float:
    """Reads one of Linux's figures of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", action="append", default=[])
    parser.add_argument("--published", action="append", default=[], metavar="FILE:CONFIG")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [trained(c, args.batch) for c in args.checkpoint]
    cases += [published(c, args.batch) for c in args.published]
    if args.only:
        return only(cases[0], args.only)
    if not cases or args.out:
        cases += [mixture(sde) for sde in (VPSDE(), SubVPSDE(), VESDE())]
    rows = [row for case in cases for row in measure(case, args.rounds)]
    summary = summarise(rows)
    for s in summary:
        print(
            f"{s['case']:28} {s['error']:7.0e} {s['way']:26} {s['passes']:8.1f} passes "
            f"{s['seconds']:8.3f} s  {s['of_reference']:5.2f} of the reference's"
        )
    peaks = {}
    if args.checkpoint:
        argv = ["--checkpoint", args.checkpoint[0], "--batch", str(args.batch)]
        peaks = {way: memory(argv, way) for way, (_, c) in WAYS.items() if not c}
        print("peak memory of one evaluation, MiB:", peaks)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {
            "hardware": f"CPU, 1 thread, torch {torch.__version__}",
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip(),
            "batch": args.batch,
            "rounds": args.rounds,
            "at_error": summary,
            "peak_memory_mib": peaks,
            "runs": rows,
        }
        (args.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
        command = (
            "python experiments/likelihood_speed.py --checkpoint RUN [--published FILE:CONFIG]"
        )
        (args.out / "README.md").write_text(page(result, command))


if __name__ == "__main__":
    main()
