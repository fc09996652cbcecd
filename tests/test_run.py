"""The program as a user starts it: every task, every recipe, and the answers to bad input."""

import csv
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class, get_object, instantiate
from omegaconf import OmegaConf

import scoresde.run
from scoresde import VPSDE, GaussianModel
from scoresde.codec import Codec
from scoresde.configuration import measured
from scoresde.data import Dataset, random_rows
from scoresde.nn import Architecture, AttentionLayout, DDPMTransition, UNet
from scoresde.sample import Sampler
from scoresde.train import Checkpoint, Tracker
from tests.small_sets import cifar_files, emnist_files, idx_files, write, write_pictures

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
TINY = [
    "train.steps=2",
    "train.batch_size=16",
    "count=4",
    "examples=8",
    "samplers.euler_maruyama.steps=2",
    "samplers.predictor_corrector.steps=2",
    "samplers.probability_flow.rtol=0.1",
    "samplers.probability_flow.atol=0.1",
    "likelihood.probes=1",
    "likelihood.rtol=0.1",
    "likelihood.atol=0.1",
    "baselines=false",
    "progress=false",
    "device=cpu",
]


def tiny(recipe: str) -> list[str]:
    """TINY, without what the likelihood of the recipe does not have."""
    if not recipe.endswith("_vdm"):
        return TINY
    return [word for word in TINY if not word.startswith("likelihood.")] + ["likelihood.draws=2"]


@dataclass
class Outcome:
    """What a run of the program printed."""

    stdout: str
    stderr: str


def program(*arguments: str, cwd: Path, code: int = 0) -> Outcome:
    """Runs the program in this process, as from a folder; checks its exit code."""
    GlobalHydra.instance().clear()
    out, err = io.StringIO(), io.StringIO()
    before = list(sys.path), sys.argv
    sys.path.append(str(ROOT / "tests/plugins"))
    sys.argv = ["scoresde", *arguments]
    left = 0
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            scoresde.run.main()
        except SystemExit as exit_:
            left = exit_.code if isinstance(exit_.code, int) else 1
        finally:
            sys.path[:], sys.argv = before
            logging.shutdown()
    assert left == code, out.getvalue() + err.getvalue()
    return Outcome(out.getvalue(), err.getvalue())


