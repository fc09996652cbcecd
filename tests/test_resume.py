"""Nothing is lost: a training goes on after any interruption as if there had been none."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scoresde import VPSDE, DenoisingScoreMatching, InputError, Preconditioned, ScoreModel
from scoresde.data import two_moons
from scoresde.errors import OtherRunError
from scoresde.nn import UNet
from scoresde.train import (
    Checkpoint,
    CheckpointManager,
    CosineRate,
    Snapshots,
    Training,
    TrainingStopped,
    read_metrics,
    train,
)
from scoresde.train.state import State
from tests.test_run import program

ROOT = Path(__file__).parents[1]
STEPS = 200


class Network(torch.nn.Module):
    """With dropout, whose random numbers are torch's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 16), torch.nn.Linear(16, 2)

    def forward(self, x, c):
        hidden = self.a(torch.cat([x, c[:, None]], 1)).relu()
        return self.b(torch.nn.functional.dropout(hidden, 0.3, self.training))


class Interrupting(DenoisingScoreMatching):
    """Does something at one step."""

    def __init__(self, step, act):
        super().__init__()
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "act", act)

    def terms(self, model, x, **options):
        seeds = options.get("seeds")
        if isinstance(seeds, range) and seeds.start == self.step * len(x):
            self.act()
        return super().terms(model, x, **options)


def fit(folder, loss=None, recipe=None, seed=0, **options):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    options = {"save_every": 3, "log_every": 2, "validate_every": 5, **options}
    return train(
        ScoreModel(Network(), VPSDE(), Preconditioned(1.0)),
        two_moons(count=100),
        loss or DenoisingScoreMatching(),
        Training(steps=17, batch_size=16, rate=CosineRate(4), **options),
        functools.partial(torch.optim.Adam, lr=1e-2),
        folder,
        recipe={"model": {"width": 16}} if recipe is None else recipe,
        seed=seed,
        progress=False,
    )


def weights(folder):
    checkpoint = Checkpoint.load(folder)
    return {**{f"m.{k}": v for k, v in checkpoint.model.items()}, **checkpoint.ema}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class CrashError(Exception):
    pass


def crash():
    raise CrashError


@pytest.mark.parametrize("step", [0, 2, 3, 8, 16])
def test_a_crash_at_any_step_leaves_no_trace(step, tmp_path):
    fit(tmp_path / "whole")
    with pytest.raises(CrashError):
        fit(tmp_path / "killed", Interrupting(step, crash))
    fit(tmp_path / "killed")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    steps, losses = (
        [
            [r[key] for r in read_metrics(tmp_path / name) if key in r]
            for name in ("whole", "killed")
        ]
        for key in ("step", "loss")
    )
    assert steps[0] == steps[1]
    assert losses[0] == losses[1]


