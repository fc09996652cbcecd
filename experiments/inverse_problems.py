"""Measures posteriors: mixtures whose posterior is known, another library, held-out digits.

    python experiments/inverse_problems.py --checkpoint RUN [--part PART ...] [--out FOLDER]

- ``mixtures``: every method and two samplers by passes, on two mixtures in four dimensions.
- ``noiseless``: the same without noise of the measurements, where projections apply.
- ``particles``: weighted particles, and their evidence against the exact one.
- ``azula``: another library's methods on the same denoisers (``pip install azula``).
- ``hole``, ``exact_hole``, ``downsampling``: digits of the test split, of which the middle is
  missing, or means of blocks were measured. RUN is a training run of ``+experiment=digits_vp``.
- ``far``: the covariance of a network where noise is large, and what a limit of its use changes.
- ``calibration``: the ranks of all test digits, for the methods that are worth it.

Each part leaves ``PART.json``; the page and the figures are made of the parts that are there.
"""

import argparse
import functools
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from scoresde import VPSDE, GaussianMixtureModel
from scoresde.codec import Codec
from scoresde.data import digits
from scoresde.errors import InputError
from scoresde.inverse import (
    DDNM,
    DPS,
    MMPS,
    TMPD,
    Downsampling,
    DPSStep,
    Linear,
    Local,
    Observation,
    PiGDM,
    Posterior,
    Replacement,
    StepRule,
    Twisted,
    hole,
)
from scoresde.metrics import psnr, ranks, sliced_wasserstein, spread_ratio
from scoresde.sample import DDIM, DPMSolverPPSDE, Sampler, Samples, UniPC
from scoresde.streams import random_rows
from scoresde.tasks.restoration import Restoration, ranks_p_value, simulate
from scoresde.times import LogSNRGrid, UniformGrid
from scoresde.train import Checkpoint

MIXTURES = ("mixtures", "noiseless", "particles", "azula")
DIGITS = ("hole", "exact_hole", "downsampling")
PARTS = (*MIXTURES, *DIGITS, "far", "calibration")
COLOURS = ("#2a6f97", "#c8553d", "#3a7d44", "#8e6c8a", "#e0a030", "#4a4e69", "#00a6a6", "#b5179e")
Row = dict[str, Any]

GRID = LogSNRGrid()
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "UniPC": lambda n: UniPC(n, GRID),
    "DDIM eta=1": lambda n: DDIM(n, GRID, eta=1.0),
    "DPM-Solver++ SDE": lambda n: DPMSolverPPSDE(n, GRID),
    "DDIM eta=1, uniform t": lambda n: DDIM(n, UniformGrid(), eta=1.0),
}


# Of ``task=restore``.
DEFAULT = SAMPLERS["DPM-Solver++ SDE"]


# --- Mixtures ------------------------------------------------------------------------------------

MATRIX = torch.tensor([[1.0, 0, 0.5, 0], [0, 1, 0, 0.5]], dtype=torch.float64)
MEANS = torch.tensor(
    [[2.0, 1, 0, -1], [-2, 1, 1, 0], [1, -2, 0, 1], [-1, -1, -1, -1]], dtype=torch.float64
)
KINDS = {"separate modes": (1.0, 0.7), "close modes": (0.4, 0.3)}


@dataclass
class Mixture:
    """Two measurements of four modes in four dimensions, and the exact posterior.

    Arguments:
        name: What it is called.
        std: The noise of the measurements.
        prior: The mixture.
        seen: The observation.
        exact: The exact posterior.
        shares: How many exact draws are nearest to each mode's mean.
        floor: The distance of two exact sets: the mean, and the 95 % quantile.
    """

    name: str
    std: float
    prior: GaussianMixtureModel
    seen: Observation
    exact: Any
    shares: Tensor
    floor: tuple[float, float]

    def judge(self, x: Tensor, seed: int) -> Row:
        truth = self.exact.sample(len(x), seed=1000 + seed)
        spread = x.var(0).sum() / self.exact.covariance.diagonal().sum()
        return {
            "sliced": sliced_wasserstein(x, truth, 512),
            "shares": float((nearest_shares(x, self.exact) - self.shares).abs().max()),
            "variance": float(spread),
        }


def mixture(name: str, std: float | None, samples: int) -> Mixture:
    """A problem by its name, with its own noise or another."""
    scale, own = KINDS[name]
    std = own if std is None else std
    weights = torch.tensor([0.3, 0.25, 0.25, 0.2], dtype=torch.float64)
    stds = torch.tensor([0.3, 0.4, 0.25, 0.5], dtype=torch.float64)
    prior = GaussianMixtureModel(weights, scale * MEANS, stds, VPSDE())
    operator = Linear(lambda x: x @ MATRIX.T, inverse=lambda y: y @ MATRIX / 1.25)
    seen = Observation(operator, torch.tensor([0.3, 0.0], dtype=torch.float64), std)
    exact = prior.exact_guide(seen)
    many = [exact.sample(samples, seed=2000 + i) for i in range(48)]
    gaps = torch.tensor(
        [sliced_wasserstein(*pair, 512) for pair in zip(many[::2], many[1::2], strict=True)]
    )
    floor = float(gaps.mean()), float(gaps.quantile(0.95))
    shares = nearest_shares(exact.sample(400_000, seed=7), exact)
    return Mixture(name, std, prior, seen, exact, shares, floor)


