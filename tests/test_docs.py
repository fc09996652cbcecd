"""What the pages of docs/ say works: the program of each page runs, and so do its commands."""

import functools
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import scoresde
import scoresde.nn as nn_room
from scoresde import codec, fit, loss, sample, times
from scoresde.data import Dataset
from scoresde.likelihood import GenerativeClassifier
from scoresde.metrics import nats
from scoresde.nn import MLP
from scoresde.recipe import describable
from scoresde.train import Checkpoint, Training
from tests.test_run import ROOT, TINY, program

DATA = (ROOT / "docs/guide/data.md").read_text(encoding="utf-8")
CLASSIFY = (ROOT / "docs/classify.md").read_text(encoding="utf-8")
GUIDANCE = (ROOT / "docs/guidance.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs/guide/extending.md").read_text(encoding="utf-8")
BRIDGES = (ROOT / "docs/bridges.md").read_text(encoding="utf-8")


def blocks(text, language):
    """The blocks of a language; those of Python may be cells of a notebook."""
    opening = r"(?:python|\{code-cell\} ipython3)" if language == "python" else language
    return re.findall(rf"```{opening}\n(.*?)```", text, re.DOTALL)


def names():
    """What the examples of the page import, in one place."""
    found = {"torch": torch, "nn": nn, "MLP": MLP, "dataclass": dataclass, "pairwise": pairwise}
    found |= {"Sequence": Sequence, "Dataset": Dataset, "nats": nats}
    found |= {"describable": describable}
    for module in (codec, loss, sample, times, scoresde):
        found |= {name: getattr(module, name) for name in module.__all__}
    return found


