r"""Compares losses of training by the test likelihood of the models that they train.

    python experiments/training_defaults.py [--sets digits,moons] [--seeds 0,1,2] [--steps 1.0] \
        [--losses "edm -1.2 1.2,noise spread"] [--root FOLDER]

Each loss trains the same network from the same start, on the same batches, with the same noise.
What a model is worth is the negative log-density of test examples, with random numbers that all
models share, so that two losses differ by the training alone. For two moons, the ring and the
crescents the exact negative log-density is subtracted. ``fit`` trains on tables and on the plane;
images are trained as by the recipes ``digits_vp`` and ``fashion_vp``, with a narrower network and
fewer steps for Fashion-MNIST (``--root`` is the folder of its files).

A run is written when it ends (``--runs``) and not repeated; ``--report`` only makes the tables.
Writes table.md and table.json.
"""

import argparse
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from scoresde import SDE, VPSDE, Likelihood, Preconditioned, ScoreModel, VariationalBound, fit
from scoresde.data import Dataset, digits, fashion_mnist, gaussian_ring, make_splits, two_moons
from scoresde.loss import (
    DenoisingScoreMatching,
    EDMWeighting,
    LikelihoodWeighting,
    Loss,
    NoiseWeighting,
)
from scoresde.model import (
    NoiseParametrisation,
    Parametrisation,
    ScoreParametrisation,
    VParametrisation,
)
from scoresde.nn import MLP, UNet
from scoresde.streams import Purpose, Streams
from scoresde.times import ImportanceTimes, LogNormalTimes, LowDiscrepancy, UniformTimes
from scoresde.train import CosineRate, Training, train

BITS = ("digits", "fashion")  # sets whose scores are bits/dim
Scores = dict[str, Tensor]  # a negative log-density of each test example, by what computes it

# --- Losses, of the data's standard deviation ----------------------------------------------------


def edm(mean: float, std: float, spread: bool = False) -> Callable[[float], Loss]:
    times = LogNormalTimes(mean, std)

    def loss(sigma_data: float) -> Loss:
        return DenoisingScoreMatching(
            EDMWeighting(sigma_data), LowDiscrepancy(times) if spread else times
        )

    return loss


def edm_of_one(mean: float, std: float) -> Callable[[float], Loss]:
    """The weight of unit variance, whatever that of the data."""
    return lambda sigma_data: edm(mean, std)(1.0)


@dataclass(frozen=True)
class CappedWeighting(EDMWeighting):
    """At most 5: the full weight lets few examples rule a network that returns the noise."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return super().__call__(sde, t).clamp(max=5.0)


LOSSES: dict[str, Callable[[float], Loss]] = {
    "noise": lambda sigma_data: DenoisingScoreMatching(NoiseWeighting(), UniformTimes()),
    "noise spread": lambda sigma_data: DenoisingScoreMatching(
        NoiseWeighting(), LowDiscrepancy(UniformTimes())
    ),
    "edm -1.2 1.2": edm(-1.2, 1.2),
    "edm -0.5 1.2": edm(-0.5, 1.2),
    "edm -0.7 1.6": edm(-0.7, 1.6),
    "edm -1.6 1.2": edm(-1.6, 1.2),
    "edm -1.2 1.6": edm(-1.2, 1.6),
    "edm -1.2 1.2 spread": edm(-1.2, 1.2, spread=True),
    "edm -1.2 1.2 tail": lambda sigma_data: DenoisingScoreMatching(
        EDMWeighting(sigma_data), LogNormalTimes(tail=0.1)
    ),
    "likelihood spread": lambda sigma_data: DenoisingScoreMatching(
        LikelihoodWeighting(), LowDiscrepancy(ImportanceTimes())
    ),
    "edm -1.2 1.2 capped": lambda sigma_data: DenoisingScoreMatching(
        CappedWeighting(sigma_data), LogNormalTimes()
    ),
    # The weight of unit variance for data of another.
    "edm -1.2 1.2 of 1": edm_of_one(-1.2, 1.2),
}

# --- Sets ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A set of data, a network for it, and how it is trained and evaluated.

    Arguments:
        data: Makes the data.
        network: Makes the network.
        training: How it is trained.
        unit: Of the scores: bits/dim, or nats of an example.
        likelihood: What computes them, by name.
        examples: How many test examples at most.
        size: The number of dimensions of an example.
    """

    data: Callable[[], Dataset]
    network: Callable[[], torch.nn.Module]
    training: Training
    unit: str
    likelihood: dict[str, Likelihood | VariationalBound]
    examples: int
    size: int
    cond: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None
    exact: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None
    few: dict[str, int] = field(default_factory=dict)


# --- A conditional table: crescents of which the density is known --------------------------------