def nearest_shares(x: Tensor, exact: Any) -> Tensor:
    nearest = torch.cdist(x, exact.means[0]).argmin(1)
    return torch.bincount(nearest, minlength=4) / len(x)


def drawn(problem: Mixture, method: Any, sampler: Sampler, samples: int, seeds: int) -> Row:
    """The quality of a method on a mixture: the mean over seeds, and its standard error."""
    rows: list[Row] = []
    for seed in range(seeds):
        try:
            out = once(problem, method, sampler, samples, seed)
        except InputError:  # a posterior says that its sampler has diverged
            return {"finite": False}
        x = problem.seen.project(out.x) if problem.std == 0 else out.x
        if not bool(x.isfinite().all()):
            return {"finite": False}
        vjps = 0.0 if out.vjps is None else float(out.vjps.double().mean())
        costs = {"nfe": float(out.nfe.double().mean()), "vjps": vjps}
        rows.append({**problem.judge(x, seed), **costs})
    return averaged(rows)


def once(problem: Mixture, method: Any, sampler: Sampler, samples: int, seed: int) -> Samples:
    if isinstance(method, StepRule):
        return method(problem.prior, (samples, 4), observed=problem.seen, seed=seed)
    return sampler(method(problem.prior, problem.seen), (samples, 4), seed=seed)


def averaged(rows: list[Row]) -> Row:
    found: Row = {}
    for key in rows[0]:
        values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
        found[key] = float(values.mean())
        found[f"{key}_error"] = float(values.std() / len(rows) ** 0.5) if len(rows) > 1 else None
    return found


def exact_guide(prior: Any, seen: Observation) -> Any:
    return prior.exact_guide(seen)


POSTERIORS = {"exact_guide": exact_guide, "MMPS": MMPS, "TMPD": TMPD, "PiGDM": PiGDM, "DPS": DPS}


def mixtures(part: str, options: argparse.Namespace) -> Iterator[Row]:
    size = options.samples, options.seeds
    for name in KINDS:
        problem = mixture(name, None, options.samples)
        yield {"problem": name, "method": "floor", "sliced": problem.floor}
        for label in ("UniPC", "DPM-Solver++ SDE"):
            for method, kind in POSTERIORS.items():
                for steps in (32, 64, 128, 256):
                    row = drawn(problem, kind, SAMPLERS[label](steps), *size)
                    where = {"method": method, "sampler": label, "steps": steps}
                    yield {"problem": name, **where, **row}
        for zeta in (0.3, 1.0):
            row = drawn(problem, DPSStep(1000, zeta=zeta), UniPC(), *size)
            yield {"problem": name, "method": f"DPSStep zeta={zeta:g}", "steps": 1000, **row}


def noiseless(part: str, options: argparse.Namespace) -> Iterator[Row]:
    size = options.samples, options.seeds
    posteriors = {"exact_guide": exact_guide, "MMPS": MMPS, "PiGDM": PiGDM}
    for name in KINDS:
        problem = mixture(name, 0.0, options.samples)
        yield {"problem": name, "method": "floor", "sliced": problem.floor}
        for steps in (64, 256, 1000):
            for label in ("UniPC", "DPM-Solver++ SDE"):
                for method, kind in posteriors.items():
                    if steps < 1000:
                        row = drawn(problem, kind, SAMPLERS[label](steps), *size)
                        where = {"method": method, "sampler": label, "steps": steps}
                        yield {"problem": name, **where, **row}
            for method, rule in rules(steps).items():
                row = drawn(problem, rule, UniPC(), *size)
                yield {"problem": name, "method": method, "steps": steps, **row}


def rules(passes: int) -> dict[str, StepRule]:
    found: dict[str, StepRule] = {}
    for eta in (0.0, 0.85, 1.0):
        found[f"DDNM eta={eta:g}"] = DDNM(passes, GRID, eta=eta)
    found["DDNM eta=0, uniform t"] = DDNM(passes, UniformGrid())
    for again in (1, 5, 10, 20):
        if passes // again >= 10:
            found[f"Replacement, {again} resamplings"] = Replacement(
                passes // again, GRID, resamplings=again
            )
    return found


def particles(part: str, options: argparse.Namespace) -> Iterator[Row]:
    for name in KINDS:
        problem = mixture(name, None, options.samples)
        truth = float(problem.prior.log_evidence(problem.seen))
        for method, kind in (("MMPS", MMPS), ("PiGDM", PiGDM)):
            rows = []
            for seed in range(options.seeds):
                clock = time.perf_counter()
                run = Twisted(options.samples, 200)(kind(problem.prior, problem.seen), seed=seed)
                seconds = time.perf_counter() - clock
                x = run.resampled(options.samples, seed)
                rows.append(
                    {
                        **problem.judge(x, seed),
                        "evidence": float(run.log_evidence) - truth,
                        "reported": float(run.standard_error),
                        "ess": float(run.ess[-1]),
                        "nfe": float(run.nfe.double().mean()),
                        "vjps": float(run.vjps.double().mean()),
                        "seconds": seconds,
                    }
                )
            yield {"problem": name, "method": f"Twisted, {method}", "steps": 200, **averaged(rows)}


