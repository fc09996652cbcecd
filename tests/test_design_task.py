"""task=design prints and writes a recipe, which trains; models of one noise level."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from scoresde import VESDE
from scoresde.data import digits
from scoresde.loss import NoiseDesign
from scoresde.times import LevelTimes
from tests.test_run import TINY, program, refused

ROOT = Path(__file__).parents[1]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_images_get_a_recipe_with_the_numbers_of_the_design(tmp_path):
    said = program("task=design", "data=digits", "hydra.run.dir=out", cwd=tmp_path).stdout
    found, design = result(tmp_path / "out"), NoiseDesign.of(digits())
    assert (found["levels"], found["steps"]) == (design.levels, 5)
    assert found["step_size"] == pytest.approx(design.step_size)
    assert f"{design.step_size:.3g}" in said
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        own = f"hydra.searchpath=[file://{tmp_path / 'out/conf'}]"
        config = compose("config", [own, "+experiment=designed"])
    assert instantiate(config.sde) == VESDE(0.01, design.sigma_max)
    assert instantiate(config.loss).times == LevelTimes(design.levels)
    assert instantiate(config.samplers.annealed_langevin) == design.langevin()
    assert config.network._target_.endswith("UNet")
    assert config.train.ema == 0.999


@pytest.mark.usefixtures("undrawn")
def test_its_command_trains_from_any_folder(tmp_path):
    """A table in raw units of another size, read from another folder than the recipe's."""
    table = 1e4 + 300 * np.random.default_rng(0).standard_normal((300, 3))
    (tmp_path / "a b").mkdir()
    np.save(tmp_path / "a b/table.npy", table)
    given = ["task=design", "data=array", "data.path='a b/table.npy'", "design.steps=2"]
    said = program(*given, "hydra.run.dir=my out", cwd=tmp_path).stdout
    command = next(line for line in said.splitlines() if line.startswith("Train:"))
    parts = shlex.split(command.partition(":")[2])
    assert parts[0] == "scoresde"
    (tmp_path / "elsewhere").mkdir()
    tiny = [text for text in TINY if not text.startswith("train.batch")]
    program(*parts[1:], *tiny, "hydra.run.dir=run", cwd=tmp_path / "elsewhere")
    found, design = result(tmp_path / "elsewhere/run"), result(tmp_path / "my out")
    assert found["status"] == "ok"
    assert found["nfe_annealed_langevin"] == 2 * design["levels"] + 1  # with the denoising


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["data=digits", "design.sigma_min=100"], "sigma_min"),
        (["data=digits", "design.steps=0"], "steps"),
        (["data=digits", "design=null"], "design"),
        (["data=digits", "sde=vp"], "sde"),
        (["data=array", "data.path=far.npy", "data.standardise=false"], "model units"),
        (["data=array", "data.path=none.npy"], "none.npy"),
    ],
)
def test_what_cannot_be_designed_is_a_sentence(tmp_path, options, name):
    np.save(tmp_path / "far.npy", 1e4 + np.random.default_rng(0).standard_normal((50, 2)))
    assert name in refused("task=design", *options, cwd=tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_a_model_of_one_level_is_sampled_by_langevin_and_has_no_likelihood(tmp_path):
    small = [*TINY, "data.count=400", "samplers.langevin.steps=3"]
    ran = program("+experiment=moons_explicit", *small, "hydra.run.dir=run", cwd=tmp_path)
    found = result(tmp_path / "run")
    assert "probability_flow" in ran.stdout + ran.stderr  # left out
    assert found["nfe_langevin"] == 3
    assert not {"nats", "nfe_probability_flow"} & found.keys()
    assert (tmp_path / "run/score.png").exists()
    ask = ["checkpoint=run", "count=4", "progress=false"]
    assert "sampler" in refused("task=sample", *ask, "sampler=ddim", cwd=tmp_path)
    program("task=sample", *ask, "sampler=langevin", "sampler.steps=3", cwd=tmp_path)
    assert "level" in refused("task=likelihood", "checkpoint=run", cwd=tmp_path)
    looks = ["+experiment=moons_explicit", *small, "train.inspect_every=1"]
    assert "inspect_every" in refused(*looks, cwd=tmp_path)
