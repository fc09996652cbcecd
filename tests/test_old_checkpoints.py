"""Checkpoints and interrupted runs of commit 073b527 are still worth what they were."""

import functools
import shutil

import pytest

from scoresde.train import Checkpoint
from tests.old_checkpoints import OLD, RESUMED, applied, command, table
from tests.recorded import difference, read
from tests.test_run import program

expected = functools.cache(lambda: read(OLD / "expected.npz"))
ends = functools.cache(lambda: read(OLD / "ends.npz"))
FILES = sorted(path.stem for path in OLD.glob("*.pt"))


def check(found, recorded):
    assert recorded
    wrong = [
        sentence
        for key in {**recorded, **found}
        if (sentence := difference(key, found.get(key), recorded.get(key))) is not None
    ]
    assert not wrong, f"{len(wrong)} of {len(recorded)} numbers:\n" + "\n".join(wrong[:20])


def of(name, numbers):
    return {key: value for key, value in numbers.items() if key.split("/")[1] == name}


def test_no_file_is_missing():
    assert {key.split("/")[1] for key in expected()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_gives_the_numbers_that_it_gave(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check(applied(OLD / f"{name}.pt"), of(name, expected()))


def copied(name, folder):
    """Copies an interrupted run, and the checkpoint that it works on."""
    shutil.copytree(OLD / name, folder / name)
    if RESUMED[name] == "train":
        newest = folder / name / "checkpoints/00000006.pt"
        newest.parent.mkdir()
        newest.hardlink_to(folder / name / "checkpoint.pt")
    for word in command(name):
        if word.startswith("checkpoint="):
            shutil.copy(OLD / word.removeprefix("checkpoint="), folder)


@pytest.mark.parametrize("name", [name for name, task in RESUMED.items() if task == "train"])
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted(name, tmp_path):
    copied(name, tmp_path)
    run = tmp_path / name
    before = (run / "metrics.jsonl").read_text().splitlines()
    assert Checkpoint.load(run).step == 6
    program(*command(name), f"hydra.run.dir={name}", cwd=tmp_path)
    there = Checkpoint.load(run)
    assert there.step == 10
    # It went on and did not begin anew: what was recorded stands, to the seconds.
    after = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in before if line in after]
    assert len(kept) >= 3
    assert len(after) > len(kept)
    found = {
        f"exact/{name}/{kind}/{key}": value
        for kind, values in (("ema", there.ema), ("raw", there.model))
        for key, value in values.items()
    }
    check(found, of(name, ends()))


@pytest.mark.parametrize("name", [name for name, task in RESUMED.items() if task != "train"])
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_evaluation_goes_on_with_its_pieces(name, tmp_path):
    copied(name, tmp_path)
    run = tmp_path / name
    pieces = {path: path.read_bytes() for path in sorted(run.glob("parts/0*.npz"))}
    times = {path: path.stat().st_mtime_ns for path in pieces}
    assert len(pieces) == 2
    program(*command(name), f"hydra.run.dir={name}", cwd=tmp_path)
    assert len(list(run.glob("parts/0*.npz"))) == 4
    assert {path: path.stat().st_mtime_ns for path in pieces} == times
    assert {path: path.read_bytes() for path in pieces} == pieces
    check(table(name, run), of(name, ends()))