@pytest.fixture
def heard():
    """Signals act as they do in a shell's foreground, wherever the tests were started."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(number, tmp_path):
    before = signal.getsignal(number)
    fit(tmp_path / "whole")
    with pytest.raises(TrainingStopped, match="step 8") as stop:
        fit(tmp_path / "stopped", Interrupting(7, lambda: signal.raise_signal(number)))
    assert (stop.value.step, stop.value.signal) == (8, number)
    assert signal.getsignal(number) is before
    assert Checkpoint.load(tmp_path / "stopped").step == 8
    fit(tmp_path / "stopped")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number, tmp_path):
    signal.signal(number, signal.SIG_IGN)
    fit(tmp_path / "run", Interrupting(7, lambda: signal.raise_signal(number)))
    assert signal.getsignal(number) is signal.SIG_IGN
    assert Checkpoint.load(tmp_path / "run").step == 17


@pytest.mark.usefixtures("heard")
def test_a_second_signal_acts_as_usual(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", Interrupting(7, twice))


def test_a_finished_training_is_not_begun_again(tmp_path):
    fit(tmp_path / "run")
    before = (tmp_path / "run/checkpoint.pt").stat().st_mtime_ns
    fit(tmp_path / "run", Interrupting(0, crash))
    assert (tmp_path / "run/checkpoint.pt").stat().st_mtime_ns == before


# --- Checkpoints ---------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    fit(tmp_path / "run", keep=3)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["00000012.pt", "00000015.pt", "00000017.pt"]
    newest = tmp_path / "run/checkpoints/00000017.pt"
    assert newest.samefile(tmp_path / "run/checkpoint.pt")


def test_what_a_killed_process_had_half_written_goes(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".checkpoint.pt.part").write_bytes(b"a second name of an old one")
    (folder / "checkpoints/00000004.pt.part").write_bytes(b"half")
    (folder / "checkpoints/00000005.part").mkdir()
    fit(folder)
    assert [path.name for path in folder.rglob("*.part")] == []


def flipped(raw, place, bit=4):
    return raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before(damage, tmp_path, caplog):
    fit(tmp_path / "whole")
    with pytest.raises(CrashError):
        fit(tmp_path / "run", Interrupting(13, crash))
    newest = tmp_path / "run/checkpoints/00000012.pt"
    raw = newest.read_bytes()
    number = raw.index(Checkpoint.load(newest).model["network.a.weight"].numpy().tobytes())
    newest.write_bytes(
        {
            "cut": raw[: len(raw) // 2],
            "flipped": flipped(raw, number + 5),
            "empty": b"",
        }[damage]
    )
    assert newest.samefile(tmp_path / "run/checkpoint.pt")
    caplog.set_level("WARNING", logger="scoresde")
    assert CheckpointManager(tmp_path / "run").newest().step == 9
    assert newest.name in caplog.text
    fit(tmp_path / "run")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_every_flipped_bit_of_a_number_is_seen(tmp_path):
    fit(tmp_path / "run")
    path, numbers = tmp_path / "run/checkpoint.pt", random.Random(0)
    good, raw = Checkpoint.load(path), path.read_bytes()
    seen = 0
    for _ in range(60):
        place = numbers.randrange(len(raw))
        path.write_bytes(
            bytes([*raw[:place], raw[place] ^ 1 << numbers.randrange(8), *raw[place + 1 :]])
        )
        try:
            there = Checkpoint.load(path)
        except InputError:
            seen += 1
        else:  # padding, or a date
            assert equal({**there.model, **there.ema}, {**good.model, **good.ema})
    assert seen > 20


def test_nothing_but_damaged_checkpoints_is_told(tmp_path):
    fit(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"{tmp_path.name}/run .*hydra\.run\.dir"):
        fit(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": {"model": {"width": 17}}}, r"model\.width .*16.*17"),
        ({"seed": 1}, r"seed .*\b0\b.*\b1\b"),
    ],
    ids=["recipe", "seed"],
)
def test_another_training_in_the_folder_is_refused(options, message, tmp_path):
    fit(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "run", **options)


UNIFORM = {"_target_": "scoresde.times.densities.UniformTimes"}
SPREAD = {"_target_": "scoresde.times.LowDiscrepancy"}
VP = {"_target_": "scoresde.VPSDE"}
DDPM = {"_target_": "scoresde.sde.DiscreteVP"}
RATE = {"_target_": "scoresde.train.ConstantRate"}
LOSS = {"_target_": "scoresde.DenoisingScoreMatching"}
LINEAR = {"_target_": "scoresde.sde.LinearBetas"}
UNET = {"_target_": "scoresde.nn.UNet", "shape": [1, 8, 8]}
ADAM = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-3}
TRAINING = {"_target_": "scoresde.train.Training"}
MOONS = {"_target_": "scoresde.data.two_moons"}
SCALED = {"_target_": "scoresde.model.ScaledTime", "scale": 3.0}
MODEL = {"_target_": "scoresde.ScoreModel", "sde": VP}
# One recipe, and another that says the same with more words.
SAME = {
    "a number": (VP, {**VP, "beta_min": 0.1}),
    "all numbers": (VP, {**VP, "beta_max": 20, "beta_min": 0.1}),
    "nothing": (LOSS, {**LOSS, "weighting": None, "eps": None}),
    "an object": (SPREAD, {**SPREAD, "times": UNIFORM}),
    "an object by its shorter name": (
        SPREAD,
        {**SPREAD, "times": {"_target_": "scoresde.times.UniformTimes"}},
    ),
    "an object of a factory": (DDPM, {**DDPM, "betas": {**LINEAR, "steps": 1000}}),
    "nested": ([{"a": DDPM}], [{"a": {**DDPM, "betas": LINEAR}}]),
    "a list for a tuple": (UNET, {**UNET, "multipliers": [1, 2]}),
    "of torch": (ADAM, {**ADAM, "betas": [0.9, 0.999], "amsgrad": False}),
    "of a function": (MOONS, {**MOONS, "noise": 0.1, "seed": 0}),
    "a rate": (TRAINING, {**TRAINING, "rate": {**RATE, "warmup": 0}, "augment": None}),
    "what is free": ({**TRAINING, "keep": 2}, {**TRAINING, "keep": 9, "log_every": 3}),
    "an old name": (
        {**MODEL, "label": SCALED},
        {**MODEL, "_target_": "scoresde.model.ScoreModel", "noise_label": SCALED},
    ),
    "an old class": (
        {"_target_": "scoresde.bound.Folded"},
        {
            "_target_": "scoresde.times.FoldedTimes",
            "times": {"_target_": "scoresde.times.UniformTimes"},
        },
    ),
}


def same(there, here):
    """Takes a checkpoint's recipe for that of a training, or says what differs."""
    state = State(None, [], None, None, here, 0, None)
    state._compare(Checkpoint(there, {}, {}, 0, 0))


