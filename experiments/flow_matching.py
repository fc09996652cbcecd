r"""Compares densities of times and couplings of flow matching by the models that they train.

    python experiments/flow_matching.py [--sets moons,digits] [--seeds 0,1,2] \
        [--losses "uniform;cosmap"]

Every loss trains the same network from the same start on the same batches with the same noise. The
score is the negative log-density of the same test examples, with the same probes: in nats per
example less the exact one on two moons (exact trace), in bits/dim on the digits (two probes). A
loss is compared with uniform times on the same examples and seeds; the standard error of the
difference adds that over examples and that over seeds in quadrature.

Losses are separated by semicolons. A run is kept when it ends (``--runs``) and not repeated.
Writes table.md.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from scoresde import (
    FlowMatching,
    Likelihood,
    Preconditioned,
    RectifiedFlow,
    ScoreModel,
    VelocityParametrisation,
    fit,
)
from scoresde.data import digits, two_moons
from scoresde.loss import DenoisingScoreMatching, Loss, OptimalTransport
from scoresde.nn import MLP, UNet
from scoresde.streams import Streams
from scoresde.times import (
    Corrected,
    CosMapTimes,
    LogitNormalTimes,
    LogNormalTimes,
    LowDiscrepancy,
    ModeTimes,
    UShapedTimes,
)

LOSSES: dict[str, Loss] = {
    "uniform": FlowMatching(),
    "uniform spread": FlowMatching(LowDiscrepancy()),
    "logit-normal 0 1": FlowMatching(LogitNormalTimes()),
    "logit-normal -1 1": FlowMatching(LogitNormalTimes(-1.0)),
    "mode 1.29": FlowMatching(ModeTimes()),
    "mode 1.29 corrected": FlowMatching(Corrected(ModeTimes())),
    "cosmap": FlowMatching(CosMapTimes()),
    "u-shaped 4": FlowMatching(UShapedTimes()),
    "log-normal tail": FlowMatching(LogNormalTimes(tail=0.1)),
    "optimal transport": FlowMatching(coupling=OptimalTransport()),
    "preconditioned, edm": DenoisingScoreMatching(),
}
SETS = {
    "moons": (two_moons, lambda: MLP(2, width=128, depth=4), 1500, 256, "exact", 1000),
    "digits": (digits, lambda: UNet((1, 8, 8), width=16), 900, 64, 2, 180),
}


def scores(name: str, loss_name: str, seed: int) -> torch.Tensor:
    """Trains a model and returns the score of each test example."""
    make, network, steps, size, probes, count = SETS[name]
    data, loss = make(), LOSSES[loss_name]
    torch.manual_seed(seed)
    kind = VelocityParametrisation if isinstance(loss, FlowMatching) else Preconditioned
    std = round(data.sigma_data, 4)
    model = ScoreModel(network(), RectifiedFlow(), kind(std))
    model = fit(model, data, steps, batch_size=size, loss=loss, seed=seed, progress=False)
    raw = data.test[:count]
    x = data.encode(raw, Streams.of(0, batch=len(raw)))
    log_prob = Likelihood(probes)(model, x, seed=0).log_prob.double() + data.log_det(raw, x)
    if data.log_prob is not None:
        return data.log_prob(raw) - log_prob
    return -log_prob / math.log(2) / x[0].numel()


def row(name: str, loss: str, kept: dict[str, np.ndarray]) -> str:
    """Returns a loss's mean score, and its difference to that of uniform times."""
    ours, plain = kept[loss], kept["uniform"]
    seeds = min(len(ours), len(plain))
    apart = ours[:seeds] - plain[:seeds]
    over_examples = apart.mean(0).std(ddof=1) / math.sqrt(apart.shape[1])
    over_seeds = apart.mean(1).std(ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0
    error = math.hypot(over_examples, over_seeds)
    text = "–" if loss == "uniform" else f"{apart.mean():+.4f} ± {error:.4f}"
    return f"| {name} | {loss} | {ours.mean():.4f} | {text} | {len(ours)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", default="moons,digits")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--losses", default=";".join(LOSSES))
    parser.add_argument("--runs", type=Path, default=Path("runs/flow_matching"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.runs.mkdir(parents=True, exist_ok=True)
    table = [
        "| set | times, coupling | score | against uniform | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in given.sets.split(","):
        for seed in map(int, given.seeds.split(",")):
            for loss in LOSSES:
                file = given.runs / f"{name}-{loss.replace(' ', '_').replace(',', '')}-{seed}.npy"
                if loss in given.losses.split(";") and not file.exists():
                    np.save(file, scores(name, loss, seed).numpy())
                    print(name, loss, seed, np.load(file).mean(), flush=True)
        kept = {}
        for loss in LOSSES:
            found = f"{name}-{loss.replace(' ', '_').replace(',', '')}-*.npy"
            files = sorted(given.runs.glob(found))
            if files:
                kept[loss] = np.stack([np.load(file) for file in files])
        table += [row(name, loss, kept) for loss in kept]
    text = "\n".join(table) + "\n"
    (given.runs / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
