"""Bridges from the command line: training on pairs, restoring files, the report, refusals."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import load
from scoresde.codec import Affine
from scoresde.metrics import psnr, sliced_wasserstein
from scoresde.model import BridgeModel, GaussianBridge
from scoresde.recipe import build
from scoresde.sample import Restore
from scoresde.sde import Brownian, InDI
from scoresde.tasks.bridging import BridgeJob, restore_pairs, tradeoff
from scoresde.tasks.parts import Parts
from tests.test_run import TINY, program, refused

FAST = ("task=restore", "checkpoint=run", "steps=2", "progress=false")


def table(sees=True, count=400):
    """Exact pairs of two features in units of their own."""
    joint = torch.eye(4, dtype=torch.float64)
    joint[0, 2] = joint[2, 0] = 0.9
    joint[1, 3] = joint[3, 1] = 0.5
    model = GaussianBridge(torch.zeros(2, 2).double(), joint, InDI(Brownian(0.5)), sees)
    codec = Affine((2,), shift=[2000.0, -3.0], width=[100.0, 0.01], dtype="float64")
    x, y = model.sample(count, seed=0)
    return model, codec, x, y


def test_draws_have_the_posterior_of_raw_units(tmp_path):
    """Mean and spread in the user's units: four standard errors, and 3 % of the steps."""
    model, codec, _, y = table()
    job = BridgeJob(model, Restore(60), y[:1], codec, draws=3000)
    parts = Parts(tmp_path / "parts").claim({"what": "a test"})
    results = restore_pairs(job, tmp_path, parts, progress=False)
    assert (results["examples"], results["draws"], results["nfe"]) == (1, 3000, 60)
    with np.load(tmp_path / "restored.npz") as file:
        x = torch.from_numpy(file["x"])
        torch.testing.assert_close(torch.from_numpy(file["y"]), codec.decode(y[:1]))
    mean, covariance = model.posterior(y[:1])
    std = covariance.diagonal().sqrt() * torch.tensor([100.0, 0.01])
    off = (x.mean(0) - codec.decode(mean)[0]) / std
    assert float(off.abs().max()) < 4 / 3000**0.5
    assert float((x.std(0) / std - 1).abs().max()) < 4 / 6000**0.5 + 0.03