@pytest.mark.parametrize("name", SAME)
def test_a_recipe_that_says_the_same_is_the_same_training(name):
    one, other = ({"train": tree} for tree in SAME[name])
    assert one != other
    same(one, other)
    same(other, one)
    same(one, one)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (VP, {**VP, "beta_min": 0.2}, r"a\.beta_min .*0\.1.*0\.2"),
        ({**VP, "beta_max": 10.0}, VP, r"a\.beta_max .*10\.0.*20\.0"),
        (VP, DDPM, r"a\._target_ .*scoresde\.VPSDE.*scoresde\.DiscreteVP"),
        (
            DDPM,
            {**DDPM, "betas": {**LINEAR, "steps": 10}},
            r"a\.betas\.steps .*1000.*10",
        ),
        (
            SPREAD,
            {**SPREAD, "times": {"_target_": "scoresde.times.ImportanceTimes"}},
            r"times\._target_ .*UniformTimes.*ImportanceTimes",
        ),
        ({**SPREAD, "times": None}, SPREAD, r"a\.times\._target_ .*None.*scoresde"),
        (
            {**ADAM, "betas": [0.9, 0.99]},
            ADAM,
            r"a\.betas .*\[0.9, 0.99\].*\[0.9, 0.9",
        ),
        (MOONS, {**MOONS, "noise": 0.2}, r"a\.noise .*0\.1.*0\.2"),
        ({**VP, "odd": 1}, VP, r"a\.odd .*\b1\b.*None"),
        ({**MODEL, "label": SCALED}, MODEL, r"a\.noise_label\._target_ .*scoresde\.ScaledTime"),
        ({"_target_": "os.system"}, VP, r"a\._target_ .*os\.system.*scoresde\.VPSDE"),
    ],
)
def test_what_differs_is_named_with_both_values(there, here, message):
    with pytest.raises(OtherRunError, match=message):
        same({"a": there}, {"a": here})


def test_a_deep_recipe_is_not_compared():
    tree = {}
    for _ in range(400):
        tree = {"a": tree}
    same(tree, tree)
    for _ in range(2000):
        tree = {"a": tree}
    with pytest.raises(InputError, match="nested too deeply"):
        same(tree, {})


def test_an_older_training_goes_on_with_words_that_were_left_out(tmp_path):
    said = {**LOSS, "weighting": None, "reduce_mean": True}
    fit(tmp_path / "whole")
    with pytest.raises(CrashError):
        fit(tmp_path / "run", Interrupting(8, crash), recipe={"loss": LOSS})
    fit(tmp_path / "run", recipe={"loss": said})
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert Checkpoint.load(tmp_path / "run").recipe == {"loss": said}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_file_of_a_run_is_read_under_todays_names(tmp_path):
    """The newest, the best, stored averages, and the parts of a sharded one."""
    old, source = {"_target_": "scoresde.sample.Loop"}, {"label": {"samplers": [1]}}
    recipe = {"samplers": {"a": old}, **source}
    fit(tmp_path, recipe=recipe, snapshots=2, validate_every=5)
    Checkpoint.load(tmp_path).save_shards(tmp_path / "shards")
    paths = [tmp_path, *tmp_path.rglob("*.pt"), tmp_path / "shards"]
    assert {"best.pt", "checkpoint.pt"} < {path.name for path in paths}
    assert len(list(tmp_path.glob("snapshots/*.pt"))) >= 2
    found = [*map(Checkpoint.load, paths), Snapshots.of(tmp_path).average(0.1)]
    for one in found:
        assert one.recipe["samplers"]["a"] == {"_target_": "scoresde.sample.RestartInterval"}
        assert one.recipe["label"] == source["label"]


