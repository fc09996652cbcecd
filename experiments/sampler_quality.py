"""Measures what a network pass buys: every sampler on exact models, on a network, beside peers.

    python experiments/sampler_quality.py [--checkpoint RUN] [--out FOLDER] [--quick]

(a) A hard mixture whose score is known: 64 dimensions, eight narrow modes far apart with weights
    from 1/2 to 1/256, for the three SDEs.
(b) A trained network, against its own probability flow at a tolerance of 1e-6.
(c) The same methods as diffusers, k-diffusion and azula ship them, on the mixture and on the very
    same noise levels, for as far as they are installed (``pip install "scoresde[bench]"``).

Deterministic methods are judged by the distance of their samples from the exact ends of the flow
from the same latents (the root mean square over the dimensions, the median over the samples); all
methods by the sliced Wasserstein distance from exact samples (its floor is that of as many other
exact samples), and on the mixture by the divergence of the modes' shares from their weights. All
in one run.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from scoresde import VESDE, VPSDE, DiscreteVP, GaussianMixtureModel, SubVPSDE
from scoresde.metrics import sliced_wasserstein
from scoresde.model import ScoreFunction
from scoresde.sample import (
    DDIM,
    DEIS,
    IPNDM,
    SEEDS,
    AncestralPredictor,
    AnnealedLangevin,
    AnnealedLangevinDynamics,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSDE,
    Euler,
    EulerMaruyama,
    GottaGoFast,
    HalfLogSNR,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    RelativeNoise,
    Restart,
    RestartInterval,
    Sampler,
    UniPC,
)
from scoresde.streams import Purpose, Streams
from scoresde.times import ExplicitGrid, Grid, KarrasGrid, LogSNRGrid, UniformGrid

BUDGETS = (5, 6, 8, 10, 15, 20, 35, 50, 100, 1000)
COLOURS = ("#2a6f97", "#c8553d", "#3a7d44", "#8e6c8a", "#e0a030", "#4a4e69", "#00a6a6", "#b5179e")

Make = Callable[[int, Grid], Sampler]


# --- Samplers by the passes that they take -------------------------------------------------------


def by_steps(make: Callable[..., Sampler], passes: int = 1, rest: int = 0) -> Make:
    """A sampler that takes some passes a step, and some more in all."""

    def of(budget: int, grid: Grid) -> Sampler | None:
        steps = (budget - rest) // passes
        return None if steps < 1 else make(steps, grid)

    return of


def restarted(budget: int, grid: Grid) -> Sampler | None:
    """Half of the passes for loops."""
    steps, loop = budget // 4, max(1, budget // 8)
    if budget < 20:
        return None
    return Restart(Heun(steps, grid), (RestartInterval(0.05, 2.0, loop, 2),))


ODE: dict[str, Make] = {
    "Euler": by_steps(Euler),
    "DDIM": by_steps(DDIM),
    "Heun": by_steps(Heun, 2),
    "DPM-Solver-2": by_steps(functools.partial(DPMSolver, order=2), 2),
    "DPM-Solver-3": by_steps(functools.partial(DPMSolver, order=3), 3),
    "DPM-Solver++ 2M": by_steps(functools.partial(DPMSolverPP, order=2)),
    "DPM-Solver++ 3M": by_steps(functools.partial(DPMSolverPP, order=3)),
    "DPM-Solver++ 3M, as coded": by_steps(functools.partial(DPMSolverPP, order=3, as_coded=True)),
    "UniPC-2": by_steps(functools.partial(UniPC, order=2)),
    "UniPC-3": by_steps(functools.partial(UniPC, order=3)),
    "DEIS-3": by_steps(functools.partial(DEIS, order=3)),
    "iPNDM-4": by_steps(functools.partial(IPNDM, order=4)),
}
SDE: dict[str, Make] = {
    "Euler-Maruyama": by_steps(EulerMaruyama),
    "ancestral": by_steps(functools.partial(DDIM, eta=1.0)),
    "predictor-corrector": by_steps(
        functools.partial(
            PredictorCorrector, predictor=AncestralPredictor(), corrector=Langevin(snr=0.16)
        ),
        2,
    ),
    "Heun, churned": by_steps(lambda n, grid: Heun(n, grid, churn=0.3 * n), 2),
    "DPM-Solver++ 2M-SDE": by_steps(functools.partial(DPMSolverPPSDE, order=2)),
    "DPM-Solver++ 3M-SDE": by_steps(functools.partial(DPMSolverPPSDE, order=3)),
    "SEEDS": by_steps(SEEDS, 2),
    "Restart": restarted,
    "annealed Langevin": by_steps(
        lambda n, grid: AnnealedLangevinDynamics(n, grid, langevin=AnnealedLangevin(0.3, 5)), 5, 5
    ),
}
ADAPTIVE: dict[str, Callable[[float], Sampler]] = {
    "probability flow": lambda tolerance: ProbabilityFlow(tolerance, tolerance),
    "Gotta Go Fast": lambda tolerance: GottaGoFast(tolerance, tolerance / 6),
}
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
# The grids are all tried, and the best is kept: they matter more than the methods.
GRIDS: dict[str, Grid] = {
    "uniform": UniformGrid(),
    "log-SNR": LogSNRGrid(),
    "Karras": KarrasGrid(),
}


@dataclass
class Problem:
    """A model, latents, and the truth about both.

    Arguments:
        name: What it is called.
        model: The model.
        latent: Latents ``(N, *)``.
        ends: Where the flow takes them.
        exact: Exact samples, as many.
        floor: The sliced Wasserstein distance of as many others.
        means: The means of the modes, if there are any.
        weights: Their weights.
    """

    name: str
    model: ScoreFunction
    latent: Tensor
    ends: Tensor
    exact: Tensor
    floor: float
    means: Tensor | None = None
    weights: Tensor | None = None


def hard_mixture(sde, count: int) -> Problem:
    """Eight narrow modes in 64 dimensions, the least of weight 1/256."""
    numbers = torch.Generator().manual_seed(0)
    means = torch.randint(0, 2, (8, 64), generator=numbers).double() * 2 - 1
    weights = torch.tensor([2.0 ** -min(k, 7) for k in range(1, 9)])
    model = GaussianMixtureModel(weights.tolist(), means, [0.1] * 8, sde).double()
    # From the exact marginal at t = 1: what is measured is the method, not the prior.
    latent = model.sample(count, 1.0, seed=1)
    eps = sde.cutoffs.sampling
    ends = ProbabilityFlow(1e-9, 1e-9)(model, latent=latent).x
    exact, other = (model.sample(count, eps, seed=seed) for seed in (2, 3))
    floor = sliced_wasserstein(exact, other, seed=0)
    at_eps = float(sde.alpha(torch.tensor(eps, dtype=torch.float64))) * means
    name = f"mixture, {type(sde).__name__.removesuffix('SDE')}"
    return Problem(name, model, latent, ends, exact, floor, at_eps, weights)


def trained(folder: str, count: int) -> Problem:
    """A network, whose own flow at a tight tolerance is the truth."""
    from scoresde.train import Checkpoint

    checkpoint = Checkpoint.load(folder)
    model, shape = checkpoint.build_model(), checkpoint.recipe["units"]["shape"]
    flow = ProbabilityFlow(1e-6, 1e-6)
    latent, other = (flow.latent(model, (count, *shape), seed=seed) for seed in (1, 2))
    ends = flow(model, latent=latent).x
    exact = flow(model, latent=other).x
    floor = sliced_wasserstein(ends, exact, seed=0)
    return Problem(str(checkpoint.recipe.get("name")), model, latent, ends, exact, floor)


def judge(problem: Problem, x: Tensor, nfe: float, flow: bool) -> dict[str, float]:
    """The distances of samples from the truth."""
    row = {"nfe": nfe, "sliced": sliced_wasserstein(x, problem.exact, seed=0)}
    if flow:
        # The median: a sample that ends in another mode would outweigh all others in a mean.
        row["distance"] = float((x - problem.ends).flatten(1).square().mean(1).sqrt().median())
    if problem.means is not None and problem.weights is not None:
        nearest = torch.cdist(x.flatten(1), problem.means).argmin(1)
        share = torch.bincount(nearest, minlength=len(problem.weights)) / len(x)
        terms = torch.where(share > 0, share * (share / problem.weights).log(), 0.0)
        row["modes"] = float(terms.sum())
    return row


def measure(problem: Problem, budgets) -> list[dict]:
    """Every sampler on every grid, at every budget."""
    rows = []
    for family, flow in ((ODE, True), (SDE, False)):
        for name, make in family.items():
            for grid_name, grid in GRIDS.items():
                for budget in budgets:
                    if budget == 1000 and grid_name != "log-SNR" and name != "Euler-Maruyama":
                        continue
                    row = attempt(problem, make, budget, grid, flow)
                    if row is not None:
                        rows.append({"sampler": name, "grid": grid_name, "budget": budget, **row})
            print(problem.name, name, flush=True)
    for name, make in ADAPTIVE.items():
        for tolerance in TOLERANCES:
            if name == "Gotta Go Fast" and tolerance < 0.02:
                continue
            out = make(tolerance)(problem.model, latent=problem.latent, seed=5)
            row = judge(problem, out.x, float(out.nfe.double().mean()), name == "probability flow")
            rows.append({"sampler": name, "grid": "its own", "budget": tolerance, **row})
        print(problem.name, name, flush=True)
    return rows


def attempt(problem: Problem, make: Make, budget: int, grid: Grid, flow: bool) -> dict | None:
    sampler = make(budget, grid)
    if sampler is None:
        return None
    try:
        out = sampler(problem.model, latent=problem.latent, seed=5)
    except ValueError:  # a loop that no time of so short a grid is in
        return None
    return judge(problem, out.x, float(out.nfe.double().mean()), flow)


class Replayed:
    """The normal numbers that our samplers draw, for a peer to draw the same."""

    def __init__(self, latent: Tensor) -> None:
        self.streams, self.shape = Streams.of(5, batch=len(latent)), latent.shape[1:]
        self.draws = 0

    def __call__(self, *_: object, **__: object) -> Tensor:
        self.draws += 1
        return self.streams.normal(self.shape, Purpose.DIFFUSION, self.draws - 1, torch.float64)


# --- Peers ---------------------------------------------------------------------------------------


def peers(count: int) -> list[dict]:
    """Each method of a peer beside ours, on one model and the same noise levels."""
    rows = []
    for peer in (diffusers, k_diffusion, azula):  # the last two may put torchvision aside
        try:
            pairs = peer(count)
        except ImportError as error:
            print(f"{peer.__name__} is left out: {error}")
            continue
        rows += pairs
        print(peer.__name__, flush=True)
    return rows


def paired(peer: str, problem: Problem, name: str, steps: int, theirs, ours: Sampler) -> dict:
    """One method of both, deterministic ones by their distance from the exact ends."""
    mine = ours(problem.model, latent=problem.latent, seed=5)
    flow = ours.__class__ not in (DPMSolverPPSDE, SEEDS) and getattr(ours, "eta", 0) == 0
    key = "distance" if flow else "sliced"
    a, b = (judge(problem, x, steps, flow)[key] for x in (theirs, mine.x))
    return {"peer": peer, "method": name, "steps": steps, "measure": key, "theirs": a, "ours": b}


def k_diffusion(count: int) -> list[dict]:
    """In the coordinates of VE, on its own grid of Karras et al."""
    without_torchvision()
    from k_diffusion import sampling

    sde = VESDE(0.01, 50.0)
    problem = hard_mixture(sde, count)
    grid, rows = KarrasGrid(), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return problem.model.denoise(x, sde.time(-2 * sigma.log()))

    methods = {
        "Euler (DDIM)": (sampling.sample_euler, {}, DDIM, {}),
        "Heun": (sampling.sample_heun, {}, Heun, {}),
        "LMS-3": (
            sampling.sample_lms,
            {"order": 3},
            DEIS,
            {"order": 3, "variable": RelativeNoise()},
        ),
        "DPM-Solver++ 2M": (
            sampling.sample_dpmpp_2m,
            {},
            DPMSolverPP,
            {"order": 2, "lower_order_below": 0},
        ),
        "Euler ancestral": (
            sampling.sample_euler_ancestral,
            {},
            DDIM,
            {"eta": 1.0},
        ),
        "DPM-Solver++ 2M-SDE": (
            sampling.sample_dpmpp_2m_sde,
            {},
            DPMSolverPPSDE,
            {"order": 2},
        ),
        "DPM-Solver++ 3M-SDE": (
            sampling.sample_dpmpp_3m_sde,
            {},
            DPMSolverPPSDE,
            {"order": 3, "as_coded": True},
        ),
        "DPM-Solver++ SDE": (sampling.sample_dpmpp_sde, {}, SEEDS, {}),
    }
    for name, (theirs, options, kind, settings) in methods.items():
        for steps in BUDGETS[:-1]:
            ours = kind(steps, grid, **settings)
            sigmas = sde.sigma(ours.times(sde, sde.cutoffs.sampling))
            if "ancestral" in name or "SDE" in name:
                options = {**options, "noise_sampler": Replayed(problem.latent)}
            x = theirs(denoise, problem.latent.clone(), sigmas, disable=True, **options)
            rows.append(paired("k-diffusion", problem, name, steps, x, ours))
    return rows


def azula(count: int) -> list[dict]:
    """In the coordinates of VE, whose times it spaces equally in the log-SNR as well."""
    without_torchvision()
    sys.modules.setdefault("gdown", types.ModuleType("gdown"))
    from azula import denoise, noise, sample

    sde = VESDE(0.01, 50.0)
    problem, eps = hard_mixture(sde, count), sde.cutoffs.sampling

    class Exact(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = noise.VESchedule(sigma_min=0.01, sigma_max=50.0)

        def forward(self, x_t: Tensor, t: Tensor, **_) -> denoise.Posterior:
            return denoise.DiracPosterior(problem.model.denoise(x_t, t.double()))

    methods = {
        "Euler (DDIM)": (sample.EulerSampler, {}, DDIM, {}),
        "Heun": (sample.HeunSampler, {}, Heun, {}),
        "xEAB-2 (DPM-Solver++ 2M)": (
            sample.xEABSampler,
            {"order": 2},
            DPMSolverPP,
            {"order": 2, "lower_order_below": 0},
        ),
        "xEAB-3 (DPM-Solver++ 3M)": (
            sample.xEABSampler,
            {"order": 3},
            DPMSolverPP,
            {"order": 3, "lower_order_below": 0},
        ),
        "zAB-3": (
            sample.zABSampler,
            {"order": 3},
            DEIS,
            {"order": 3, "variable": RelativeNoise()},
        ),
        "DDPM": (sample.DDPMSampler, {}, DDIM, {"eta": 1.0}),
    }
    rows = []
    for name, (kind, options, our_kind, settings) in methods.items():
        for steps in BUDGETS[:-1]:
            where = {"start": 1.0, "stop": eps, "steps": steps, "dtype": torch.float64}
            with mock.patch.object(torch, "randn_like", Replayed(problem.latent)):
                x = kind(Exact(), silent=True, **where, **options)(problem.latent)
            ours = our_kind(steps, UniformGrid(), **settings)
            rows.append(paired("azula", problem, name, steps, x, ours))
    return rows


def diffusers(count: int) -> list[dict]:
    """On the chain of DDPM, at the levels that its schedulers choose."""
    import diffusers as theirs

    sde = DiscreteVP()
    problem = hard_mixture(sde, count)
    multi = functools.partial(
        theirs.DPMSolverMultistepScheduler,
        algorithm_type="dpmsolver++",
        lower_order_final=True,
        final_sigmas_type="sigma_min",
    )
    sde_multi = functools.partial(multi, algorithm_type="sde-dpmsolver++", lower_order_final=False)
    unipc = functools.partial(theirs.UniPCMultistepScheduler, final_sigmas_type="sigma_min")
    deis = theirs.DEISMultistepScheduler
    always, few = {"lower_order_below": 10**6}, {"lower_order_below": 15}
    coded, by_log = {"as_coded": True}, {"variable": HalfLogSNR(), **few}
    # Theirs, and its order; ours, and its settings other than that.
    table = {
        "DDIM": (multi, 1, DPMSolverPP, {}),
        "DPM-Solver++ 2M": (multi, 2, DPMSolverPP, few),
        "DPM-Solver++ 3M": (multi, 3, DPMSolverPP, {**few, **coded}),
        "DPM-Solver++ 2M-SDE": (sde_multi, 2, DPMSolverPPSDE, {}),
        "UniPC-2": (unipc, 2, UniPC, always),
        "UniPC-3": (unipc, 3, UniPC, always),
        "DEIS-2": (deis, 2, DEIS, by_log),
        "DEIS-3": (deis, 3, DEIS, by_log),
    }
    methods = {
        name: (kind, {"solver_order": order}, ours, {"order": order, **settings})
        for name, (kind, order, ours, settings) in table.items()
    }
    rows = []
    for name, (kind, options, our_kind, settings) in methods.items():
        for steps in BUDGETS[:-1]:
            scheduler = kind(
                num_train_timesteps=1000,
                beta_start=1e-4,
                beta_end=0.02,
                beta_schedule="linear",
                timestep_spacing="linspace",
                **options,
            )
            scheduler.set_timesteps(steps)
            x, draws = problem.latent.clone(), Replayed(problem.latent)
            for t in scheduler.timesteps:
                noise = problem.model.noise(x, (t.double() + 1) / 1000)
                more = {"variance_noise": draws()} if kind is sde_multi else {}
                x = scheduler.step(noise, t, x, **more).prev_sample.double()
            levels = [(float(t) + 1) / 1000 for t in scheduler.timesteps]
            grid = ExplicitGrid((*levels, 1 / 1000))
            rows.append(
                paired("diffusers", problem, name, steps, x, our_kind(steps, grid, **settings))
            )
    return rows


def without_torchvision() -> None:
    """Lets peers in that import torchvision, of which nothing is used here."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # it is broken beside some builds of torch
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = types.ModuleType(name)
        transforms = sys.modules["torchvision.transforms"]
        transforms.functional = sys.modules["torchvision.transforms.functional"]
        sys.modules["torchvision"].transforms = transforms
    if "k_diffusion" not in sys.modules:
        # Its __init__ imports all of its training; the samplers alone are asked for.
        from importlib.util import find_spec

        spec = find_spec("k_diffusion")
        if spec is not None and spec.submodule_search_locations:
            package = types.ModuleType("k_diffusion")
            package.__path__ = list(spec.submodule_search_locations)
            sys.modules["k_diffusion"] = package


