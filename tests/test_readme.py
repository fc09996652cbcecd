"""What the README says works: its program is run, its commands are run, its pictures exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from scoresde import VPSDE, GaussianModel, Likelihood
from scoresde.sample import ProbabilityFlow
from scoresde.tasks import benchmark
from tests.score_sde_files import config, content
from tests.small_sets import cifar_files, write, write_pictures
from tests.test_run import ROOT, TINY, program, shortened

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    parts = [shlex.split(line, comments=True) for line in lines]
    return [p[3:] for p in parts if p[:3] == ["python", "-m", "scoresde.run"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README imagines it: a run, images, a module and a recipe of one's own."""
    import numpy as np

    folder = tmp_path_factory.mktemp("readme")
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "my_parts.py").write_text((ROOT / "tests/plugins/my_parts.py").read_text())
    recipe = folder / "my_conf/experiment/mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(blocks("yaml")[0])
    own = next(c for c in commands() if "network=custom" in c)
    program(*own, *TINY, "train.snapshots=2", "hydra.run.dir=RUN", cwd=folder)
    write(folder / "FOLDER", cifar_files())
    write_pictures(folder / "PICTURES")
    values = config()
    torch.save(content(values), folder / "checkpoint_8.pth")
    (folder / "config.json").write_text(json.dumps(values))
    first = next(c for c in commands() if "task=import" in c)
    program(*small_import(first), cwd=folder)
    return folder


def small_import(command: list[str]) -> list[str]:
    """The command with the configuration of our small checkpoint."""
    return ["reference=config.json" if c.startswith("reference=") else c for c in command]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_runs(command: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    text = " ".join(command)
    small = TINY
    if text == "runs":  # is no configuration; see test_trackers.py
        return
    if "task=benchmark" in text:
        # To compile takes long.
        monkeypatch.setitem(benchmark.VARIANTS, "cpu", benchmark.VARIANTS["cpu"][:2])
        tiny = ["network=mlp", "benchmark.rounds=1", "benchmark.likelihood=false"]
        program(*command, *tiny, "benchmark.sampler.steps=2", cwd=place)
        return
    if "task=import" in text:  # it has run, and may not run twice in one folder
        assert (place / "IMPORTED/checkpoint.pt").exists()
        return
    if "checkpoint=IMPORTED" in text:
        program(*command, "sampler.steps=24", "count=2", "progress=false", cwd=place)
        return
    if "experiment=cifar" in text or "experiment=lsun" in text:
        recipe = command[0].partition("=")[2]
        where = [
            c for c in shortened(recipe, place) if not c.startswith(("data.root", "data.path"))
        ]
        small = [*TINY, *where, *(["data.root=FOLDER"] if "cifar" in recipe else [])]
    if "data=folder" in text:
        small = [*TINY, "data.fractions=[0.6,0.2,0.2]"]
    if "checkpoint=RUN" in text:
        small = ["count=4", "progress=false"]
        if "task=likelihood" in text and "likelihood=bound" not in text:
            small += ["likelihood.rtol=0.1", "likelihood.atol=0.1"]
        small += [] if "allow=" in text else ["allow=my_parts"]
        if "task=encode" in text:
            small += ["examples=4"]
        if "task=restore" in text:
            small += ["examples=2", "draws=2", "restore.sampler.steps=3"]
        if "latents=" in text:  # of the command before, which another process may have run
            before = next(c for c in commands() if "task=encode" in c)
            program(*before, "examples=4", "progress=false", "allow=my_parts", cwd=place)
    if "moons" in text:
        small = [*small, "data.count=400"]
    if "multirun" in text or "task=search" in text:
        small = [*small, "network=mlp", "examples=4"]
    if "task=search" in text:
        small = [*small, "search.trials=1"]
    program(*command, *small, cwd=place)


def test_library_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (b for b in blocks("python") if "PredictorCorrector" in b)
    assert len(text.strip().splitlines()) <= 26
    for long, short in (
        ("steps=2000", "steps=2, progress=False"),
        ("1000, 2", "4, 2"),
        ("[:200]", "[:4]"),
    ):
        assert long in text
        text = text.replace(long, short)
    text = text.replace("steps=500", "steps=2").replace("steps=250", "steps=2")
    space: dict = {}
    exec(text, space)
    assert space["result"].log_prob.shape == (4,)
    assert space["c"].x.shape == (4, 2)


def test_likelihood_example_runs() -> None:
    (text,) = (b for b in blocks("python") if "ColourProbing" in b)
    model = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
    exec(
        text.replace("(64, 2)", "(4, 2)"),
        {
            "Likelihood": Likelihood,
            "ProbabilityFlow": ProbabilityFlow,
            "model": model,
            "x": model.sample(4, seed=0),
        },
    )


def test_every_recipe_is_in_the_table() -> None:
    for path in (ROOT / "conf/experiment").glob("*.yaml"):
        assert f"`{path.stem}`" in README


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [t for t in targets if not t.startswith("http")]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_every_experiment_is_a_recipe_and_has_a_row() -> None:
    table = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "experiments").glob("*/results.json"):
        assert (ROOT / "conf/experiment" / f"{path.parent.name}.yaml").exists()
        assert f"[{path.parent.name}]" in table
        assert (path.parent / "figure.png").exists()