@dataclass(frozen=True)
class Crescents:
    r"""Vectors of three parts given a context x of three numbers: two crescents and a skewed one.

    .. math::
        \theta_1 &= 0.7 x_1 + 0.8 z_1, \qquad & \theta_2 &= \theta_1^2 - 1 + 0.5 x_2 + 0.1 z_2 \\
        \theta_3 &= 0.7 x_3 + 0.8 z_3, \qquad & \theta_4 &= \sin(2 \theta_3) x_1 + 0.2 z_4 \\
        \theta_5 &= e^{0.5 x_2 + 0.4 z_5}

    Each is a shifted and scaled z given those before it, so that the density is a product.
    """

    dimensions: int = 2
    count: int = 12_000

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor]:
        """The vectors and their contexts, float64."""
        streams = Streams.of(0, batch=self.count)
        x, z = (streams.normal((n,), Purpose.DATA, i, torch.float64) for i, n in ((0, 3), (1, 5)))
        parts: list[Tensor] = []
        for k in range(self.dimensions):
            mean, std = self._given(k, parts, x)
            value = mean + std * z[:, k]
            parts.append(value.exp() if k == 4 else value)
        return torch.stack(parts, 1), x

    def negative_log_prob(self, theta: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Returns that of the raw vectors, float64 ``(N,)``."""
        total, x = torch.zeros(len(theta), dtype=torch.float64), cond["context"].double()
        columns = list(theta.double().unbind(1))
        for k, value in enumerate(columns):
            mean, std = self._given(k, columns[:k], x)
            if k == 4:
                total, value = total + value.log(), value.log()
            total += 0.5 * ((value - mean) / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))
        return total

    @staticmethod
    def _given(k: int, before: list[Tensor], x: Tensor) -> tuple[Tensor, float]:
        if k in (0, 2):
            return 0.7 * x[:, k], 0.8
        if k == 1:
            return before[0] ** 2 - 1 + 0.5 * x[:, 1], 0.1
        if k == 3:
            return torch.sin(2 * before[2]) * x[:, 0], 0.2
        return 0.5 * x[:, 1], 0.4

    def dataset(self) -> Dataset:
        theta = self.drawn[0].float()
        splits = theta[:9000], theta[9000:10_000], theta[10_000:]
        return Dataset.of(f"crescents {self.dimensions}", splits)

    def conditions(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Those of training and validation together, and of the test."""
        context = self.drawn[1].float()
        return {"context": context[:10_000]}, {"context": context[10_000:]}


def breast_cancer() -> Dataset:
    """569 rows of 24 correlated columns (scikit-learn), a quarter of them for the test.

    Perimeters and areas are left out, which the radii almost give.
    """
    from sklearn.datasets import load_breast_cancer

    kept = [k for k in range(30) if k % 10 not in (2, 3)]
    raw = torch.from_numpy(load_breast_cancer().data)[:, kept]
    return Dataset.of("breast cancer", make_splits(raw, (0.6, 0.15, 0.25)))


VECTORS = Training(steps=1500, batch_size=256)
EXACTLY = Likelihood("exact", rtol=1e-4, atol=1e-4)
IMAGES = {
    "likelihood": Likelihood(probes=2, rtol=1e-4, atol=1e-4),
    "bound": VariationalBound(draws=16),
}


def vectors(data: Callable[[], Dataset], size: int, context: int = 0, **more: object) -> Case:
    conditions = {"conditions": {"context": context}} if context else {}
    network = functools.partial(MLP, size, width=128, **conditions)
    case = Case(data, network, VECTORS, "nats", {"likelihood": EXACTLY}, 1000, size)
    return replace(case, **more)


def crescents(dimensions: int) -> Case:
    one = Crescents(dimensions)
    return vectors(one.dataset, dimensions, 3, cond=one.conditions, exact=one.negative_log_prob)


def unet(size: int, attention: int) -> Callable[[], torch.nn.Module]:
    shape, multipliers = (1, size, size), [1, 2, 2]
    return lambda: UNet(shape, width=16, multipliers=multipliers, attention=[attention], blocks=1)


def cases(root: str | None) -> dict[str, Case]:
    images = Training(steps=900, batch_size=64, rate=CosineRate(warmup=100))
    return {
        "moons": vectors(two_moons, 2),
        "ring": vectors(functools.partial(gaussian_ring, modes=10, std=0.15), 2),
        "cancer": vectors(breast_cancer, 24),
        "crescents 2": crescents(2),
        "crescents 5": crescents(5),
        "digits": Case(digits, unet(8, 1), images, "bits/dim", IMAGES, 180, 64),
        "fashion": Case(
            functools.partial(fashion_mnist, root=root),
            unet(28, 2),
            replace(images, steps=400),
            "bits/dim",
            {**IMAGES, "likelihood": Likelihood(probes=1, rtol=1e-4, atol=1e-4)},
            256,
            784,
            few={"likelihood": 48},
        ),
    }


# --- A run ---------------------------------------------------------------------------------------


def scores(case: Case, data: Dataset, model: ScoreModel) -> Scores:
    """Returns negative log-densities less those of the truth, where that is known."""
    _, cond = case.cond() if case.cond else ({}, {})
    n = min(case.examples, len(data.test))
    raw, cond = data.test[:n], {name: value[:n] for name, value in cond.items()}
    x = data.batch("test", Streams.of(0, batch=n))
    log_det = data.log_det(raw, x)
    found = {}
    for name, likelihood in case.likelihood.items():
        m = min(n, case.few.get(name, n))
        some = {key: value[:m] for key, value in cond.items()}
        value = -(likelihood(model, x[:m], seed=0, **some).log_prob.double() + log_det[:m])
        if case.exact is not None:
            value = value - case.exact(raw[:m], some)
        elif data.log_prob is not None:
            value = value + data.log_prob(raw[:m]).double()
        found[name] = value / (case.size * math.log(2)) if case.unit == "bits/dim" else value
    return found


def trained(
    case: Case, data: Dataset, loss: Loss, parametrisation: Parametrisation, seed: int
) -> ScoreModel:
    torch.manual_seed(seed)
    model = ScoreModel(case.network(), VPSDE(), parametrisation)
    options = {"seed": seed, "progress": False}
    if case.unit == "bits/dim":
        adam = functools.partial(torch.optim.Adam, lr=2e-3)
        model = model.to(memory_format=torch.channels_last)
        with tempfile.TemporaryDirectory() as folder:
            return train(model, data, loss, case.training, adam, Path(folder), **options)
    steps, size = case.training.steps, case.training.batch_size
    examples = data
    if case.cond is not None:
        x = data.encode(torch.cat((data.train, data.validation)))
        examples = (x, case.cond()[0])
    return fit(model, examples, steps, batch_size=size, loss=loss, **options)


PARAMETRISATIONS: dict[str, Callable[[float], Parametrisation]] = {
    "preconditioned": Preconditioned,
    "noise": NoiseParametrisation,
    "v": VParametrisation,
    "score": ScoreParametrisation,
}


@dataclass(frozen=True)
class Job:
    """One run: a set, a loss, a seed, a parametrisation, and a factor of the recipe's steps."""

    case: str
    loss: str
    seed: int
    parametrisation: str
    factor: float

    @property
    def name(self) -> str:
        parts = [self.case, self.loss, str(self.seed), f"{self.factor:g}"]
        if self.parametrisation != "preconditioned":
            parts.append(self.parametrisation)
        return "--".join(parts).replace(" ", "_")

    def run(self, case: Case) -> dict[str, object]:
        data = case.data()
        steps = max(1, round(self.factor * case.training.steps))
        case = replace(case, training=replace(case.training, steps=steps))
        loss = LOSSES[self.loss](data.sigma_data)
        start = time.perf_counter()
        parametrisation = PARAMETRISATIONS[self.parametrisation](data.sigma_data)
        model = trained(case, data, loss, parametrisation, self.seed)
        seconds = time.perf_counter() - start
        values = scores(case, data, model)
        return {
            "case": self.case,
            "loss": self.loss,
            "seed": self.seed,
            "parametrisation": self.parametrisation,
            "steps": steps,
            "unit": case.unit,
            "size": case.size,
            "sigma_data": data.sigma_data,
            "seconds": round(seconds, 1),
            "values": {k: [round(one, 6) for one in v.tolist()] for k, v in values.items()},
        }


# --- The tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A loss on a set: the mean score, and the difference to the reference with its error.

    The error is that of the mean over the seeds and that over the test examples, added in
    quadrature; a single seed has the second alone.
    """

    mean: float
    difference: float
    error: float
    seeds: int

    @staticmethod
    def of(values: dict[int, Tensor], reference: dict[int, Tensor]) -> "Compared":
        common = sorted(values.keys() & reference.keys())
        mean = float(torch.stack([values[s].mean() for s in sorted(values)]).mean())
        pairs = torch.stack([values[s] - reference[s] for s in common])
        per_seed, per_example = pairs.mean(1), pairs.mean(0)
        error = float(per_example.std()) / len(per_example) ** 0.5
        if len(common) > 1:
            error = math.hypot(error, float(per_seed.std()) / len(common) ** 0.5)
        return Compared(mean, float(pairs.mean()), error, len(common))


def compared(records: list[dict], score: str, reference: str) -> dict[str, dict[str, Compared]]:
    """Returns the comparison of each loss on each set."""
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for one in records:
        if score in one["values"]:
            values = torch.tensor(one["values"][score], dtype=torch.float64)
            found.setdefault(one["case"], {}).setdefault(one["loss"], {})[one["seed"]] = values
    return {
        case: {loss: Compared.of(v, of[reference]) for loss, v in of.items()}
        for case, of in found.items()
        if reference in of
    }


def table(tables: dict[str, dict[str, Compared]], digits: int = 3) -> list[str]:
    """Returns rows of losses and columns of sets: the mean, the difference and the seeds."""
    losses = [loss for loss in LOSSES if any(loss in of for of in tables.values())]
    lines = ["| loss | " + " | ".join(tables) + " |", "|---" * (len(tables) + 1) + "|"]
    for loss in losses:
        cells = []
        for of in tables.values():
            one = of.get(loss)
            if one is None:
                cells.append("–")
                continue
            mean = f"{one.mean:.{digits}f}"
            if one.difference or one.error:
                mean += f" ({one.difference:+.{digits}f} ± {one.error:.{digits}f})"
            cells.append(f"{mean} [{one.seeds}]")
        lines.append(f"| {loss} | " + " | ".join(cells) + " |")
    return lines


def worst(tables: dict[str, dict[str, Compared]], sizes: dict[str, int]) -> list[str]:
    """Returns, for each loss, its largest excess over the best loss of a set.

    In nats a dimension, and in errors of its difference to the reference (or, for the reference,
    of the best loss's).
    """
    lines = ["| loss | worst excess, nats/dim | on | in errors | on | sets |", "|---" * 6 + "|"]
    for loss in LOSSES:
        excess, errors = {}, {}
        for case, of in tables.items():
            if loss not in of:
                continue
            best = min(of.values(), key=lambda one: one.difference)
            value = of[loss].difference - best.difference
            excess[case] = value * (math.log(2) if case in BITS else 1 / sizes[case])
            errors[case] = value and value / max(of[loss].error, best.error)
        if excess:
            one, other = (max(by, key=by.__getitem__) for by in (excess, errors))
            cells = f"{excess[one]:.3f} | {one} | {errors[other]:.1f} | {other} | {len(excess)}"
            lines.append(f"| {loss} | {cells} |")
    return lines


def report(runs: Path, out: Path, reference: str) -> None:
    records = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    order = list(cases(None))
    records.sort(key=lambda one: order.index(one["case"]))
    usual = [one for one in records if one["parametrisation"] == "preconditioned"]
    sizes = {one["case"]: one["size"] for one in records}
    lines, result = [], {"reference": reference, "torch": torch.__version__, "tables": {}}
    for score in ("likelihood", "bound"):
        tables = compared(usual, score, reference)
        lines += [f"## {score}", "", *table(tables), "", *worst(tables, sizes), ""]
        result["tables"][score] = {
            case: {loss: vars(one) for loss, one in of.items()} for case, of in tables.items()
        }
    others = [one for one in records if one["parametrisation"] != "preconditioned"]
    if others:
        lines += ["## parametrisations", "", "| set | parametrisation | loss | seed | mean |"]
        lines += ["|---|---|---|---|---|"]
    for one in others:
        mean = sum(one["values"]["likelihood"]) / len(one["values"]["likelihood"])
        names = " | ".join(str(one[k]) for k in ("case", "parametrisation", "loss", "seed"))
        lines.append(f"| {names} | {mean:.3f} |")
        result.setdefault("parametrisations", []).append(
            {**{k: one[k] for k in ("case", "parametrisation", "loss", "seed")}, "mean": mean}
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", default="moons,ring,cancer,crescents 2,crescents 5,digits")
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--parametrisation", default="preconditioned", choices=PARAMETRISATIONS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=float, default=1.0, help="a factor of each set's own")
    parser.add_argument("--root", help="the folder of Fashion-MNIST")
    parser.add_argument("--runs", type=Path, default=Path("runs/training_defaults"))
    parser.add_argument("--out", type=Path, default=Path("experiments/training_defaults"))
    parser.add_argument("--reference", default="edm -1.2 1.2", help="what the others differ from")
    parser.add_argument("--report", action="store_true", help="only make the tables")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.report:
        return report(given.runs, given.out, given.reference)
    every = cases(given.root)
    given.runs.mkdir(parents=True, exist_ok=True)
    losses = given.losses.split(",")
    for seed in map(int, given.seeds.split(",")):
        for case in given.sets.split(","):
            for loss in losses:
                job = Job(case, loss, seed, given.parametrisation, given.steps)
                path = given.runs / f"{job.name}.json"
                if path.exists():
                    continue
                record = job.run(every[case])
                path.write_text(json.dumps(record))
                means = {k: round(sum(v) / len(v), 4) for k, v in record["values"].items()}
                print(f"{job.name}: {means}, {record['seconds']} s", flush=True)
    report(given.runs, given.out, given.reference)


if __name__ == "__main__":
    main()