def refused(*arguments: str, cwd: Path, code: int = 2) -> str:
    """Runs the program on bad input; returns the one sentence that it answers with."""
    result = program(*arguments, cwd=cwd, code=code)
    assert "Traceback" not in result.stdout + result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images in the place of each set that is not bundled."""
    folder = tmp_path_factory.mktemp("sets")
    write(folder / "cifar", cifar_files())
    write(folder / "mnist", idx_files())
    write(folder / "fashion", idx_files())
    write(folder / "emnist", emnist_files())
    write_pictures(folder / "pictures")
    return folder


def shortened(recipe: str, sets: Path) -> list[str]:
    """What makes a recipe small enough for a test, beside TINY."""
    kind = recipe.partition("_")[0]
    if kind == "moons":
        return ["data.count=400"]
    if recipe == "digits_improved":
        return ["samplers.chain.steps=2"]
    if kind == "digits":
        return []
    options = ["examples=4", "samplers.probability_flow.rtol=0.1"]
    options += ["samplers.probability_flow.atol=0.1", "network.blocks=1"]
    options += ["network.widths=[8,8]"] if recipe.endswith("_vae") else ["network.width=8"]
    if kind in ("mnist", "fashion", "emnist"):
        data = "data.clean" if recipe == "fashion_deblur" else "data"
        options += [f"{data}.validation=4", f"{data}.verify=false"]
        return [*options, f"{data}.root={sets / kind}"]
    if kind == "cifar":
        options += [f"data.root={sets / kind}", "data.verify=false"]
        options += ["data.validation=4"] if recipe.endswith("_vae") else []
    else:
        options += [f"data.path={sets / 'pictures'}", "data.size=32", "data.crop=null"]
        options += ["data.fractions=[0.6,0.2,0.2]"]
        options += ["network.multipliers=[1,2]", "network.attention=[1]"]
    if recipe == "cifar_ddpm":
        options += ["samplers.ancestral.steps=2"]
    return options


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe for two moons, cut short."""
    folder = tmp_path_factory.mktemp("moons")
    small = [*TINY, "data.count=400", "examples=null"]
    program("+experiment=moons_vp", *small, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


# --- Recipes -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_for_two_steps(
    recipe: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    more = shortened(recipe, sets)
    if recipe.endswith("_latent"):  # which stands on an autoencoder
        small = recipe.replace("_latent", "_vae")
        program(f"+experiment={small}", *TINY, "hydra.run.dir=codec", cwd=tmp_path)
        more += ["codec=codec", "likelihood=default"]
    bundled = recipe.startswith(("digits", "moons"))
    more += ["baselines=true", "progress=true"] if bundled and recipe.endswith("_vp") else []
    program(f"+experiment={recipe}", *tiny(recipe), *more, "hydra.run.dir=run", cwd=tmp_path)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "ok"
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds_every_object(recipe: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [f"+experiment={recipe}"])
    assert config.name == recipe
    for sampler in config.samplers.values():
        assert isinstance(instantiate(sampler), Sampler)


def test_default_recipe_is_digits_vp() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config") == compose("config", ["+experiment=digits_vp"])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (
            ["data=array", "data.path='/x/My data (v2).npy'", "sde=rectified"],
            "My_data_v2_rectified_flow",
        ),
        (["data=array"], "array_vp"),
        (["data=folder", "data.path=photos", "sde=subvp"], "photos_subvp"),
        (["data=custom", "data._target_=mine.weather", "sde=ve"], "weather_ve"),
        (["data=custom"], "vp"),
        (["sde=ve"], "digits_ve"),
        (["data=array", "data.path=wine.npy", "name=mine"], "mine"),
        (["+experiment=moons_ve", "sde=vp"], "moons_ve"),
        (["~data"], "vp"),
        (["task=sample", "checkpoint=/nowhere/x.pth"], "x"),
    ],
)
def test_a_run_is_called_after_its_data_and_its_sde(overrides: list[str], name: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", overrides).name == name


def test_a_task_is_called_after_the_run_of_its_checkpoint(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rain.npy", np.random.default_rng(0).normal(size=(60, 2)))
    data = ["data=array", "data.path=rain.npy", "network=mlp", "network.width=8"]
    shown = program(*data, *TINY, cwd=tmp_path)
    (trained,) = (tmp_path / "runs/rain_vp").iterdir()
    assert "<h1>rain_vp</h1>" in (trained / "report.html").read_text()
    program("task=sample", f"checkpoint={trained}", "count=2", "progress=false", cwd=tmp_path)
    assert len(list((tmp_path / "runs/rain_vp").iterdir())) == 2
    assert "Training rain_vp: 2 steps" in shown.stdout


def test_best_weights_are_those_of_the_least_held_out_loss(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    last = Checkpoint.load(copied)
    best = replace(last, ema={k: v + 1 for k, v in last.ema.items()}, step=1)
    best.save(copied / "best.pt")
    for path in (copied, copied / "checkpoint.pt", copied / "checkpoints/00000002.pt"):
        weights = scoresde.load(path, weights="best").model.state_dict()
        assert all(torch.equal(weights[k], last.ema[k] + 1) for k in last.ema)
    program(
        "task=likelihood",
        "checkpoint=run",
        "weights=best",
        *TINY[3:4],
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    identity = json.loads((tmp_path / "out/parts/identity.json").read_text())
    assert identity["checkpoint"].startswith("step 1,")
    (copied / "best.pt").unlink()
    sentence = refused("task=sample", "checkpoint=run", "weights=best", cwd=tmp_path)
    assert re.search(r"weights=best .*best\.pt.*\brun\b", sentence)
    assert "weights must be average, raw, best" in refused(
        "task=sample", "checkpoint=run", "weights=last", cwd=tmp_path
    )


def composed_network(*overrides: str) -> str:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        section = compose("config", [*overrides, "network.shape=[1,8,8]", "network.width=8"])
    return str(instantiate(section.network, _convert_="all"))


DDPM = "{_target_:scoresde.nn.DDPMTransition}"


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        (["network.attention=[2]"], {"attention": (2,)}),
        (["+experiment=mnist_vp", "network.attention=[0]"], {"attention": (0,)}),
        (["++network.attention.heads=2"], {"attention": AttentionLayout(heads=2)}),
        (
            ["network.attention={levels:[0,2],head_width:4}"],
            {"attention": AttentionLayout((0, 2), head_width=4)},
        ),
        (
            [f"++network.architecture.transition={DDPM}"],
            {"architecture": Architecture(DDPMTransition())},
        ),
    ],
)
def test_options_of_the_unet(overrides: list[str], arguments: dict) -> None:
    network = UNet((1, 8, 8), 8, (1, 2, 2), 1, **arguments)
    assert composed_network("network=unet", *overrides) == str(network)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_in_old_words_is_built_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"attention=AttentionLayout\(heads=\.\.\.\)"):
        old = composed_network("network=ddpm", "+network.heads=2", "+network.init_scale=1.0")
    new = ["++network.attention.heads=2", "++network.architecture.init_scale=1.0"]
    assert old == composed_network("network=ddpm", *new)


# Groups that have no place of their own, and those whose options are parts of a whole.
NESTED = ("experiment", "published", "times", "grid", "tracker", "model", "__pycache__")
# Options that a file or a data set completes.
INCOMPLETE = (
    "custom",
    "array",
    "folder",
    "folder_pairs",
    "cifar10",
    "emnist",
    "mnist",
    "fashion_mnist",
    "masking",
    "missing",
)


MISSING = {"network=encoder": ["network.outputs=3"]}  # what an option leaves open


@pytest.mark.parametrize(
    "option",
    [
        f"{group.name}={path.stem}"
        for group in sorted((ROOT / "conf").iterdir())
        if group.is_dir() and group.name not in NESTED
        for path in sorted(group.glob("*.yaml"))
        if path.stem not in INCOMPLETE
    ],
)
def test_every_option_instantiates(option: str) -> None:
    group = option.partition("=")[0]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [option, *MISSING.get(option, [])])
    section = config[group]
    units = Dataset.of("any", [torch.randn(9, 1, 8, 8)] * 3)
    instantiate(measured(OmegaConf.to_container(section, resolve=True), units), _convert_="all")


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf/tracker").glob("*.yaml")))
def test_every_tracker_can_be_added_to_a_run(name: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        section = compose("config", [f"+tracker@trackers.mine={name}"]).trackers.mine
    options = {str(key): value for key, value in section.items() if key != "_target_"}
    tracker = get_class(section._target_)  # whose library need not be there
    assert issubclass(tracker, Tracker)
    signature(tracker).bind(**options)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf/sampler").glob("*.yaml")))
def test_every_sampler_of_the_configuration_samples(name: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        sampler = instantiate(compose("config", [f"sampler={name}"]).sampler, _convert_="all")
    exact = GaussianModel(torch.zeros(2), 0.5, VPSDE())
    x = sampler(exact, (256, 2), seed=0).x
    # As NCSN, Langevin steps alone leave the variance of their own size.
    assert float(x.std()) == pytest.approx(0.5, rel=0.25 if "langevin" in name else 0.12)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf/grid").glob("*.yaml")))
def test_every_grid_can_be_chosen_for_a_sampler(name: str) -> None:
    more = ["sampler.steps=2", "sampler.eps=0.1"]
    more += ["sampler.grid.times=[1,0.5,0.1]"] if name == "explicit" else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", ["sampler=ddim", f"grid@sampler.grid={name}", *more])
    sampler = instantiate(config.sampler, _convert_="all")
    assert len(sampler.times(VPSDE(), 0.1)) == 3


@pytest.mark.parametrize(
    "option",
    [
        f"{group}={path.stem}"
        for group in ("method", "operator")
        for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
    ],
)
def test_methods_and_operators_have_the_defaults_of_their_classes(option: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        section = compose("config", [option])[option.partition("=")[0]]
    plan: Any = OmegaConf.to_container(section)
    made = get_object(plan.pop("_target_"))
    plan.pop("_partial_", None)
    # A blur without std needs a kernel, which has no place in a configuration.
    required = {"std"} if option == "operator=blur" else set()
    for name, value in plan.items():
        parameter = signature(made).parameters[name]
        if parameter.default is parameter.empty or name in required:
            continue
        # The default of a field with a factory is what an instance has.
        default = getattr(made(), name) if isinstance(value, dict) else parameter.default
        assert (instantiate(value) if isinstance(value, dict) else value) == default, name


# --- Tasks ---------------------------------------------------------------------------------------


def test_training_leaves_everything(run: Path) -> None:
    for name in (
        ".hydra/config.yaml",
        "checkpoint.pt",
        "metrics.jsonl",
        "result.json",
        "report.html",
        "likelihood.json",
        "likelihood.npz",
        "loss.png",
        "comparison.png",
        "density.png",
        "paths_probability_flow.png",
        "euler_maruyama.npz",
        "predictor_corrector.npz",
        "probability_flow.npz",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())


@pytest.mark.usefixtures("undrawn")
def test_training_is_reproducible(run: Path, tmp_path: Path) -> None:
    program("+experiment=moons_vp", *TINY, "data.count=400", "hydra.run.dir=again", cwd=tmp_path)
    first, second = Checkpoint.load(run), Checkpoint.load(tmp_path / "again")
    assert first.ema.keys() == second.ema.keys()
    assert all(torch.equal(first.ema[k], second.ema[k]) for k in first.ema)


def test_sample_task_draws_from_a_checkpoint(run: Path, tmp_path: Path) -> None:
    program(
        "task=sample",
        f"checkpoint={run}",
        "sampler=euler_maruyama",
        "sampler.steps=3",
        "count=5",
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    with np.load(tmp_path / "out/samples.npz") as file:
        assert file["x"].shape == (5, 2)
        assert file["nfe"].tolist() == [3] * 5
    assert (tmp_path / "out/samples.png").exists()


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_a_few_lines_in_a_file(progress: bool, run: Path, tmp_path: Path) -> None:
    given = ["task=sample", f"checkpoint={run}", "sampler=ddim", "sampler.steps=50", "count=4"]
    said = program(*given, f"progress={str(progress).lower()}", "hydra.run.dir=out", cwd=tmp_path)
    assert said.stderr == ""
    assert said.stdout.count("sampling: ") == (5 if progress else 0)


def test_samples_do_not_depend_on_the_batch_size(run: Path, tmp_path: Path) -> None:
    def draw(name: str, batch: int) -> np.ndarray:
        program(
            "task=sample",
            f"checkpoint={run / 'checkpoint.pt'}",
            "sampler=predictor_corrector",
            "sampler.steps=3",
            "count=5",
            f"batch_size={batch}",
            "progress=false",
            f"hydra.run.dir={name}",
            cwd=tmp_path,
        )
        with np.load(tmp_path / name / "samples.npz") as file:
            return file["x"]

    np.testing.assert_allclose(draw("a", 5), draw("b", 2), atol=1e-5)


def test_samples_are_taken_on_with_and_their_way_is_kept(run: Path, tmp_path: Path) -> None:
    def draw(count: int, *more: str) -> dict:
        arguments = ["task=sample", f"checkpoint={run}", "sampler=ddim", "sampler.steps=3"]
        arguments += [f"count={count}", "batch_size=4", "progress=false", "hydra.run.dir=out"]
        program(*arguments, *more, cwd=tmp_path)
        return json.loads((tmp_path / "out/result.json").read_text())

    assert draw(6)["count"] == 6
    assert draw(9, "trajectory=3")["count"] == 9
    with np.load(tmp_path / "out/samples.npz") as file:
        assert file["x"].shape == (9, 2)
    with np.load(tmp_path / "out/trajectory.npz") as file:
        assert file["denoised"].shape == (3, 8, 2)
    said = refused(
        "task=sample",
        f"checkpoint={run}",
        "sampler=euler",
        "hydra.run.dir=out",
        "batch_size=4",
        cwd=tmp_path,
    )
    assert "holds an evaluation with sampler = DDIM(" in said


def test_data_become_latents_and_data_again(run: Path, tmp_path: Path) -> None:
    tight = ["sampler.rtol=1e-6", "sampler.atol=1e-6", "progress=false", f"checkpoint={run}"]
    program("task=encode", "examples=12", *tight, "hydra.run.dir=there", cwd=tmp_path)
    latents = "latents=there/latents.npz"
    program("task=sample", latents, *tight, "hydra.run.dir=back", cwd=tmp_path)
    with np.load(tmp_path / "back/samples.npz") as file:
        test = Checkpoint.load(run).build("data", Dataset).test
        test = test[random_rows(len(test), 12)]
        np.testing.assert_allclose(file["x"], test.numpy(), atol=1e-3)
    program("task=interpolate", latents, "points=3", *tight, "hydra.run.dir=between", cwd=tmp_path)
    with np.load(tmp_path / "between/interpolation.npz") as file:
        assert file["x"].shape == (6, 3, 2)
        np.testing.assert_allclose(file["x"][:, 0], test[::2].numpy(), atol=1e-3)
    said = refused("task=sample", latents, "count=13", *tight, cwd=tmp_path)
    assert "count" in said
    assert "got 13" in said


@pytest.mark.parametrize("guidance", ["clip", "threshold"])
def test_guidance_keeps_to_a_range(guidance: str, run: Path, tmp_path: Path) -> None:
    program(
        "task=sample",
        f"checkpoint={run}",
        "sampler=ddim",
        "sampler.steps=20",
        "sampler.final_denoise=true",
        f"guidance={guidance}",
        "guidance.low=-0.1",
        "guidance.high=0.1",
        "count=8",
        "precision=bf16",
        "channels_last=false",
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    codec = Checkpoint.load(run).build("units", Codec)
    with np.load(tmp_path / "out/samples.npz") as file:
        x = codec.encode(torch.from_numpy(file["x"]))
    assert float(x.abs().max()) == pytest.approx(0.1, abs=1e-5)


def test_likelihood_task_evaluates_every_example_once(run: Path, tmp_path: Path) -> None:
    program(
        "task=likelihood",
        f"checkpoint={run}",
        "split=validation",
        "batch_size=32",
        "likelihood.probes=exact",
        "likelihood.rtol=1e-2",
        "likelihood.atol=1e-2",
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    summary = json.loads((tmp_path / "out/likelihood.json").read_text())
    with np.load(tmp_path / "out/likelihood.npz") as file:
        values, errors = file["value"], file["standard_error"]
    assert summary["count"] == len(values) == 40
    assert math.isclose(summary["mean"], values.mean(), rel_tol=1e-9)
    assert math.isclose(summary["standard_error"], values.std(ddof=1) / 40**0.5, rel_tol=1e-9)
    assert (errors == 0).all()


def test_checkpoint_says_how_its_likelihood_is_evaluated(run: Path, tmp_path: Path) -> None:
    program(
        "task=likelihood", f"checkpoint={run}", "progress=false", "hydra.run.dir=o", cwd=tmp_path
    )
    theirs = json.loads((run / "likelihood.json").read_text())
    ours = json.loads((tmp_path / "o/likelihood.json").read_text())
    assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-5)
    assert ours["nfe"] == theirs["nfe"]


# --- Plug-ins ------------------------------------------------------------------------------------


def test_given_data_are_measured_in_the_units_of_the_model(run: Path, tmp_path: Path) -> None:
    """Data ten times as wide are no better for being standardised again."""
    raw = Checkpoint.load(run).build("data", Dataset).test.numpy()
    means = []
    for i, factor in enumerate((1.0, 10.0)):
        np.savez(tmp_path / f"{i}.npz", train=factor * raw, test=factor * raw)
        program(
            "task=likelihood",
            f"checkpoint={run}",
            "data=array",
            f"data.path={i}.npz",
            "progress=false",
            f"hydra.run.dir=out{i}",
            cwd=tmp_path,
        )
        means.append(json.loads((tmp_path / f"out{i}/likelihood.json").read_text())["mean"])
    assert means[0] == pytest.approx(json.loads((run / "likelihood.json").read_text())["mean"])
    assert means[1] > means[0] + 3  # not means[0] + 2 log 10, a mere change of units


def test_one_setting_of_the_likelihood_leaves_the_others(run: Path, tmp_path: Path) -> None:
    program(
        "task=likelihood",
        f"checkpoint={run}",
        "likelihood.eps=1e-4",
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    said = json.loads((tmp_path / "out/result.json").read_text())["likelihood"]
    assert "eps=0.0001" in said
    assert "probes=1" in said
    assert "rtol=0.1" in said


def test_an_override_without_effect_is_refused(run: Path, tmp_path: Path) -> None:
    message = refused("task=sample", f"checkpoint={run}", "network=unet", cwd=tmp_path)
    assert "network" in message


def test_options_that_do_not_fit_a_checkpoint_get_a_sentence(run: Path, tmp_path: Path) -> None:
    command = ["task=likelihood", f"checkpoint={run}", "progress=false"]
    assert "real-valued" in refused(*command, "weighted=true", cwd=tmp_path)
    assert "ood must have the shape (2,)" in refused(*command, "ood=digits", cwd=tmp_path)
    for path in (run, run / "checkpoint.pt"):
        said = refused("task=import", f"checkpoint={path}", cwd=tmp_path)
        assert "a checkpoint of scoresde" in said


def test_a_second_sweep_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep/0").mkdir(parents=True)
    (tmp_path / "sweep/0/result.json").write_text("{}")
    message = refused("--multirun", "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert "hydra.sweep.dir" in message


def test_own_network_data_and_sde_by_target(tmp_path: Path) -> None:
    own = [
        "network=custom",
        "network._target_=my_parts.MyNet",
        "+network.width=8",
        "data=custom",
        "data._target_=my_parts.my_data",
        "sde=custom",
        "sde._target_=my_parts.CosineSDE",
    ]
    program(*own, *TINY, "hydra.run.dir=run", cwd=tmp_path)
    message = refused("task=sample", "checkpoint=run", "count=2", cwd=tmp_path)
    assert "my_parts" in message
    assert "allow=my_parts" in message
    program(
        "task=sample",
        "checkpoint=run",
        "count=2",
        "allow=my_parts",
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    assert (tmp_path / "out/samples.npz").exists()


def test_own_recipe_by_config_dir(tmp_path: Path) -> None:
    own = tmp_path / "my_conf/experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /data: custom\n  - override /network: mlp\n"
        "name: mine\n"
        "data:\n  _target_: my_parts.my_data\n  count: 300\n"
        "network:\n  width: 16\n"
    )
    arguments = ["--config-dir", "my_conf", "+experiment=mine", *TINY, "hydra.run.dir=run"]
    program(*arguments, cwd=tmp_path)
    recipe = Checkpoint.load(tmp_path / "run").recipe
    assert recipe["name"] == "mine"
    assert recipe["model"]["network"]["width"] == 16


def test_own_array(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 12, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    program(
        "data=array",
        "data.path=images.npy",
        "data.channels_last=true",
        "network.width=8",
        *TINY,
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    (tmp_path / "images.npy").unlink()  # samples need no data
    program(
        "task=sample",
        "checkpoint=run",
        "count=3",
        "sampler=ancestral",
        "sampler.steps=2",
        "progress=false",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    with np.load(tmp_path / "out/samples.npz") as file:
        assert file["x"].shape == (3, 3, 8, 12)
        assert file["x"].dtype == np.uint8


# --- Sweeps --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_sweep_has_a_row_for_every_job_and_survives_a_failure(tmp_path: Path) -> None:
    result = program(
        "--multirun",
        "sde=vp,ve",
        "loss.eps=0,0.001",
        *TINY,
        "network=mlp",
        "examples=4",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
        code=1,
    )
    with (tmp_path / "sweep/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    outcome = {(row["sde"], row["loss.eps"]): row["status"] for row in rows}
    assert outcome == {
        ("vp", "0"): "failed",  # sigma(0) = 0
        ("vp", "0.001"): "ok",
        ("ve", "0"): "ok",
        ("ve", "0.001"): "ok",
    }
    assert all(float(row["bits_per_dim"]) > 0 for row in rows if row["status"] == "ok")
    assert "eps" in rows[0]["error"]
    assert "got 0" in rows[0]["error"]
    assert "summary.csv" in result.stdout


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["+experiment=nothing"], 1, ["experiment/nothing"]),
        (["sde=nothing"], 1, ["sde/nothing"]),
        (["no_such_key=1"], 1, ["no_such_key"]),
        (["network.heads=2"], 1, ["network.heads is now", "++network.attention.heads=2"]),
        (
            ["network.transition.convolution=false"],
            1,
            ["++network.architecture.transition.convolution=false"],
        ),
        (["train.step=3"], 1, ["train.step is not", "use train.steps"]),
        (["tsk=sample"], 1, ["tsk", "use task."]),
        (["task=sample", "checkpoint=x", "sampler.steps=3"], 1, ["sampler.steps", "unipc"]),
        (["checkpoint=x"], 2, ["task=train", "checkpoint", "task=sample"]),
        (["task=sample", "checkpoint=x", "split=train"], 2, ["task=sample", "split"]),
        (["sde=custom"], 2, ["sde._target_ is required", "set sde._target_="]),
        (["task=paint"], 2, ["paint", "likelihood"]),
        (["device=gameboy"], 2, ["gameboy", "auto"]),
        (["task=sample"], 2, ["checkpoint="]),
        (["precision=bf16"], 2, ["task=train", "precision"]),
        (["guidance=clip"], 2, ["task=train", "guidance"]),
        (["task=likelihood", "checkpoint=x", "images=true"], 2, ["task=likelihood", "images"]),
        (["points=1"], 2, ["points", "at least 2", "got 1"]),
        (["task=sample", "checkpoint=x", "latents=3"], 2, ["latents", "got 3"]),
        (["~seed"], 2, ["seed", "remove ~seed"]),
        (["task=benchmark", "benchmark.rounds=0"], 2, ["benchmark.rounds", "got 0"]),
        (["task=benchmark", "benchmark.batch_sizes=[]"], 2, ["benchmark.batch_sizes", "got []"]),
        (["task=benchmark", "benchmark.batch_sizes=3"], 2, ["benchmark.batch_sizes", "got 3"]),
        (["task=benchmark", "benchmark.shape=abc"], 2, ["benchmark.shape", "got abc"]),
        (["~threads"], 2, ["threads", "remove ~threads"]),
        (["~precision"], 2, ["precision", "remove ~precision"]),
        (["task=import", "checkpoint=/nope.pth"], 2, ["existing", "got /nope.pth"]),
        (["inspect=null"], 2, ["inspect", "null"]),
        (["ood=3"], 2, ["ood must be one of its options, got 3"]),
        (["guidance=null"], 2, ["guidance", "null"]),
        (["task=sample", "checkpoint=x", "trajectory=1"], 2, ["trajectory", "got 1"]),
        (["task=sample", "checkpoint=nowhere"], 2, ["nowhere"]),
        (["train.steps=0"], 2, ["train.steps", "got 0"]),
        (["threads=0"], 2, ["threads", "got 0"]),
        (["seed=abc"], 2, ["seed", "got abc"]),
        (["seed=-1"], 2, ["seed", "got -1"]),
        (["count=0"], 2, ["count", "got 0"]),
        (["batch_size=1.5"], 2, ["batch_size", "got 1.5"]),
        (["progress=abc"], 2, ["progress", "got abc"]),
        (["device=null"], 2, ["device", "got None"]),
        (["sde=null"], 2, ["sde", "null"]),
        (["loss.weighting=3"], 2, ["weighting", "got 3"]),
        (["loss.eps=abc"], 2, ["eps", "got abc"]),
        (["train.rate=null"], 2, ["train.rate must", "None"]),
        (["samplers.predictor_corrector.predictor=null"], 2, ["predictor", "got None"]),
        (["optimizer.lr=abc"], 2, ["abc", "optimiser"]),
        (["sde=custom", "sde._target_=torch.nn.Identity"], 2, ["SDE"]),
        (["train.batch_size=-1"], 2, ["train.batch_size", "got -1"]),
        (["samplers.euler_maruyama.steps=0"], 2, ["steps", "got 0"]),
        (["samplers.probability_flow.eps=1"], 2, ["eps", "got 1;"]),
        (["samplers.probability_flow.eps=0"], 2, ["eps", "got 0.0"]),
        (["likelihood.eps=-0.1"], 2, ["eps", "got -0.1"]),
        (["likelihood.probes=many"], 2, ["many", "exact"]),
        (["samplers.probability_flow.method=magic"], 2, ["magic", "dopri5"]),
        (["samplers.predictor_corrector.corrector.snr=0"], 2, ["snr", "got 0;"]),
        (["sde.beta_min=-1"], 2, ["beta_min", "got -1"]),
        (
            ["sde=custom", "sde._target_=my_parts.PulsatingSDE"],
            2,
            ["signal-to-noise", "Pulsating"],
        ),
        (["optimizer.lr=nan"], 2, ["nan"]),
        (["optimizer.lr=1e30", "train.clip=null"], 2, ["step 2", "no checkpoint"]),
        (["data=two_moons"], 2, ["(2,)"]),
        (["data=array"], 2, ["data.path", "required"]),
        (["data=array", "data.path=nowhere.npy"], 2, ["nowhere.npy"]),
        (["data=custom", "data._target_=no_such_module.f"], 2, ["no_such_module"]),
        (["data=custom", "data._target_=builtins.dict"], 2, ["Dataset"]),
        (
            ["data=two_moons", "network=custom", "network._target_=my_parts.Wrapped"],
            2,
            ["network must return a tensor", "return its .sample"],
        ),
        (["hydra.run.dir=/dev/null/run"], 2, ["/dev/null/run", "hydra.run.dir"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], code: int, says: list[str], tmp_path: Path
) -> None:
    small = [] if "task=" in " ".join(arguments) else TINY[:2]
    message = refused(*small, "progress=false", *arguments, cwd=tmp_path, code=code)
    for part in says:
        assert part in message


ODD = ["lr=0.1", "größe", "set (v2)", "it's", 'a "b"', "a;b&c!", "{x}", "a\\b=", "日本", "f(x)"]


@pytest.mark.parametrize("name", ODD)
def test_the_quotes_that_a_value_needs_are_shown_and_work(name: str, tmp_path: Path) -> None:
    np.save(tmp_path / f"{name}.npy", np.zeros((50, 2), dtype=np.float32))
    broken = ["data=array", "network=mlp", "task=paint"]
    said = refused(*broken, f"data.path={name}.npy", cwd=tmp_path)
    assert said.startswith("scoresde: data.path must be quoted for Hydra, got ")
    assert said.count("\n") == 1
    shown = shlex.split(said[said.index("; use ") + 6 : said.index(", with both")])
    assert len(shown) == 1
    assert "got paint" in refused(*broken, *shown, cwd=tmp_path)
    (file,) = tmp_path.rglob("config.yaml")
    assert OmegaConf.load(file).data.path == f"{name}.npy"


def test_quotes_of_a_sweep_leave_its_values_apart(tmp_path: Path) -> None:
    said = refused("--multirun", "name=a=1,b=2", cwd=tmp_path)
    assert """use 'name="a=1","b=2"',""" in said


@pytest.mark.parametrize("text", ["trailing\\", 'a=\\"', "=\\\\", 'a"', "a=b\\\\", ""])
def test_quoted_text_is_read_as_it_was(text: str) -> None:
    quoted = scoresde.run._quoted(text)
    parser = OverridesParser.create()
    assert parser.parse_override(f"name={quoted}").value() == text


def test_a_folder_is_shown_as_it_can_be_given_again() -> None:
    assert scoresde.run._override("hydra.run.dir", Path("runs/a")) == "hydra.run.dir=runs/a"
    shown = scoresde.run._override("hydra.run.dir", Path("runs/lr=1"))
    assert shown == """'hydra.run.dir="runs/lr=1"'"""


def test_nan_in_the_data_is_refused(tmp_path: Path) -> None:
    x = np.zeros((50, 2), dtype=np.float32)
    x[7, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    message = refused("data=array", "data.path=x.npy", "network=mlp", cwd=tmp_path)
    assert "NaN" in message


def test_foreign_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "plain.pt")
    for name in ("hostile.pt", "text.pt", "plain.pt"):
        message = refused("task=sample", f"checkpoint={name}", cwd=tmp_path)
        assert name in message
    assert not (tmp_path / "executed").exists()


def test_split_and_sampler_of_a_checkpoint_are_checked(run: Path, tmp_path: Path) -> None:
    message = refused("task=likelihood", f"checkpoint={run}", "split=holdout", cwd=tmp_path)
    assert "holdout" in message
    message = refused("task=sample", f"checkpoint={run}", "count=0", cwd=tmp_path)
    assert "count" in message
    assert "got 0" in message


def test_second_run_in_a_folder_is_refused(run: Path) -> None:
    names = ("checkpoint.pt", "result.json", "likelihood.npz", ".hydra/config.yaml")
    before = [(run / name).read_bytes() for name in names]
    message = refused(*TINY, f"hydra.run.dir={run}", cwd=run.parent)
    assert "hydra.run.dir" in message
    assert [(run / name).read_bytes() for name in names] == before


def test_another_training_leaves_the_one_that_waits_to_be_gone_on_with(
    run: Path, tmp_path: Path
) -> None:
    waiting = tmp_path / "run"
    shutil.copytree(run, waiting)
    said = json.loads((waiting / "result.json").read_text()) | {"status": "stopped"}
    (waiting / "result.json").write_text(json.dumps(said, indent=2) + "\n")
    names = ("checkpoint.pt", "result.json", ".hydra/config.yaml", ".hydra/overrides.yaml")
    before = [(waiting / name).read_bytes() for name in names]
    message = refused(*TINY, "seed=7", f"hydra.run.dir={waiting}", cwd=tmp_path)
    assert re.search(r"data\._target_ .*two_moons.*digits", message)
    assert [(waiting / name).read_bytes() for name in names] == before


def test_a_likelihood_leaves_the_folder_of_a_training_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("result.json", "likelihood.npz", "report.html", ".hydra/config.yaml")
    before = [(run / name).read_bytes() for name in names]
    for size in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", size)
        given = ("task=likelihood", f"checkpoint={run}", f"hydra.run.dir={run}")
        assert "already holds a run" in refused(*given, cwd=run.parent)
        assert [(run / name).read_bytes() for name in names] == before


def test_a_likelihood_that_failed_can_be_started_again(run: Path, tmp_path: Path) -> None:
    given = ("task=likelihood", "examples=4", "progress=false", "hydra.run.dir=out")
    assert re.search("checkpoint .*nope", refused(*given, "checkpoint=nope", cwd=tmp_path))
    program(*given, f"checkpoint={run}", cwd=tmp_path)
    assert json.loads((tmp_path / "out/result.json").read_text())["status"] == "ok"


def test_data_set_reaches_the_task_whole(run: Path) -> None:
    units = Checkpoint.load(run).recipe["units"]
    assert units["_target_"] == "scoresde.codec.Affine"
    assert tuple(units["shape"]) == (2,)
    assert Dataset.__name__ not in str(units)


# --- As a process --------------------------------------------------------------------------------


def test_program_starts_as_a_module_and_as_a_script(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("scoresde")
    for command in ([sys.executable, "-m", "scoresde.run"], [str(script)]):
        shown = subprocess.run(
            [*command, "--cfg", "job", "--resolve"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert shown.returncode == 0, shown.stderr
        assert "name: digits_vp" in shown.stdout


def test_bad_input_leaves_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scoresde.run", "task=paint"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("scoresde: task")
    assert "paint" in result.stderr
    assert "Traceback" not in result.stderr