def test_few_steps_are_near_the_truth_and_many_near_the_law():
    """By closed form: one step leaves the conditional variance, many twice as much."""
    model, codec, x, y = table(count=2000)
    rows = tradeoff(BridgeJob(model, Restore(), y, codec), codec.decode(x), (1, 40))
    assert [row["steps"] for row in rows] == [0, 1, 40]
    left = [1 - 0.81, 1 - 0.25]
    assert rows[1]["rmse"] == pytest.approx(math.sqrt(sum(left) / 2), rel=0.06)
    assert rows[2]["rmse"] == pytest.approx(math.sqrt(sum(left)), rel=0.06)
    assert rows[2]["distance"] < 0.3 * rows[1]["distance"]
    found = Restore(1)(model, source=y, seed=0).x
    assert rows[1]["distance"] == pytest.approx(sliced_wasserstein(found, x), abs=0.02)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A training of a few updates: what is tested is where numbers go."""
    folder = tmp_path_factory.mktemp("bridge")
    program("+experiment=digits_indi", *TINY, "steps=2", "hydra.run.dir=run", cwd=folder)
    return folder


def test_a_training_reports_restored_examples(digits):
    run = digits / "run"
    results = json.loads((run / "result.json").read_text())
    rows = json.loads((run / "tradeoff.json").read_text())
    assert [row["steps"] for row in rows] == [0, 1, 2]
    assert results["nfe"] == 2
    assert math.isfinite(results["psnr_mean"])
    for name in ("report.html", "restored.png", "tradeoff.png", "loss.png"):
        assert (run / name).exists()
    loaded = load(run)
    assert isinstance(loaded.model, BridgeModel)
    assert loaded.model.process == InDI(Brownian(0.3))
    assert loaded.model.sees_source
    assert build(loaded.recipe["data"]).name == "digits by Blur"


def test_held_out_pairs_are_restored(digits):
    program(*FAST, "examples=3", "draws=2", "images=true", "hydra.run.dir=a", cwd=digits)
    with np.load(digits / "a/restored.npz") as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    run = load(digits / "run")
    data = build(run.recipe["data"])
    near = (data.codec.decode(data.conditions_of("test")["source"], rounded=False) - y[0]).abs()
    row = int(near.flatten(1).amax(1).argmin())
    assert float(near[row].max()) < 1e-5
    source = data.conditions_of("test", torch.tensor([row] * 2))["source"]
    again = Restore(2)(run.model, source=source, seed=0, seeds=range(2)).x
    assert torch.equal(run.codec.decode(again), x[:2])
    pictures = {path.name for path in (digits / "a/images").iterdir()}
    kinds = ("draw0", "draw1", "mean", "spread", "observed")
    assert pictures == {f"{i:08d}_{kind}.png" for i in range(3) for kind in kinds}


def test_a_folder_of_sources_is_restored_next_to_its_truth(digits):
    generator = np.random.default_rng(0)
    for name in ("blurred", "sharp"):
        (digits / name).mkdir()
        for i in range(2):
            pixels = generator.integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(digits / name / f"{i}.png")
    words = ("source=blurred", "draws=2", "noise=0.0")
    program(*FAST, *words, "truth=sharp", "hydra.run.dir=b", cwd=digits)
    results = json.loads((digits / "b/result.json").read_text())
    with np.load(digits / "b/restored.npz") as file:
        x = torch.from_numpy(file["x"])
    assert torch.equal(x[::2], x[1::2])  # without noise both draws are the same
    pixels = np.asarray(Image.open(digits / "sharp/0.png"))
    truth = torch.from_numpy(np.round(pixels / 255 * 16))[None, None]
    own = float(psnr(x[:1], truth, 16.0))
    rows = json.loads((digits / "b/tradeoff.json").read_text())
    assert [row["steps"] for row in rows] == [0, 1, 2]
    assert abs(own - results["psnr_draw"]) < 3
    program(*FAST, *words, "hydra.run.dir=c", cwd=digits)
    assert not (digits / "c/tradeoff.json").exists()


def test_measured_numbers_keep_their_fractions(digits):
    """Floats are raw values as they are; a whole number of a picture stands for its middle."""
    run = load(digits / "run")
    np.save(digits / "y.npy", np.full((1, 8, 8), 5.25, np.float32))
    program(*FAST, "source=y.npy", "draws=1", "hydra.run.dir=d", cwd=digits)
    with np.load(digits / "d/restored.npz") as file:
        y, x = torch.from_numpy(file["y"]), torch.from_numpy(file["x"])
    torch.testing.assert_close(y, torch.full((1, 1, 8, 8), 5.25))
    again = Restore(2)(run.model, source=torch.full((1, 1, 8, 8), 5.25 / 8.5 - 1), seed=0).x
    assert torch.equal(run.codec.decode(again), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("operator=hole",), "operator"),
        (("sampler=ddim",), "sampler"),
        (("std=0.5",), "std"),
        (("steps=0",), "steps.*0"),
        (("noise=2.0",), r"noise.*2\.0"),
        (("truth=y.npy",), "truth.*source"),
        (("source=nowhere.npy",), r"nowhere\.npy"),
        (("source=small.npy",), r"8, 8.*\(2, 1, 5, 5\)"),
    ],
)
def test_what_cannot_be_restored_is_one_sentence(digits, arguments, message):
    np.save(digits / "small.npy", np.zeros((2, 1, 5, 5), np.float32))
    said = refused(
        *[w for w in FAST if w != "steps=2" or "steps" not in str(arguments)],
        *arguments,
        "examples=2",
        "draws=1",
        cwd=digits,
    )
    assert re.search(message, said)


@pytest.mark.parametrize("task", ["sample", "encode", "interpolate", "likelihood", "reflow"])
def test_a_bridge_has_no_other_task(digits, task):
    said = refused(f"task={task}", "checkpoint=run", "progress=false", cwd=digits)
    assert re.search(f"task={task}.*run.*task=restore", said)


def test_a_bridge_is_not_trained_without_sources_nor_other_models_with_its_options(tmp_path):
    said = refused("+experiment=digits_indi", *TINY, "data=digits", cwd=tmp_path)
    assert re.search("data.*digits", said)
    said = refused("+experiment=digits_indi", *TINY, "train.inspect_every=1", cwd=tmp_path)
    assert "inspect_every" in said
    assert re.search("steps.*3", refused(*TINY, "steps=3", cwd=tmp_path))