# --- Figures and the page ------------------------------------------------------------------------


def best(rows: list[dict], key: str) -> dict[str, list[tuple[float, float, str]]]:
    """For each sampler the best value of any grid at each budget: NFE, value, grid."""
    found: dict[str, dict[float, tuple[float, float, str]]] = {}
    for row in rows:
        if key not in row or not math.isfinite(row[key]):
            continue
        there = found.setdefault(row["sampler"], {})
        now = (row["nfe"], row[key], row["grid"])
        if row["budget"] not in there or row[key] < there[row["budget"]][1]:
            there[row["budget"]] = now
    return {name: sorted(points.values()) for name, points in found.items()}


def draw(tables: dict[str, list[dict]], floors: dict[str, float], key: str, path: Path) -> None:
    label = {
        "distance": "median distance from the exact end (RMS)",
        "sliced": "sliced Wasserstein distance",
    }[key]
    figure = Figure(figsize=(12, 5 * math.ceil(len(tables) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(tables) / 2), 2, squeeze=False).flatten()
    for axes, (name, rows) in zip(panels, tables.items(), strict=False):
        for i, (sampler, points) in enumerate(best(rows, key).items()):
            nfe, values = [p[0] for p in points], [max(p[1], 1e-10) for p in points]
            style = {"color": COLOURS[i % 8], "ls": ("-", "--", ":")[i // 8]}
            axes.loglog(nfe, values, marker="os^"[i // 8], ms=3.5, lw=1.2, label=sampler, **style)
        if key == "sliced":
            axes.axhline(floors[name], color="#999999", lw=1, ls="--", label="exact samples")
        axes.set(title=name, xlabel="network passes a sample")
        axes.set_ylim(top=2.0)  # what lies above is no picture of anything
        axes.grid(alpha=0.25, which="both")
        axes.set_ylabel(label)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def page(result: dict, command: str) -> str:
    lines = [
        "# Quality by cost",
        "",
        f"    {command}",
        "",
        f"- hardware: {result['hardware']}; {result['count']} samples of each; "
        f"commit {result['commit']}",
        "- the best of the grids uniform in t, uniform in the log-SNR, and Karras's (rho = 7)",
        "",
        "![distance from the exact ends](distance.png)",
        "",
        "![sliced Wasserstein distance](sliced.png)",
        "",
        "## The best at each budget",
        "",
        "| model | measure | " + " | ".join(f"{b} passes" for b in (5, 8, 10, 20, 50, 100)) + " |",
        "|---|---|" + "---|" * 6,
    ]
    for name, rows in result["tables"].items():
        for key in ("distance", "sliced", "modes"):
            if any(key in row for row in rows):
                cells = [winner(rows, key, b) for b in (5, 8, 10, 20, 50, 100)]
                lines.append(f"| {name} | {key} | {' | '.join(cells)} |")
    floors = ", ".join(f"{name} {floor:.4f}" for name, floor in result["floors"].items())
    lines += ["", f"Floors of the sliced distance: {floors}.", ""]
    return "\n".join(lines + compared(result["peers"])) + "\n"


def winner(rows: list[dict], key: str, budget: int) -> str:
    at = [r for r in rows if r["budget"] == budget and key in r and math.isfinite(r[key])]
    if not at:
        return "–"
    row = min(at, key=lambda r: r[key])
    return f"{row['sampler']} ({row['grid']}): {row[key]:.3g}"


def compared(rows: list[dict]) -> list[str]:
    """A line for each method of a peer: our error over theirs."""
    steps = [b for b in BUDGETS if b < 1000]
    lines = [
        "## Beside peers",
        "",
        "Our error over theirs, on the same noise levels; below 1 ours is nearer to the truth. "
        "Deterministic methods by their distance from the exact ends, stochastic ones by the "
        "sliced Wasserstein distance, with the same random numbers in both (but DPM-Solver++ SDE "
        "takes two a step, and our SEEDS is another method).",
        "",
        "| peer | method | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for peer, method in dict.fromkeys((r["peer"], r["method"]) for r in rows):
        own = {r["steps"]: r for r in rows if (r["peer"], r["method"]) == (peer, method)}
        cells = [f"{own[n]['ours'] / own[n]['theirs']:.3f}" if n in own else "–" for n in steps]
        lines.append(f"| {peer} | {method} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a run's folder, for (b)")
    parser.add_argument("--out", type=Path, default=Path("experiments/sampler_quality"))
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="few samples and budgets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, budgets = (64, (5, 20)) if arguments.quick else (arguments.count, BUDGETS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    problems = [hard_mixture(sde, count) for sde in (VPSDE(), SubVPSDE(), VESDE(0.01, 50.0))]
    tables = {p.name: measure(p, budgets) for p in problems}
    if arguments.checkpoint:
        network = trained(arguments.checkpoint, min(count, 128))
        problems.append(network)
        tables[network.name] = measure(network, [b for b in budgets if b <= 100])
    floors = {p.name: p.floor for p in problems}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {
        "hardware": f"CPU, 1 thread, torch {torch.__version__}, numpy {np.__version__}",
        "commit": commit,
        "count": count,
        "floors": floors,
        "tables": tables,
        "peers": peers(count),
    }
    (arguments.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    for key in ("distance", "sliced"):
        draw(tables, floors, key, arguments.out / f"{key}.png")
    command = "python experiments/sampler_quality.py --checkpoint RUN"
    (arguments.out / "README.md").write_text(page(result, command))
    print((arguments.out / "README.md").read_text())


if __name__ == "__main__":
    main()
