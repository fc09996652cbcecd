"""What the README and the guide say works: programs and commands run, pictures and links exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from scoresde import VPSDE, GaussianModel
from scoresde.tasks import benchmark
from tests.score_sde_files import config, content
from tests.small_sets import cifar_files, write, write_pictures
from tests.test_run import ROOT, TINY, program, shortened

README = ROOT / "README.md"
GUIDE = ROOT / "docs/guide"
PAGES = [README, *sorted(GUIDE.glob("*.md"))]
# These groups of commands build on one another; tests/test_docs.py runs them in their order.
IN_ORDER = {GUIDE / "data.md": 1, GUIDE / "extending.md": 0}


def blocks(language: str, page: Path = README) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def lines_of(page: Path) -> list[list[str]]:
    """The shell commands of a page, in words."""
    found = [b for i, b in enumerate(blocks("sh", page)) if i != IN_ORDER.get(page)]
    text = "\n".join(found).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def commands() -> list[list[str]]:
    """The commands of all pages that one process runs by itself."""
    words = [words for page in PAGES for words in lines_of(page)]
    found = [w[3:] for w in words if w[:3] == ["python", "-m", "scoresde.run"]]
    found += [w[1:] for w in words if w[0] == "scoresde" and "hydra/launcher" not in " ".join(w)]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def launched() -> list[list[str]]:
    """The commands that a launcher, torchrun or a batch system starts."""
    words = [words for page in PAGES for words in lines_of(page)]
    found = [w[w.index("scoresde.run") + 1 :] for w in words if w[0] == "torchrun"]
    found += [w[w.index("docs/guide/slurm.sbatch") + 1 :] for w in words if w[0] == "sbatch"]
    return found + [w[1:] for w in words if w[0] == "scoresde" and "hydra/launcher" in " ".join(w)]


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
    recipe.write_text(blocks("yaml", GUIDE / "extending.md")[0])
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
        if "likelihood=discrete" in text:
            small += ["examples=4", "likelihood.draws=2"]
        elif "task=likelihood" in text and "likelihood=bound" not in text:
            small += ["likelihood.rtol=0.1", "likelihood.atol=0.1"]
        small += [] if "allow=" in text else ["allow=my_parts"]
        if "task=encode" in text:
            small += ["examples=4"]
        if "task=restore" in text:
            program(*TINY, "hydra.run.dir=DIGITS", cwd=place)
            command = [word.replace("checkpoint=RUN", "checkpoint=DIGITS") for word in command]
            small = ["examples=2", "draws=2", "restore.sampler.steps=3", "progress=false"]
        if "latents=" in text:  # of the command before, which another process may have run
            before = next(c for c in commands() if "task=encode" in c)
            program(*before, "examples=4", "progress=false", "allow=my_parts", cwd=place)
    if "moons" in text:
        small = [*small, "data.count=400"]
    if "multirun" in text or "task=search" in text:
        small = [*small, "network=mlp", "examples=4"]
    if "task=search" in text:
        small = [*small, "search.trials=1"]
    if "--config-dir runs/search" in text:  # the best recipe of the search before
        before = next(c for c in commands() if "task=search" in c)
        program(*before, *TINY, "search.trials=1", "network=mlp", "examples=4", cwd=place)
    program(*command, *small, cwd=place)


@pytest.mark.parametrize("command", launched(), ids=" ".join)
def test_command_of_a_launcher_composes(command: list[str], place: Path) -> None:
    """Launchers, torchrun and the batch script are run in tests of their own."""
    if "hydra/launcher" in " ".join(command):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [word for word in command if word != "--multirun" and "," not in word]
    shown = program(*words, "--cfg", "all", cwd=place).stdout
    assert "scoresde" in shown


def test_the_batch_script_is_where_the_page_says() -> None:
    assert (GUIDE / "slurm.sbatch").exists()


def run_shortened(text: str, space: dict, *pairs: tuple[str, str]) -> dict:
    """Runs a program with some of its numbers replaced."""
    for long, short in pairs:
        assert long in text
        text = text.replace(long, short)
    exec(text, space)
    return space


def test_the_program_of_the_readme_runs() -> None:
    (text,) = blocks("python")
    assert len(text.strip().splitlines()) <= 16
    pairs = ("steps=2000", "steps=300, progress=False"), ("1000, 2", "4, 2"), ("[:200]", "[:50]")
    space = run_shortened(text, {}, *pairs)
    assert space["samples"].x.shape == (4, 2)
    # 300 updates cost less than half a nat.
    assert abs(float(space["ours"]) - float(space["exact"])) < 0.5


def test_the_program_of_sampling_runs() -> None:
    (text,) = blocks("python", GUIDE / "sampling.md")
    pairs = ("1000, 2", "4, 2"), ("steps=500", "steps=2"), ("steps=250", "steps=2")
    space = run_shortened(text, {}, *pairs)
    assert space["c"].x.shape == (4, 2)
    assert space["d"].shape == (64,)


def test_the_program_of_likelihoods_runs() -> None:
    (text,) = blocks("python", GUIDE / "likelihoods.md")
    model = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
    exec(text, {"model": model, "x": model.sample(4, seed=0)})


def test_every_recipe_is_in_a_table() -> None:
    told = "".join((GUIDE / name).read_text() for name in ("training.md", "models.md"))
    for path in (ROOT / "conf/experiment").glob("*.yaml"):
        assert f"`{path.stem}`" in told


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_links_and_pictures_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    for target in (t for t in targets if not t.startswith("http")):
        assert (page.parent / target).exists(), target


def test_every_experiment_is_a_recipe_and_has_a_row() -> None:
    table = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "experiments").glob("*/results.json"):
        assert (ROOT / "conf/experiment" / f"{path.parent.name}.yaml").exists()
        assert f"[{path.parent.name}]" in table
        assert (path.parent / "figure.png").exists()
