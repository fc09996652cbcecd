"""Several processes train one model as one process does."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scoresde.errors import InputError
from scoresde.train import Checkpoint, ProcessGroup, Snapshots, read_metrics
from scoresde.train.engine import process_group
from tests.processes import LEARNING, STOPPED, TRAININGS
from tests.processes import main as train_alone

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the trainings leave, in one process and in two."""
    path = tmp_path_factory.mktemp("processes")
    train_alone(path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
            *(str(ROOT / "tests/processes.py"), str(path)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return path


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_end_with_the_weights_of_one(name, folder):
    one = Checkpoint.load(folder / f"{name.removesuffix('_accumulated')}_1")
    two = Checkpoint.load(folder / f"{name}_2")
    bar = 1e-12 if "64" in name else 1e-5
    assert one.step == two.step == 20
    assert distance(one.model, two.model) <= bar
    assert distance(one.ema, two.ema) <= bar


@pytest.mark.parametrize("name", LEARNING)
def test_what_the_loss_has_learned_is_that_of_one_process(name, folder):
    last = f"checkpoints/00000020{'' if 'fsdp' in name else '.pt'}"
    early = last.replace("20", "16")
    one = Checkpoint.load(folder / f"{name}_1/checkpoints/00000020.pt").state["loss"]
    two = Checkpoint.load(folder / f"{name}_2" / last).state["loss"]
    before = Checkpoint.load(folder / f"{name}_2" / early).state["loss"]
    assert distance(one, two) <= 1e-12
    assert distance(before, two) > 1e-4


def test_the_weights_have_moved(folder):
    early = Checkpoint.load(folder / "fsdp_64_2/checkpoints/00000016")
    assert distance(early.model, Checkpoint.load(folder / "fsdp_64_2").model) > 1e-4


@pytest.mark.parametrize("name", [*STOPPED, "ddp_64_pair"])
def test_what_is_recorded_is_that_of_one_process(name, folder):
    one, two = (read_metrics(folder / f"{name}_{size}") for size in (1, 2))
    assert [r.keys() for r in one] == [r.keys() for r in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"steps_per_second", "examples_per_second", "memory_gib"}:
            assert a[key] == pytest.approx(b[key], rel=1e-6), key


@pytest.mark.parametrize("name", ["ddp_64", "fsdp_64"])
def test_stored_averages_are_those_of_one_process(name, folder):
    one, two = (Snapshots.of(folder / f"{name}_{size}").average(0.08) for size in (1, 2))
    assert distance(one.ema, two.ema) <= 1e-12


@pytest.mark.parametrize("name", STOPPED)
def test_all_stop_when_one_is_asked_and_go_on_exactly(name, folder):
    steps = [(folder / f"{name}_stopped/stopped_{rank}").read_text() for rank in (0, 1)]
    assert steps == ["10", "10"]
    whole, stopped = (Checkpoint.load(folder / f"{name}_{end}") for end in ("2", "stopped"))
    assert distance(whole.model, stopped.model) == 0
    assert distance(whole.ema, stopped.ema) == 0


def test_a_checkpoint_in_parts_holds_the_optimiser(folder):
    one = Checkpoint.load(folder / "fsdp_64_1")
    two = Checkpoint.load(folder / "fsdp_64_2/checkpoints/00000020")
    assert sorted(p.name for p in (folder / "fsdp_64_2/checkpoints/00000020").iterdir()) == [
        *(".metadata", "__0_0.distcp", "__1_0.distcp", "index.pt")
    ]
    for number, state in one.optimizer["state"].items():
        assert distance(state, two.optimizer["state"][number]) <= 1e-12


@pytest.mark.parametrize(
    "name", ["ddp_64_learned", "ddp_64_variational", "fsdp_64_learned", "fsdp_64_pair"]
)
def test_weights_outside_of_networks_have_moved_and_are_whole(name, folder):
    early, late = (
        Checkpoint.load(folder / f"{name}_2/checkpoints" / step)
        for step in (f"000000{i}{'.pt' if 'ddp' in name else ''}" for i in (16, 20))
    )
    shapes = {"sde.slope": (), "parametrisation.weight": ()}
    found = {
        key: shape for key in late.model for end, shape in shapes.items() if key.endswith(end)
    }
    assert len(found) == (4 if "pair" in name else 1)  # the pair has one SDE under three names
    for key, shape in found.items():
        assert late.model[key].shape == shape
        assert float((late.model[key] - early.model[key]).abs().max()) > 1e-5
        assert float((late.ema[key] - early.ema[key]).abs().max()) > 1e-6


def test_the_program_shares_a_folder_and_each_example_once(folder):
    (run,) = (folder / "program/runs/digits_vp").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["examples"]) == ("ok", 50)
    assert sorted((run / "progress").iterdir())[-1].name == "00000006.png"
    assert {r["bound_bits_per_dim"] for r in read_metrics(run) if "bound_bits_per_dim" in r}
    assert Checkpoint.load(run).build_model().network is not None


# --- Damages -------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["payload", "empty", "flipped"])
def test_damaged_parts_are_refused_and_nothing_is_executed(damage, folder, tmp_path):
    from scoresde.train.shards import read_shards

    source = folder / "fsdp_64_2/checkpoints/00000020"
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    place = copy / (".metadata" if damage == "payload" else "__1_0.distcp")
    raw = place.read_bytes()
    place.write_bytes(
        {
            "payload": pickle.dumps(Payload(tmp_path / "executed")),
            "empty": b"",
            "flipped": raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:],
        }[damage]
    )
    with pytest.raises(InputError, match=f"{copy.name} .*damaged"):
        Checkpoint.load(copy)
    if damage != "flipped":  # also without the digests
        described = {"_part": "/model/network.blocks.0.a", "shape": [2], "dtype": "float32"}
        with pytest.raises(InputError, match=f"{copy.name} .*damaged.*executed"):
            read_shards(described, copy)
    assert not (tmp_path / "executed").exists()


# --- The group -----------------------------------------------------------------------------------


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group() as group:
        assert group == ProcessGroup(0, 1)
        assert group.total(torch.ones(2)).tolist() == [1, 1]
        assert group.agree("a") == "a"


def test_the_parts_of_a_batch_make_it_up():
    for count in (4, 5, 31):
        parts = [list(range(count))[ProcessGroup(rank, 4).part(count)] for rank in range(4)]
        assert [i for part in parts for i in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