def test_a_checkpoint_keeps_its_recipe_as_it_was_written(tmp_path):
    recipe = {"a": {"_target_": "scoresde.sample.Loop"}}
    Checkpoint(recipe, {}, {}, 0, 0).save(tmp_path / "checkpoint.pt")
    there = Checkpoint.load(tmp_path)
    assert there.source == recipe != there.recipe
    there.save(tmp_path / "checkpoint.pt")
    assert Checkpoint.load(tmp_path).source == there.recipe
    assert "source" not in torch.load(tmp_path / "checkpoint.pt")


def test_a_checkpoint_that_cannot_be_gone_on_with_is_told(tmp_path):
    fit(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.pt"):
        content = torch.load(path)
        path.unlink()
        torch.save({k: v for k, v in content.items() if k not in ("state", "digest")}, path)
    with pytest.raises(InputError, match=r"older release.*hydra\.run\.dir"):
        fit(tmp_path / "run")


def test_a_full_disk_is_told_while_the_work_is_safe(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    free = iter([10**9, 10**9, 100])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    with pytest.raises(InputError, match=r"\b0 MiB.*step 6\b"):
        fit(tmp_path / "run")
    assert Checkpoint.load(tmp_path / "run").step == 6


def test_no_room_at_all_is_told_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(InputError, match=r"\b0 MiB; nothing"):
        fit(tmp_path / "run", Interrupting(0, crash))


def test_a_state_fits_the_size_that_is_kept_free(tmp_path):
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=16, multipliers=(1,), blocks=1, attention=())
    data = torch.randint(0, 17, (40, 1, 8, 8), dtype=torch.uint8)
    from scoresde.data import Dataset
    from scoresde.train import EMA
    from scoresde.train.precision import LossScale

    model = ScoreModel(net, VPSDE())
    train(
        model,
        Dataset.of("noise", [data] * 3, levels=17),
        DenoisingScoreMatching(),
        Training(steps=1, batch_size=8),
        torch.optim.Adam,
        tmp_path,
        progress=False,
    )
    scale = LossScale("float32", model.device)
    adam = torch.optim.Adam(model.parameters())
    state = State(model, [EMA(model)], adam, scale, {}, 0, tmp_path)
    size = (tmp_path / "checkpoint.pt").stat().st_size
    assert 0.8 < state.size() / size < 1.1


# --- The program ---------------------------------------------------------------------------------


def command(folder):
    return [
        *(sys.executable, "-m", "scoresde.run", "network=mlp", f"train.steps={STEPS}"),
        *("train.save_every=20", "examples=4", "count=4", "baselines=false"),
        *("samplers.euler_maruyama.steps=2", "samplers.predictor_corrector.steps=2"),
        *("likelihood.rtol=0.1", "likelihood.atol=0.1", "likelihood.probes=1"),
        *("device=cpu", "progress=false", f"hydra.run.dir={folder}"),
    ]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def begun(folder):
    """Starts the program, and waits for a checkpoint of its own."""
    path = folder / "checkpoint.pt"
    before = path.stat().st_mtime_ns if path.exists() else 0
    process = subprocess.Popen(
        command(folder),
        env=ENVIRONMENT,
        cwd=folder.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_mtime_ns > before:
            break
        time.sleep(0.01)
    return process


def test_killed_and_started_again_the_program_ends_with_the_same_weights(tmp_path):
    """Killed without warning, then stopped with one, and then left to its end."""
    process = begun(tmp_path / "run")
    time.sleep(random.Random(0).random() / 4)
    process.kill()
    process.communicate()
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "running"

    process = begun(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "repeat the command with" in said.decode()
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "stopped"
    assert Checkpoint.load(tmp_path / "run").step < STEPS

    for name in ("run", "whole"):
        program(*command(tmp_path / name)[3:], cwd=tmp_path)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run/.hydra").mkdir(parents=True)
    (tmp_path / "run/.hydra/overrides.yaml").write_text("[of the other]")
    with (tmp_path / "run/.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = subprocess.run(
            command(tmp_path / "run"),
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert "Another process is using" in run.stderr
    assert not (tmp_path / "run/result.json").exists()
    assert (tmp_path / "run/.hydra/overrides.yaml").read_text() == "[of the other]"