# --- Another library -----------------------------------------------------------------------------


_PEER_STEPS = 128


class Peer:
    """azula's methods on the exact denoiser of a mixture.

    Arguments:
        problem: The mixture.
        samples: The number of draws.
    """

    def __init__(self, problem: Mixture, samples: int) -> None:
        from azula import denoise, guidance, noise, sample
        from azula.linalg.covariance import IsotropicCovariance

        self.guidance, self.sample = guidance, sample
        self.problem, self.samples = problem, samples
        sde = problem.prior.sde
        eps = torch.tensor([1.0, sde.cutoffs.sampling], dtype=torch.float64)
        first, last = sde.log_snr(eps)

        class Levels(noise.Schedule):
            """Levels equal in the log-SNR, those of ``LogSNRGrid``."""

            def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
                s = sde.time(last + t * (first - last))
                return sde.alpha(s), sde.sigma(s)

        class Exact(denoise.Denoiser):
            def __init__(self, model: Any, schedule: Any) -> None:
                super().__init__()
                self.model, self.schedule = model, schedule

            def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
                alpha, sigma = self.schedule(t)
                s = sde.time(2 * (alpha / sigma).log())
                # The denoised estimate depends on x / alpha and sigma / alpha alone.
                return denoise.DiracPosterior(self.model.denoise(x_t * (sde.alpha(s) / alpha), s))

        self.grids = {"log-SNR": Levels(), "its own": noise.VPSchedule()}
        self.exact = Exact
        self.noise = IsotropicCovariance(torch.tensor(problem.std**2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ MATRIX.T

    def twist(self, x: Tensor, relative: Tensor) -> Tensor:
        """The logarithm of PiGDM's Gaussian, whose covariance is diagonal here."""
        signal = self.problem.prior.data_std**2
        spread = 1.25 * signal * relative**2 / (signal + relative**2) + self.problem.std**2
        r = self.problem.seen.y - self.forward(x)
        return -0.5 * (r**2 / spread + spread.log())

    def methods(self, grid: str, steps: int, eta: float) -> Iterator[tuple[str, Any]]:
        """A name that a method of ours has too, and a sampler of theirs."""
        g, y, prior = self.guidance, self.problem.seen.y, self.problem.prior
        schedule = self.grids[grid]
        own = self.exact(prior, schedule)
        given = {"steps": steps, "silent": True, "dtype": torch.float64}

        def by(denoiser: Any) -> Any:
            return self.sample.DDIMSampler(denoiser, eta=eta, **given)

        yield "exact_guide", by(self.exact(self.problem.exact, schedule))
        yield "MMPS, 1 iteration", by(g.MMPSDenoiser(own, y, self.forward, self.noise))
        yield "MMPS", by(g.MMPSDenoiser(own, y, self.forward, self.noise, iterations=2))
        yield "TMPD", by(g.TMPDenoiser(own, y, self.forward, self.problem.std**2))
        yield (
            "PiGDM",
            g.PGDMSampler(own, y, self.forward, lambda v: v @ MATRIX / 1.25, eta=eta, **given),
        )
        if eta == 0:
            return
        for zeta in (0.3, 1.0):
            yield f"DPSStep zeta={zeta:g}", g.DPSSampler(own, y, self.forward, zeta, **given)
        yield "Twisted", g.TDSSampler(own, self.twist, **given)

    def rows(self, steps: int, eta: float, seeds: int) -> Iterator[Row]:
        for grid in self.grids:
            for name, sampler in self.methods(grid, steps, eta):
                found = []
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    z = torch.randn(self.samples, 4, dtype=torch.float64)
                    found.append(self.problem.judge(sampler(z), seed))
                yield {"library": "azula", "grid": grid, "method": name, **averaged(found)}


def ours(steps: int, eta: float) -> Iterator[tuple[str, Any, Sampler]]:
    sampler = DDIM(steps, GRID, eta=eta)
    for name, kind in POSTERIORS.items():
        yield name, kind, sampler
    yield "MMPS, 1 iteration", functools.partial(MMPS, iterations=1), sampler
    if eta:
        for zeta in (0.3, 1.0):
            yield f"DPSStep zeta={zeta:g}", DPSStep(steps, zeta=zeta), sampler


def azula(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """Both libraries with DDIM, whose step is the same in both."""
    try:
        import azula  # noqa: F401
    except ImportError as error:
        print(f"azula is left out: {error}; pip install -c constraints.txt azula")
        return
    for name in KINDS:
        problem = mixture(name, None, options.samples)
        peer = Peer(problem, options.samples)
        for eta in (0.0, 1.0):
            where = {"problem": name, "eta": eta, "steps": _PEER_STEPS}
            for method, kind, sampler in ours(_PEER_STEPS, eta):
                row = drawn(problem, kind, sampler, options.samples, options.seeds)
                yield {**where, "library": "scoresde", "method": method, **row}
            yield from ({**where, **row} for row in peer.rows(_PEER_STEPS, eta, options.seeds))


# --- Digits --------------------------------------------------------------------------------------


@dataclass
class Digits:
    """Held-out digits, what was observed of them, and which pixels are judged.

    Arguments:
        model: The model of digits.
        codec: Its codec.
        operator: What measured them.
        std: The noise of the measurements, in levels.
        truth: The raw digits ``(N, 1, 8, 8)``.
        judged: The pixels that are judged, bool ``(8, 8)``.
        near: Training digits.
        draws: The number of draws of each.
    """

    model: Any
    codec: Codec
    operator: Any
    std: float
    truth: Tensor
    judged: Tensor
    near: Tensor
    draws: int

    def restore(self, method: Any, sampler: Sampler, count: int | None = None) -> Row:
        """Draws restored digits, and judges them."""
        truth = self.truth[:count]
        y = simulate(self.operator, truth, self.codec, self.std, seed=0)
        seen = Observation(self.operator, y, self.std, self.codec)
        job = Restoration(
            *(self.model, method, sampler, seen, self.codec, len(truth), self.draws, 0)
        )
        clock = time.perf_counter()
        try:
            table = job.batch(range(len(truth) * self.draws))
        except InputError:
            return {"finite": False}
        x = table["x"].unflatten(0, (len(truth), self.draws))
        costs = {k: float(table[k].double().mean()) for k in ("nfe", "vjps")}
        seconds = time.perf_counter() - clock
        return {**costs, "seconds": seconds, **self.judge(x), "x": x}

    def judge(self, x: Tensor) -> Row:
        """Returns how near draws ``(N, K, 1, 8, 8)`` are, and how honest their spread is."""
        x, truth = x[..., self.judged].double(), self.truth[: len(x)][..., self.judged].double()
        x, truth = x.flatten(2), truth.flatten(1)
        rank, k = ranks(x, truth), x.shape[1]
        varies = x.std(1) > 0
        return {
            "psnr_mean": float(psnr(x.mean(1), truth, 16).mean()),
            "psnr_draw": float(psnr(x[:, 0], truth, 16).mean()),
            "energy": [float(v) for v in energy_score(x, truth)],
            "spread": spread_ratio(x, truth),
            "p_value": ranks_p_value(x, truth),
            "outside": float(((rank == 0) | (rank == k))[varies].double().mean()),
            "ranks": torch.bincount(rank[varies], minlength=k + 1).tolist(),
        }

    def nearest(self) -> Row:
        """Judges the training digits nearest to what was observed, in place of draws."""
        half = 0.5
        y = simulate(self.operator, self.truth, self.codec, self.std, seed=0)
        theirs = self.operator(self.near.float() + half)
        gap = torch.cdist(y.flatten(1), theirs.flatten(1))
        rows = gap.topk(self.draws, largest=False).indices
        return self.judge(self.near[rows])


def energy_score(x: Tensor, truth: Tensor) -> Tensor:
    r"""Returns the energy score of draws ``(N, K, D)``, ``(N,)``, per root of D.

    .. math:: \tfrac1K \sum_k |x_k - x| - \tfrac{1}{2 K (K - 1)} \sum_{jk} |x_j - x_k|

    It is the least, in expectation, for draws of the posterior (Gneiting and Raftery 2007).
    """
    k, d = x.shape[1:]
    near = (x - truth[:, None]).norm(dim=2).mean(1)
    between = torch.cdist(x, x).sum((1, 2)) / (2 * k * (k - 1))
    return (near - between) / math.sqrt(d)


def digits_problem(checkpoint: str, part: str, count: int, draws: int) -> Digits:
    saved, data = Checkpoint.load(checkpoint), digits()
    codec = saved.build("units", Codec, ())
    middle = torch.zeros(8, 8, dtype=torch.bool)
    middle[2:6, 2:6] = True
    operator, std, judged = {
        "hole": (hole((1, 8, 8), 4), 0.25, middle),
        "exact_hole": (hole((1, 8, 8), 4), 0.0, middle),
        "downsampling": (Downsampling(2), 0.5, torch.ones_like(middle)),
    }[part]
    truth = data.test[random_rows(len(data.test), count)]
    return Digits(saved.build_model(), codec, operator, std, truth, judged, data.train, draws)


def restore_digits(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """The methods that apply, with samplers of both kinds."""
    few = max(2, options.digits // 4)
    problem = digits_problem(options.checkpoint, part, options.digits, 8)
    yield {"method": "8 nearest training digits", **problem.nearest()}
    for count, name, method, sampler, steps in plan(part, few):
        own = sampler(steps) if callable(sampler) else sampler
        label = own_name(sampler)
        row = problem.restore(method, own, count)
        yield {"method": name, "sampler": label, "steps": steps, "count": count, **row}


class Far(Posterior):
    r"""A method that takes the covariance for that of data N(m, s^2 I) where noise is large.

    There a network's Jacobian is all error, and :math:`\sigma^2 / \alpha` amplifies it.

    Arguments:
        kind: The method.
        limit: The relative noise :math:`\sigma / \alpha` from which on.
        model: The model.
        observed: The observation.
    """

    def __init__(self, kind: Any, limit: float, model: Any, observed: Observation) -> None:
        super().__init__(model, observed)
        self.kind, self.limit, self.method = kind, limit, kind(model, observed)

    def around(self, model: Any, observed: Observation) -> "Far":
        return Far(self.kind, self.limit, model, observed)

    def weights(self, local: Local) -> Tensor:
        return self.method.weights(local)

    def at(self, x: Tensor, t: Tensor, **cond: Tensor) -> Local:
        noise = float(self.sde.sigma(t) / self.sde.alpha(t))
        if noise <= self.limit:
            return super().at(x, t, **cond)
        mean = self.model.denoise(x, t, **cond)
        variance = 1 / (1 / self.model.data_std**2 + 1 / noise**2)
        return Local(t, mean, self.observed.linearise(mean), lambda v: variance * v)


def far(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """Row sums of the covariance by the noise, and what a limit of its use changes."""
    yield from row_sums(options)
    quick = functools.partial(MMPS, tolerance=1e-2, iterations=5)
    kinds = {"PiGDM": PiGDM, "TMPD": TMPD, "MMPS 0.01, at most 5": quick}
    for name in ("hole", "downsampling"):
        problem = digits_problem(options.checkpoint, name, max(2, options.digits // 4), 8)
        for method, label in itertools.product(kinds, ("UniPC", "DPM-Solver++ SDE")):
            for limit in (math.inf, 10.0, 5.0, 2.5):
                kind = functools.partial(Far, kinds[method], limit)
                row = problem.restore(kind, SAMPLERS[label](25))
                where = {"problem": name, "method": method, "sampler": label, "limit": limit}
                yield {**where, "count": len(problem.truth), **row}


def row_sums(options: argparse.Namespace) -> Iterator[Row]:
    """The row sums of A Cov A^T of means of 2 x 2 pixels, on test digits with noise."""
    problem = digits_problem(options.checkpoint, "downsampling", 16, 8)
    y = simulate(problem.operator, problem.truth, problem.codec, problem.std, seed=0)
    method = MMPS(problem.model, Observation(problem.operator, y, problem.std, problem.codec))
    clean = problem.codec.encode(problem.truth)
    blocks = problem.operator(problem.near.float()).flatten(1)
    yield {"rows": "of the data", "median": float(blocks.T.cov().sum(1).median())}
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for t in map(torch.tensor, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)):
        local = method.at(method.sde.perturb(clean, t, z), t)
        ones = torch.ones_like(local.near.residual)
        sums = local.near.push(local.covariance(local.near.pull(ones)))
        noise = float(method.sde.sigma(t) / method.sde.alpha(t))
        below = float((sums <= 0).double().mean())
        yield {"rows": float(t), "noise": noise, "median": float(sums.median()), "below": below}


def calibration(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """Twice the digits by the default sampler, so that ranks say more."""
    for name in DIGITS:
        problem = digits_problem(options.checkpoint, name, 2 * options.digits, 8)
        yield {"problem": name, "method": "8 nearest training digits", **problem.nearest()}
        methods: dict[str, Any] = {"PiGDM": PiGDM, "MMPS": MMPS}
        methods |= {} if problem.std else {"DDNM eta=0.85": DDNM(100, GRID, eta=0.85)}
        for method, kind in methods.items():
            row = problem.restore(kind, DEFAULT(50))
            yield {"problem": name, "method": method, "count": len(problem.truth), **row}


def own_name(sampler: Any) -> str:
    names = [name for name, make in SAMPLERS.items() if make is sampler]
    return names[0] if names else ""


def plan(part: str, few: int) -> Iterator[tuple[int | None, str, Any, Any, int]]:
    """How many digits, a method and its name, a sampler and its steps."""
    ode, sde = SAMPLERS["UniPC"], SAMPLERS["DPM-Solver++ SDE"]
    for make in SAMPLERS.values():
        for steps in (25, 50, 100):
            if make is not SAMPLERS["DDIM eta=1, uniform t"] or steps == 100:
                yield None, "PiGDM", PiGDM, make, steps
    noisy = part != "exact_hole"
    for steps in (25, 50, 100):
        for name, kind in (("TMPD", TMPD), ("DPS", DPS)) if noisy else ():
            yield from ((None, name, kind, make, steps) for make in (ode, sde))
        if noisy:
            continue
        for eta in (0.0, 0.85, 1.0):
            rule = DDNM(steps, GRID, eta=eta)
            yield None, f"DDNM eta={eta:g}", rule, None, steps
        rule = DDNM(steps, UniformGrid())
        yield None, "DDNM eta=0, uniform t", rule, None, steps
        for again in {25: (10,), 50: (1, 5, 10, 20), 100: (1, 10)}[steps]:
            rule = Replacement(steps, GRID, resamplings=again)
            yield None, f"Replacement, {again} resamplings", rule, None, steps
    if noisy:
        yield few, "DPSStep zeta=0.3", DPSStep(1000), None, 1000
        quick = functools.partial(MMPS, tolerance=1e-2, iterations=5)
        for make in (ode, sde):
            yield from ((None, "MMPS 0.01, at most 5", quick, make, n) for n in (25, 50))
    for tolerance, most in (
        (1e-4, None),
        (1e-2, None),
        (1e-4, 10),
        (1e-2, 5),
        (1e-2, 3),
        (1e-2, 1),
    ):
        method = functools.partial(MMPS, tolerance=tolerance, iterations=most)
        name = f"MMPS {tolerance:g}" + ("" if most is None else f", at most {most}")
        yield from ((few, name, method, make, 50) for make in (ode, sde))
    yield from ((few, "PiGDM", PiGDM, make, 50) for make in (ode, sde))


# --- The page and its figures --------------------------------------------------------------------

MARK = "<!-- What follows is written by inverse_problems.py. -->"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(row: Row | None, key: str, digits: int = 3) -> str:
    """A value and its standard error, if the row has both."""
    if row is None:
        return "–"
    if not row.get("finite", True):
        return "diverges"
    error = row.get(f"{key}_error")
    text = f"{row[key]:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def whole(row: Row | None, key: str) -> str:
    return "–" if row is None or key not in row else f"{row[key]:.0f}"


def pick(rows: list[Row], **where: Any) -> Row | None:
    found = [row for row in rows if all(row.get(k) == v for k, v in where.items())]
    return found[0] if found else None


def mixture_tables(title: str, rows: list[Row]) -> list[str]:
    """For each problem the distance by passes, and the rest at the most passes."""
    lines = [f"## {title}", ""]
    steps = sorted({row["steps"] for row in rows if "steps" in row})
    for name in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == name]
        mean, high = next(row["sliced"] for row in own if row["method"] == "floor")
        lines += [
            f"**{name.capitalize()}**; two exact sets are at a distance of {mean:.3f} "
            f"(95 % below {high:.3f}).",
            "",
        ]
        body = []
        for method, sampler in dict.fromkeys((r["method"], r.get("sampler")) for r in own):
            if method == "floor":
                continue
            each = [pick(own, method=method, sampler=sampler, steps=n) for n in steps]
            last = [row for row in each if row is not None][-1]
            body.append(
                [
                    f"`{method}`",
                    sampler or "itself",
                    *(number(row, "sliced") for row in each),
                    number(last, "shares"),
                    number(last, "variance"),
                    whole(last, "nfe"),
                    whole(last, "vjps"),
                ]
            )
        head = ["method", "sampler", *(f"W2, {n}" for n in steps)]
        lines += table([*head, "shares", "variance", "passes", "products"], body)
    return lines


def particle_table(rows: list[Row]) -> list[str]:
    head = ["problem", "proposal", "W2", "shares", "log evidence less truth, nats"]
    head += ["its reported error", "final ESS", "passes", "products"]
    body = [
        [
            row["problem"],
            f"`{row['method'].split(', ')[1]}`",
            *(number(row, key) for key in ("sliced", "shares", "evidence", "reported")),
            *(whole(row, key) for key in ("ess", "nfe", "vjps")),
        ]
        for row in rows
    ]
    return ["## Particles", "", *table(head, body)]


def peer_tables(rows: list[Row]) -> list[str]:
    """Ours, and theirs on the better of two grids."""
    head, body = ["method"], []
    cases = [(name, eta) for name in KINDS for eta in (0.0, 1.0)]
    for name, eta in cases:
        head += [f"{name}, {'DDPM' if eta else 'DDIM'}: ours", "azula"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"`{method}`"]
        for name, eta in cases:
            own = [r for r in rows if (r["method"], r["problem"], r["eta"]) == (method, name, eta)]
            theirs = [row for row in own if row["library"] == "azula"]
            best = min(theirs, key=lambda row: row["sliced"], default=None)
            cells += [number(pick(own, library="scoresde"), "sliced"), number(best, "sliced")]
        body.append(cells)
    return ["## Next to azula", "", *table(head, body)]


def digit_table(title: str, rows: list[Row]) -> list[str]:
    """The quality of restored digits, by method, sampler and steps."""
    head = ["method", "sampler", "steps", "digits", "PSNR mean", "PSNR draw", "energy score"]
    head += ["error / spread", "p of ranks", "outside", "passes", "products", "ms a draw"]
    reference = pick(rows, method="PiGDM", sampler="DPM-Solver++ SDE", steps=100)
    body = []
    for row in rows:
        count = row.get("count") or len(reference["energy"])
        start = [
            f"`{row['method']}`" if "nearest" not in row["method"] else row["method"],
            row.get("sampler") or "–",
            str(row.get("steps", "–")),
            str(count),
        ]
        if not row.get("finite", True):
            body.append([*start, "diverges", *[""] * 8])
            continue
        cost = "–"
        if "seconds" in row:
            cost = f"{1000 * row['seconds'] / (8 * count):.0f}"
        body.append(
            [
                *start,
                number(row, "psnr_mean", 1),
                number(row, "psnr_draw", 1),
                scored(row, reference),
                number(row, "spread", 2),
                f"{row['p_value']:.2g}",
                number(row, "outside", 2),
                whole(row, "nfe"),
                whole(row, "vjps"),
                cost,
            ]
        )
    return [f"## {title}", "", *table(head, body)]


def scored(row: Row, reference: Row) -> str:
    """The energy score, and its difference to a reference on the same digits."""
    own = torch.tensor(row["energy"], dtype=torch.float64)
    gap = own - torch.tensor(reference["energy"], dtype=torch.float64)[: len(own)]
    text = f"{float(own.mean()):.3f}"
    if not bool(gap.any()):
        return text
    return f"{text} ({float(gap.mean()):+.3f} ± {float(gap.std() / len(gap) ** 0.5):.3f})"


def far_tables(rows: list[Row]) -> list[str]:
    """Row sums by the noise; the energy score by the limit."""
    sums = [row for row in rows if "rows" in row]
    body = [
        [
            "of the data" if row["rows"] == "of the data" else f"t = {row['rows']:.1f}",
            f"{row['noise']:.2f}" if "noise" in row else "–",
            f"{row['median']:.1f}",
            f"{100 * row['below']:.0f} %" if "below" in row else "–",
        ]
        for row in sums
    ]
    lines = ["## The Jacobian of a network where noise is large", ""]
    lines += table(["covariance", "sigma / alpha", "median row sum", "not positive"], body)
    limited = [row for row in rows if "limit" in row]
    limits = list(dict.fromkeys(row["limit"] for row in limited))
    body = []
    for key in dict.fromkeys((r["problem"], r["method"], r["sampler"]) for r in limited):
        own = [r for r in limited if (r["problem"], r["method"], r["sampler"]) == key]
        scores = [f"{sum(r['energy']) / len(r['energy']):.3f}" for r in own]
        products = "/".join(whole(r, "vjps") for r in own)
        body.append([key[0], f"`{key[1]}`", key[2], *scores, products])
    head = ["problem", "method", "sampler"]
    head += ["no limit" if math.isinf(n) else f"above {n:g}" for n in limits]
    return [*lines, *table([*head, "products"], body)]


def calibration_table(rows: list[Row]) -> list[str]:
    head = ["problem", "method", "digits", "energy score", "error / spread", "p of ranks"]
    head += ["outside", "ranks 0 to 8, per cent"]
    body = []
    for row in rows:
        total = sum(row["ranks"])
        body.append(
            [
                row["problem"],
                row["method"] if "nearest" in row["method"] else f"`{row['method']}`",
                str(len(row["energy"])),
                f"{sum(row['energy']) / len(row['energy']):.3f}",
                number(row, "spread", 2),
                f"{row['p_value']:.2g}",
                number(row, "outside", 2),
                " ".join(f"{100 * n / total:.0f}" for n in row["ranks"]),
            ]
        )
    return ["## Calibration", "", *table(head, body)]


TITLES = {
    "hole": "Digits: a hole of 4 x 4, noise of 0.25 levels",
    "exact_hole": "Digits: the hole without noise",
    "downsampling": "Digits: means of 2 x 2 pixels, noise of 0.5 levels",
}


def page(out: Path) -> None:
    """Writes the tables of the parts that are there below the mark of the page."""
    found = {
        part: json.loads((out / f"{part}.json").read_text())
        for part in PARTS
        if (out / f"{part}.json").exists()
    }
    makers: dict[str, Callable[[list[Row]], list[str]]] = {
        "mixtures": functools.partial(mixture_tables, "Mixtures"),
        "noiseless": functools.partial(mixture_tables, "Mixtures without noise"),
        "particles": particle_table,
        "azula": peer_tables,
        "far": far_tables,
        "calibration": calibration_table,
        **{part: functools.partial(digit_table, title) for part, title in TITLES.items()},
    }
    lines = [line for part, data in found.items() for line in makers[part](data["rows"])]
    path = out / "README.md"
    before = path.read_text().split(MARK)[0] if path.exists() else "# Inverse problems\n\n"
    path.write_text("\n".join([before + MARK, "", *lines]))
    if "mixtures" in found:
        draw_mixtures(found["mixtures"]["rows"], out / "mixtures.png")
    shown = {part: found[part]["rows"] for part in TITLES if part in found}
    if shown:
        draw_digits(shown, out / "digits.png")


def draw_mixtures(rows: list[Row], path: Path) -> None:
    samplers = list(dict.fromkeys(row["sampler"] for row in rows if "sampler" in row))
    figure = Figure(figsize=(4 * len(samplers), 7), layout="constrained")
    panels = figure.subplots(len(KINDS), len(samplers), sharey="row", sharex=True, squeeze=False)
    for line, name in zip(panels, KINDS, strict=True):
        own = [row for row in rows if row["problem"] == name]
        floor = pick(own, method="floor")
        for axes, sampler in zip(line, samplers, strict=True):
            for colour, method in zip(COLOURS, POSTERIORS, strict=False):
                points = [
                    row for row in own if (row["method"], row.get("sampler")) == (method, sampler)
                ]
                points = [row for row in points if row.get("finite", True)]
                axes.errorbar(
                    [row["nfe"] for row in points],
                    [row["sliced"] for row in points],
                    [row["sliced_error"] or 0 for row in points],
                    **{"color": colour, "marker": "o", "ms": 3.5, "lw": 1.2, "label": method},
                )
            axes.axhline(floor["sliced"][0], color="#999999", lw=1, ls="--", label="exact draws")
            axes.set(xscale="log", yscale="log", title=f"{name}, {sampler}")
            steps = sorted({row["steps"] for row in own if row.get("sampler") == sampler})
            axes.set_xticks(steps, [str(n) for n in steps])
            axes.minorticks_off()
            axes.grid(alpha=0.25, which="both")
            axes.set_ylim(top=2.0)
        line[0].set_ylabel("sliced Wasserstein distance")
    for axes in panels[-1]:
        axes.set_xlabel("passes a draw")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)


def draw_digits(parts: dict[str, list[Row]], path: Path) -> None:
    """The energy score by cost, of the methods that saw all digits."""
    figure = Figure(figsize=(5.2 * len(parts), 5.6), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (part, rows) in zip(panels, parts.items(), strict=True):
        nearest = rows[0]["energy"]
        axes.axhline(sum(nearest) / len(nearest), color="#999999", lw=1, ls="--", label="nearest")
        every = [r for r in rows if r.get("finite", True) and "nfe" in r and r["count"] is None]
        kinds = list(dict.fromkeys((row["method"], row["sampler"]) for row in every))
        for i, (method, sampler) in enumerate(kinds):
            own = [row for row in every if (row["method"], row["sampler"]) == (method, sampler)]
            axes.plot(
                [row["nfe"] + row["vjps"] for row in own],
                [sum(row["energy"]) / len(row["energy"]) for row in own],
                **{"color": COLOURS[i % 8], "ls": ("-", ":")[i // 8], "marker": "os"[i // 8]},
                **{"ms": 3.5, "lw": 1.2, "label": f"{method}, {sampler}".rstrip(", ")},
            )
        axes.set(xscale="log", yscale="log", title=TITLES[part].removeprefix("Digits: "))
        axes.set(xlabel="passes and products a draw", ylabel="energy score, levels")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=7)
        axes.set_xticks([30, 50, 100, 200, 300, 500, 1000], minor=False)
        axes.set_xticks([], minor=True)
        costs = [row["nfe"] + row["vjps"] for row in every]
        axes.set_xlim(0.9 * min(costs), 1.1 * max(costs))
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.savefig(path, dpi=110)


def draw_restored(problem: Digits, out: Path, count: int = 6) -> None:
    """The truth, what was observed, and means and draws of some methods."""
    quick = functools.partial(MMPS, tolerance=1e-2, iterations=5)
    some = {
        "PiGDM, UniPC": (PiGDM, SAMPLERS["UniPC"](50)),
        "PiGDM, SDE": (PiGDM, SAMPLERS["DPM-Solver++ SDE"](50)),
        "MMPS, SDE": (quick, SAMPLERS["DPM-Solver++ SDE"](50)),
        "DDNM, 0.85": (DDNM(100, GRID, eta=0.85), UniPC()),
        "Replacement": (Replacement(50, GRID), UniPC()),
    }
    y = simulate(problem.operator, problem.truth[:count], problem.codec, problem.std, seed=0)
    columns = [("truth", problem.truth[:count]), ("observed", y)]
    for name, (method, sampler) in some.items():
        x = problem.restore(method, sampler, count)["x"].double()
        columns += [(f"{name}\nmean", x.mean(1)), ("draw", x[:, 0]), ("draw", x[:, 1])]
    figure = Figure(figsize=(0.8 * len(columns), 0.8 * count + 0.6), layout="constrained")
    panels = figure.subplots(count, len(columns), squeeze=False)
    for j, (name, images) in enumerate(columns):
        for i in range(count):
            panels[i][j].imshow(images[i, 0], cmap="gray_r", vmin=0, vmax=16)
            panels[i][j].set_axis_off()
        panels[0][j].set_title(name, fontsize=7)
    figure.savefig(out / "restored.png", dpi=130)


# --- Files ---------------------------------------------------------------------------------------


def write(part: str, rows: Iterator[Row], out: Path) -> None:
    """Writes the rows of a part, as they come."""
    found, head = [], {"commit": commit(), "torch": torch.__version__}
    for row in rows:
        found.append({key: value for key, value in row.items() if key != "x"})
        shown = {k: v for k, v in found[-1].items() if not isinstance(v, list)}
        print(part, json.dumps(shown), flush=True)
        result = {**head, "rows": found}
        (out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a run's folder, for the parts with digits")
    parser.add_argument("--part", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("experiments/inverse_problems"))
    parser.add_argument("--digits", type=int, default=48, help="how many test digits")
    parser.add_argument("--samples", type=int, default=4096, help="draws of a mixture")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    makers = {"mixtures": mixtures, "noiseless": noiseless, "particles": particles, "azula": azula}
    makers |= {"calibration": calibration, "far": far}
    for part in options.part:
        write(part, makers.get(part, restore_digits)(part, options), options.out)
    if options.checkpoint:
        draw_restored(digits_problem(options.checkpoint, "exact_hole", 6, 8), options.out)
    page(options.out)


if __name__ == "__main__":
    main()
