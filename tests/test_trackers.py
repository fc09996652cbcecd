"""Where numbers go: several trackers at once, none of which may end a training."""

import errno
import functools
import json
import os
import socket
import sys
import time
import types

import pytest
import torch

from scoresde import VPSDE, DenoisingScoreMatching, InputError, Preconditioned, ScoreModel
from scoresde.data import two_moons
from scoresde.errors import OtherRunError
from scoresde.nn import MLP
from scoresde.tasks import folder as folder_
from scoresde.tasks.folder import Hold
from scoresde.tasks.runs import describe_runs, list_runs
from scoresde.train import (
    MLflow,
    TensorBoard,
    Tracker,
    Trackio,
    Training,
    WandB,
    read_metrics,
    train,
)


def fit(folder, *trackers, steps=6, inspect=None, **options):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    train(
        ScoreModel(MLP(2, width=8, depth=1), VPSDE(), Preconditioned(1.0)),
        two_moons(count=100),
        DenoisingScoreMatching(),
        Training(steps=steps, batch_size=16, log_every=2, **options),
        functools.partial(torch.optim.Adam, lr=1e-3),
        folder,
        recipe={"name": "moons", "model": {"width": 8}},
        progress=False,
        trackers=trackers,
        inspect=inspect,
    )


class Remembering(Tracker):
    def __init__(self, fails=None):
        self.fails, self.seen, self.closed = fails, [], False

    def begin(self, run):
        self.run = run

    def log(self, step, numbers):
        if step == self.fails:
            raise ConnectionError("no network")
        self.seen.append((step, dict(numbers)))

    def image(self, step, name, path):
        self.seen.append((step, name, path.name))

    def close(self):
        self.closed = True


def test_a_tracker_gets_the_run_and_every_number(tmp_path):
    tracker = Remembering()
    fit(tmp_path, tracker)
    assert (tracker.run.name, tracker.run.start) == ("moons", 0)
    assert tracker.run.recipe["model"] == {"width": 8}
    assert [{"step": s, **n} for s, n in tracker.seen] == read_metrics(tmp_path)
    assert tracker.closed


def test_one_that_fails_is_left_out_and_the_training_goes_on(tmp_path, caplog):
    failing, other = Remembering(fails=4), Remembering()
    with caplog.at_level("WARNING", logger="scoresde"):
        fit(tmp_path, failing, other)
    assert caplog.text.count("Remembering failed") == 1
    assert other.seen[-1][0] == 6
    assert failing.seen[-1][0] == 2


def test_pictures_of_a_look_are_handed_on(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a.png").write_bytes(b"")
    tracker = Remembering()

    def inspect(done, model):
        return {"samples": tmp_path / "run/a.png", "bound": 1.5}

    fit(tmp_path / "run", tracker, inspect=inspect, inspect_every=3)
    assert [s for s in tracker.seen if "samples" in s] == [
        (3, "samples", "a.png"),
        (6, "samples", "a.png"),
    ]
    assert [r["bound"] for r in read_metrics(tmp_path / "run") if "bound" in r] == [1.5, 1.5]


def test_tensorboard_writes_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, TensorBoard())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6]


