"""Foreign checkpoints on the command line: imported once, every task works on them."""

import json

import pytest
import torch

from scoresde.interop.score_sde import load_checkpoint
from scoresde.train import Checkpoint
from tests.score_sde_files import config, content
from tests.test_run import program, refused

SHORT = ["progress=false", "device=cpu", "threads=1"]


@pytest.fixture
def foreign(tmp_path):
    """A small checkpoint of the reference with its configuration."""
    values = config()
    torch.save(content(values), tmp_path / "checkpoint_8.pth")
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def imported(folder, *more):
    program(
        *("task=import", "checkpoint=checkpoint_8.pth", "reference=config.json"),
        *("hydra.run.dir=run", *SHORT, *more),
        cwd=folder,
    )
    return Checkpoint.load(folder / "run")


@pytest.mark.parametrize("average", [True, False])
def test_the_imported_model_is_the_loaded_one(foreign, average):
    model = imported(foreign).build_model(average=average)
    truth = load_checkpoint(foreign / "checkpoint_8.pth", config(), ema=average)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        assert torch.equal(model.score(x, t), truth.score(x, t))


def test_an_imported_model_is_sampled(foreign):
    imported(foreign)
    program(
        *("task=sample", "checkpoint=run", "sampler=reference", "sampler.steps=24", "count=2"),
        *("hydra.run.dir=samples", *SHORT),
        cwd=foreign,
    )
    assert (foreign / "samples/samples.png").stat().st_size > 0


def test_an_imported_model_is_evaluated_on_data_that_are_given(foreign):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    np.save(foreign / "images.npy", images)
    imported(foreign, "data=array", "data.path=images.npy")
    program(
        *("task=likelihood", "checkpoint=run", "likelihood.rtol=0.1", "likelihood.atol=0.1"),
        *("likelihood.probes=1", "examples=1", "hydra.run.dir=likelihood", *SHORT),
        cwd=foreign,
    )
    result = json.loads((foreign / "likelihood/likelihood.json").read_text())
    assert (result["unit"], result["count"]) == ("bits/dim", 1)


def test_without_data_the_likelihood_asks_for_them(foreign):
    imported(foreign)
    answer = refused("task=likelihood", "checkpoint=run", *SHORT, cwd=foreign)
    assert "data=folder" in answer


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["checkpoint=checkpoint_8.pth"], "reference="),
        ([], "checkpoint="),
        (["checkpoint=none.pth", "reference=config.json"], "none.pth"),
        (["checkpoint=checkpoint_8.pth", "reference=vp/nothing"], "vp/nothing"),
        (["checkpoint=checkpoint_8.pth", "reference=config.json", "sde=ve"], "sde has no effect"),
        (["checkpoint=.", "reference=config.json"], "reference"),
        (["checkpoint=."], "diffusion_pytorch_model"),
    ],
)
def test_what_cannot_be_imported_is_a_sentence(foreign, arguments, word):
    assert word in refused("task=import", *arguments, *SHORT, cwd=foreign)


def test_a_configuration_without_import_has_no_effect(foreign):
    answer = refused("task=sample", "checkpoint=run", "reference=config.json", cwd=foreign)
    assert "no option reference" in answer
