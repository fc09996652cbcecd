"""What the pages of docs/ say works: the program of each page runs, and so do its commands."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import nn

import scoresde
from scoresde import codec, loss, sample, times
from scoresde.data import Dataset
from scoresde.metrics import nats
from scoresde.nn import MLP
from tests.test_run import ROOT, TINY, program

EXTENDING = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def names():
    """What the examples of the page import, in one place."""
    found = {"torch": torch, "nn": nn, "MLP": MLP, "dataclass": dataclass, "pairwise": pairwise}
    found |= {"Sequence": Sequence, "Dataset": Dataset, "nats": nats}
    for module in (codec, loss, sample, times, scoresde):
        found |= {name: getattr(module, name) for name in module.__all__}
    return found


def test_the_examples_of_extending_run_in_their_order(monkeypatch):
    module = ModuleType("extending_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclass looks
    module.__dict__.update(names())
    parts = blocks(EXTENDING, "python")
    for part in parts:
        exec(part, module.__dict__)
        if "LearnedSNR" in part:
            assert module.__dict__["model"].sde.width.grad.isfinite()
    space = module.__dict__
    assert len(parts) >= 8
    assert float((space["filled"][:, 0] - 0.7).abs().max()) < 1e-6
    # The other feature keeps its law: the mean of 100 samples within four standard errors.
    assert abs(float(space["filled"][:, 1].mean()) - 1.0) < 4 * 0.5 / 10
    incomes = torch.distributions.LogNormal(0.0, 1.0).log_prob(space["raw"]).sum(1)
    torch.testing.assert_close(space["loss"], -incomes, atol=2e-3, rtol=0, check_dtype=False)
    assert space["samples"].x.std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.3)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_extending_run(tmp_path):
    lines = "\n".join(blocks(EXTENDING, "sh")).splitlines()
    train, draw = (shlex.split(line)[3:] for line in lines)
    program(*train, *TINY, "data.count=400", "hydra.run.dir=RUN", cwd=tmp_path)
    program(*draw, "count=4", "progress=false", cwd=tmp_path)