def test_the_examples_of_extending_run_in_their_order(monkeypatch):
    module = ModuleType("extending_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclass looks
    module.__dict__.update(names() | {"fit": functools.partial(fit, progress=False)})
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


def test_the_programs_of_the_page_on_data_run(tmp_path, monkeypatch):
    """Samples and densities have the law of the data, within their Monte-Carlo errors."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {"fit": functools.partial(fit, progress=False)}
    space = {**names(), **vars(nn_room), **vars(scoresde.data), "load": scoresde.load, **found}
    module = ModuleType("data_page")
    module.__dict__.update(space)
    for part in blocks(DATA, "python"):
        exec(part, module.__dict__)
    space = module.__dict__
    scale = torch.tensor([1.0, 2e4])
    # 600 updates leave the mean and the std within a tenth of the std, besides 4 / sqrt(500).
    off = (space["samples"].mean(0) - torch.tensor([0.0, 5e4])) / scale
    assert float(off.abs().max()) < 0.28
    assert float((space["samples"].std(0) / scale - 1).abs().max()) < 0.25
    entropy = 1 + math.log(2 * math.pi) + math.log(2e4)
    assert float(space["cost"].mean()) == pytest.approx(entropy, abs=0.4)
    # The posterior is N(0.8, 0.2), whatever is seen.
    assert float(space["drawn"].x.mean()) == pytest.approx(0.8, abs=0.15)
    assert float(space["drawn"].x.std()) == pytest.approx(math.sqrt(0.2), abs=0.1)
    # Without what is seen it is the prior, N(0, 1).
    assert float(space["prior"].x.mean()) == pytest.approx(0.0, abs=0.2)
    assert float(space["prior"].x.std()) == pytest.approx(1.0, abs=0.15)
    height = space["moons"].decode(space["upper"].x)[:, 1]
    assert float(height.mean()) == pytest.approx(2 / math.pi, abs=0.1)
    assert space["raw"].shape == (4, 2)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_the_page_on_data_run(tmp_path):
    lines = blocks(DATA, "sh")[1].splitlines()
    first, *others = (shlex.split(line)[3:] for line in lines)
    program(*first, *TINY, "hydra.run.dir=RUN", cwd=tmp_path)
    for words in others:
        quick = ["sampler.rtol=0.1"] if "task=sample" in words else ["examples=4"]
        program(*words, *quick, "progress=false", "batch_size=4", cwd=tmp_path)


def test_the_program_of_the_page_on_classes_runs():
    space = {**names(), "GenerativeClassifier": GenerativeClassifier}
    for part in blocks(CLASSIFY, "python"):
        exec(part, space)
    # Diagonal Jacobians in one class: no probe noise, but the prior's mismatch.
    assert float(space["error"]) < 0.1
    assert float(space["sure"]) > 0.8


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_the_page_on_classes_run(tmp_path):
    y = torch.arange(60) % 3
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) + y[:, None]
    np.savez(tmp_path / "table.npz", x=x.numpy(), y=y.numpy())
    np.save(tmp_path / "new.npy", x[:5].numpy())
    groups = blocks(CLASSIFY, "sh")
    assert len(groups) == 2
    for run, text in zip(("DIGITS", "TABLE"), groups, strict=True):
        first, *others = (shlex.split(line)[3:] for line in text.splitlines())
        program(*first, *TINY, f"hydra.run.dir={run}", cwd=tmp_path)
        for words in others:
            words = [word.replace("checkpoint=RUN", f"checkpoint={run}") for word in words]
            quick = ("examples=3", "batch_size=3", "progress=false", "baselines=false")
            kept = [word for word in words if not word.startswith("examples=")]
            program(*kept, *quick, cwd=tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_extending_run(tmp_path):
    lines = blocks(EXTENDING, "sh")[0].splitlines()
    train, draw = (shlex.split(line)[3:] for line in lines)
    program(*train, *TINY, "data.count=400", "hydra.run.dir=RUN", cwd=tmp_path)
    program(*draw, "count=4", "progress=false", cwd=tmp_path)


def test_the_program_of_the_page_on_guidance_runs():
    module = ModuleType("guidance_page")
    module.__dict__["torch"] = torch
    for part in blocks(GUIDANCE, "python"):
        exec(part, module.__dict__)
    nfe = module.__dict__["samples"].nfe.tolist()
    assert nfe[3] == 20
    assert 20 < nfe[0] == nfe[1] == nfe[2] < 40


def learn_none(run):
    """Has a network of two updates answer something without a class, as if it had been trained."""
    for name in ("checkpoint.pt", *(p.relative_to(run) for p in run.glob("snapshots/*.pt"))):
        checkpoint = Checkpoint.load(run / name)
        for weights in (checkpoint.model, checkpoint.ema):
            for key in (key for key in weights if key.endswith("classes.weight")):
                weights[key][-1] = 0.01
        checkpoint.save(run / name)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_the_page_on_guidance_run(tmp_path):
    lines = filter(None, "\n".join(blocks(GUIDANCE, "sh")).splitlines())
    train, *draw, classify, last = (shlex.split(line)[3:] for line in lines)
    known = {f"train.{field.name}" for field in fields(Training)}
    train = [w for w in train if not w.startswith("train.") or w.partition("=")[0] in known]
    small = ["network.width=8", "network.blocks=1"]
    program(*train, *TINY, *small, "train.steps=8", "hydra.run.dir=RUN", cwd=tmp_path)
    learn_none(tmp_path / "RUN")
    program(*classify, *TINY, *small, "hydra.run.dir=CLASSIFIER", cwd=tmp_path)
    for i, words in enumerate((*draw, last)):
        quick = ["sampler=ddim", "sampler.steps=2", "count=3", "progress=false", "device=cpu"]
        sweep = "--multirun" in words
        place = f"hydra.{'sweep' if sweep else 'run'}.dir=out{i}"
        said = program(*words, *quick, place, cwd=tmp_path).stdout
        one = tmp_path / f"out{i}" / ("3" if sweep else "")
        with np.load(one / "samples.npz") as file:
            inside = "guidance.interval=[0.2,5]" in words  # where one of the two steps is
            assert file["nfe"].tolist() == [3 if inside else 4] * 3
        guidance = json.loads((one / "guidance.json").read_text())
        assert "scoresde.guidance." in str(guidance)
        if sweep:
            assert all(str(scale) in said for scale in (0, 1, 2, 4))
            with np.load(tmp_path / f"out{i}/1/samples.npz") as file:
                assert file["nfe"].tolist() == [2] * 3


def test_the_programs_of_the_page_on_bridges_run(monkeypatch):
    """Means and spreads of the exact law, within what 500 updates of a small network leave."""
    torch.manual_seed(0)
    monkeypatch.setattr(scoresde, "fit", functools.partial(fit, progress=False))
    space = {}
    for part in blocks(BRIDGES, "python"):
        exec(part, space)
    mean, std = 0.8 / 0.89, math.sqrt(1 - 0.64 / 0.89)
    assert float(space["best"].mean()) == pytest.approx(mean, abs=0.1)
    assert float(space["best"].std()) < 0.1
    for name, off in (("draws", 0.12), ("right", 4 / math.sqrt(2000))):
        found = space[name]
        assert float(found.mean()) == pytest.approx(mean, abs=off)
        assert float(found.std()) == pytest.approx(std, abs=off)
    assert space["errors"][1] < 0.5 * space["errors"][0]
    assert space["images"].shape == (64, 1, 8, 8)
    # Uniform levels cost log 17 each.
    assert float(space["bounds"].mean()) > -64 * math.log(17)
    for name in ("ode", "sde"):
        assert float(space[name].mean()) == pytest.approx(0, abs=0.15)
        assert float(space[name].std()) == pytest.approx(1, abs=0.15)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_the_page_on_bridges_run(tmp_path):
    write_images(tmp_path)
    lines = list(filter(None, "\n".join(blocks(BRIDGES, "sh")).splitlines()))
    assert len(lines) == 11
    for line in lines:
        words = shlex.split(line)[3:]
        if "task=restore" in words:
            quick = ["steps=1", "draws=2", "examples=2", "progress=false"]
            words = [word for word in words if not word.startswith(("steps=", "draws="))]
        elif any(word.startswith("task=") for word in words):
            own = {"sample": ["count=2"], "likelihood": ["examples=2", "draws=2"]}
            task = next(w for w in words if w.startswith("task=")).removeprefix("task=")
            quick = [*own.get(task, ["count=8", "train.steps=2"]), "progress=false"]
            words = [word for word in words if not word.startswith(("draws=", "train.steps"))]
        else:
            recipe = words[0].partition("=")[2]
            quick = [*TINY, *(["steps=2"] if recipe == "digits_indi" else [])]
            quick += ["data.count=400"] if recipe == "moons_flow" else []
            if recipe == "digits_latent":
                quick = [w for w in quick if not w.startswith("likelihood.")]
        program(*words, *quick, cwd=tmp_path)


def write_images(folder):
    for name in ("blurred", "sharp"):
        (folder / name).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / "one.png")
