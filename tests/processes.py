"""Run by torchrun in tests/test_distributed.py: everything that several processes do together."""

import dataclasses
import functools
import os
import signal
import sys
from pathlib import Path

import torch

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    DiscreteVP,
    LearnedSchedule,
    Preconditioned,
    ScoreModel,
)
from scoresde.data import two_moons
from scoresde.loss import BoundLoss, ImportanceSampled, Loss, UncertaintyWeighted, VariationalLoss
from scoresde.nn import MLP
from scoresde.sde import ListedBetas
from scoresde.times import LowDiscrepancy
from scoresde.train import Replicated, Sharded, Training, TrainingStopped, process_group, train
from tests.models import LearnedParametrisation, Mean

TRAININGS = {
    "ddp_64": (Replicated(), torch.float64, {}),
    "ddp_32": (Replicated(), torch.float32, {}),
    "ddp_64_accumulated": (Replicated(), torch.float64, {"accumulate": 3}),
    "fsdp_64": (Sharded(block=500), torch.float64, {}),
    "fsdp_32": (Sharded(block=500), torch.float32, {"snapshots": 0}),
    "fsdp_64_accumulated": (Sharded(block=500), torch.float64, {"accumulate": 3}),
}
# With a learned schedule, and of two networks, with a learned parametrisation besides.
OTHERS = {
    "ddp_64_learned": (Replicated(), torch.float64, {}),
    "ddp_64_pair": (Replicated(unused=True), torch.float64, {"accumulate": 2}),
    "fsdp_64_learned": (Sharded(block=500), torch.float64, {}),
    "fsdp_32_learned": (Sharded(block=500), torch.float32, {"snapshots": 0}),
    "fsdp_64_pair": (Sharded(block=500), torch.float64, {"accumulate": 2}),
    "ddp_64_variational": (Replicated(), torch.float64, {"accumulate": 2}),
}
# Conditions are left out at random.
TOLD = {
    "ddp_64_told": (Replicated(), torch.float64, {"condition_dropout": 0.5, "accumulate": 2}),
    "fsdp_64_told": (Sharded(block=500), torch.float64, {"condition_dropout": 0.5}),
}
# The loss has weights, or a history.
LEARNING = {
    "ddp_64_uncertain": (Replicated(), torch.float64, {"accumulate": 2}),
    "fsdp_64_uncertain": (Sharded(block=500), torch.float64, {}),
    "ddp_64_history": (Replicated(), torch.float64, {"accumulate": 3}),
    "fsdp_64_history": (Sharded(block=500), torch.float64, {}),
}
TRAININGS |= OTHERS | TOLD | LEARNING
STOPPED = (
    *("ddp_64", "fsdp_64", "ddp_64_learned", "fsdp_64_learned", "fsdp_64_pair"),
    *("ddp_64_history", "fsdp_64_uncertain"),
)
LEVELS = 5


def model_of(name):
    torch.manual_seed(0)
    if name in TOLD:
        network = MLP(2, width=32, depth=2, classes=2, conditions={"context": 2})
        return ScoreModel(network, VPSDE(), Preconditioned(1.0))
    learned = LearnedSchedule() if name in OTHERS else VPSDE()
    if name.endswith("history"):
        learned = DiscreteVP(ListedBetas([0.05, 0.1, 0.2, 0.4, 0.8][:LEVELS]))
    model = ScoreModel(MLP(2, width=32, depth=2), learned, Preconditioned(1.0))
    if name.endswith("pair"):
        other = ScoreModel(MLP(2, width=24, depth=1), model.sde, LearnedParametrisation())
        return Mean(model, other)
    return model


def loss_of(name):
    if name.endswith("uncertain"):
        return UncertaintyWeighted(DenoisingScoreMatching(times=LowDiscrepancy()), 8).double()
    if name.endswith("history"):
        return ImportanceSampled(BoundLoss(), LEVELS, history=4)
    if name.endswith("variational"):
        return VariationalLoss()
    return DenoisingScoreMatching(times=LowDiscrepancy())


def data_of(name):
    data = two_moons(count=300)
    context = [data.split(split).float() ** 2 for split in ("train", "validation", "test")]
    known = {**data.conditions, "context": context}
    return dataclasses.replace(data, conditions=known) if name in TOLD else data


class Acting(torch.nn.Module, Loss):
    """Does something at one step, in the second process if there is one; a loss around another."""

    def __init__(self, loss, step, act):
        super().__init__()
        self.loss, self.step, self.act = loss, step, act
        self.fixed, self.first_time, self.keep = loss.fixed, loss.first_time, loss.keep
        if isinstance(loss, torch.nn.Module):  # under the names of the one without this
            self.state_dict, self.load_state_dict = loss.state_dict, loss.load_state_dict

    def evaluate(self, model, x, given, **cond):
        last = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))
        seeds = given.batch.seeds
        if last and isinstance(seeds, range) and seeds.start // len(seeds) == self.step:
            self.step = None  # once, though a batch may come in parts
            self.act()
        return self.loss.evaluate(model, x, given, **cond)


def fit(path, name, act=None):
    engine, dtype, options = TRAININGS[name]
    path.mkdir(exist_ok=True, parents=True)
    model = model_of(name).to(dtype)
    options = {"save_every": 8, "validate_every": 10, "log_every": 5, "snapshots": 2, **options}
    return train(
        model,
        data_of(name),
        loss_of(name) if act is None else Acting(loss_of(name), *act),
        Training(steps=20, batch_size=31, **options),
        functools.partial(torch.optim.Adam, lr=2e-4, fused=dtype == torch.float32),
        path,
        recipe={"name": "moons"},
        progress=False,
        engine=engine,
    )


def main(folder):
    with process_group() as group:
        for name in TRAININGS:
            fit(folder / f"{name}_{group.size}", name)
        if group.size > 1:
            interrupted(folder)
            program(folder)


def interrupted(folder):
    """One process is asked to stop; all of them stop together, and go on together."""
    for name in STOPPED:
        ask = 6, lambda: signal.raise_signal(signal.SIGTERM)
        try:
            fit(folder / f"{name}_stopped", name, ask)
        except TrainingStopped as stop:
            (folder / f"{name}_stopped/stopped_{os.environ['RANK']}").write_text(str(stop.step))
        fit(folder / f"{name}_stopped", name)


def program(folder):
    """The program itself, with the folder that it chooses."""
    from scoresde.run import main as run

    (folder / "program").mkdir(exist_ok=True)
    os.chdir(folder / "program")
    small = ["examples=50", "count=4", "baselines=false", "train.steps=6", "train.log_every=2"]
    quick = ["samplers.euler_maruyama.steps=2", "samplers.predictor_corrector.steps=2"]
    quick += ["samplers.probability_flow.rtol=0.1", "samplers.probability_flow.atol=0.1"]
    quick += ["likelihood.rtol=0.1", "likelihood.atol=0.1", "likelihood.probes=1"]
    look = ["train.inspect_every=3", "inspect.examples=4", "batch_size=10", "progress=false"]
    sys.argv[1:] = ["network=mlp", *small, *quick, *look, "distributed=fsdp"]
    run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