class Fake(types.ModuleType):
    """Stands for wandb and trackio: remembers its calls."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.Image = str

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, numbers, step):
        self.calls.append(("log", step, numbers))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize(("kind", "name"), [(WandB, "wandb"), (Trackio, "trackio")])
def test_a_run_that_is_gone_on_with_is_the_same_run(kind, name, tmp_path, monkeypatch):
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    fit(tmp_path, kind("project"), save_every=2)
    (tmp_path / "checkpoints/00000006.pt").unlink()
    fit(tmp_path, kind("project"), save_every=2)
    opened = [call[1] for call in fake.calls if call[0] == "init"]
    assert len(opened) == 2
    assert opened[0] == opened[1]
    assert opened[0]["project"] == "project"
    assert fake.calls[-1] == ("finish",)
    assert {call[1] for call in fake.calls if call[0] == "log"} == {2, 4, 6}


@pytest.mark.parametrize(
    ("kind", "name"), [(WandB, "wandb"), (MLflow, "mlflow"), (Trackio, "trackio")]
)
def test_a_library_that_is_not_installed_is_a_sentence(kind, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf'pip install "scoresde\[{name}\]"'):
        kind()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    fit(tmp_path / "run", MLflow("moons", uri))
    client = MLflow("moons", uri).library.tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("moons").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [2, 4, 6]
    assert run.data.params["model.width"] == "8"


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(tmp_path / "run", WandB("moons", "offline"))
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))


# --- Runs ----------------------------------------------------------------------------------------


def made(folder, name, **result):
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(result))
    return folder / name


def test_runs_are_listed_with_their_state(tmp_path):
    made(tmp_path, "a/good", task="train", status="ok", bits_per_dim=2.135)
    made(tmp_path, "a/dead", task="train", status="running")
    made(tmp_path, "b/bad", task="sample", status="failed", error="no checkpoint")
    (made(tmp_path, "b/broken") / "result.json").write_text("{")
    rows = {row["run"]: row for row in list_runs(tmp_path)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a/good": "ok",
        "a/dead": "killed",
        "b/bad": "failed",
        "b/broken": "damaged",
    }
    assert rows["a/good"]["metric"] == "2.135 bits_per_dim"
    assert rows["b/bad"]["error"] == "no checkpoint"


def test_a_run_at_work_is_running(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    run = made(tmp_path, "run", task="train", status="running")
    with (run / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert list_runs(tmp_path)[0]["state"] == "running"


@pytest.mark.parametrize("shared", [False, True])
def test_whoever_holds_a_folder_is_seen_until_it_ends(shared, tmp_path):
    pytest.importorskip("fcntl")
    run = made(tmp_path, "run", task="sample", status="running")
    first = Hold(run, shared)
    if shared:
        Hold(run, shared).close()
    with pytest.raises(OtherRunError, match=r"Another process.*run"):
        Hold(run)
    assert list_runs(tmp_path)[0]["state"] == "running"
    first.close()
    assert list_runs(tmp_path)[0]["state"] == "killed"
    assert [path.name for path in run.glob(".alive*")] == []


@pytest.mark.parametrize(
    ("name", "age", "locks", "state"),
    [
        ("elsewhere", 100, True, "running"),
        ("elsewhere", 1000, True, "killed"),
        (socket.gethostname(), 0, True, "killed"),
        (socket.gethostname(), 0, False, "running"),
        (socket.gethostname(), 1000, False, "killed"),
    ],
)
def test_a_sign_of_life_counts_where_no_lock_tells(name, age, locks, state, tmp_path, monkeypatch):
    """That of another machine, and any on a file system without locks."""
    fcntl = pytest.importorskip("fcntl")
    run = made(tmp_path, "run", task="sample", status="running")
    (run / ".lock").touch()
    sign = run / f".alive.{name}"
    sign.touch()
    os.utime(sign, (time.time() - age,) * 2)

    def unable(file, how):
        raise OSError(errno.ENOSYS, "no locks")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", unable)
    assert list_runs(tmp_path)[0]["state"] == state


def test_a_sign_of_life_is_given_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_, "_BEAT", 0.01)
    hold = Hold(tmp_path)
    sign = tmp_path / f".alive.{socket.gethostname()}"
    deadline = time.monotonic() + 20
    for _ in range(2):
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        sign.unlink()
    hold.close()
    assert not sign.exists()


def test_its_losses_and_steps_are_those_recorded(tmp_path):
    run = made(tmp_path, "run", task="train", status="stopped")
    fit(run, validate_every=3)
    (run / ".hydra").mkdir()
    (run / ".hydra/config.yaml").write_text("train: {steps: 20}")
    (row,) = list_runs(tmp_path)
    losses = [r["validation_loss"] for r in read_metrics(run) if "validation_loss" in r]
    assert (row["step"], row["best_loss"]) == ("6/20", min(losses))
    assert json.loads(describe_runs(tmp_path, as_json=True)) == [row]
    assert "6/20" in describe_runs(tmp_path)


def test_no_runs_and_no_folder(tmp_path):
    assert describe_runs(tmp_path) == f"{tmp_path} holds no runs."
    with pytest.raises(InputError, match=r"folder.*nowhere"):
        list_runs(tmp_path / "nowhere")
