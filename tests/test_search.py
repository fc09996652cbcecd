"""Searches by Optuna: they go on, survive failures, and leave a recipe; sweeps by launchers."""

import json

import pytest

from scoresde import InputError
from scoresde.tasks.search import Choice, Interval, Search, space_of
from scoresde.train import TrainingStopped
from tests.test_run import TINY, program, refused

SPACE = {"optimizer": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "train": {"ema": [0.9, 0]}}


def bowl(values, folder):
    return {"nats": (values["x"] - 0.3) ** 2, "nfe": 3.0, "data": "moons"}


@pytest.fixture(autouse=True)
def optuna():
    return pytest.importorskip("optuna")


def test_a_space_is_intervals_and_choices_in_their_places():
    assert space_of(SPACE) == {
        "optimizer.lr": Interval(1e-4, 1e-2, True),
        "train.ema": Choice([0.9, 0]),
    }


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 3},
        {"a": []},
        {"a": {}},
        {"a": {"low": 1}},
        {"a": {"low": 2, "high": 1}},
        {"a": {"low": 0, "high": 1, "log": True}},
        {"a": {"low": 0, "high": 1, "step": 2}},
        {"a": [[1], [2]]},
    ],
    ids=str,
)
def test_what_is_no_space_is_a_sentence(tree):
    with pytest.raises(InputError, match=r"search\.space\.a"):
        space_of(tree)


def test_a_search_comes_nearer_and_leaves_table_figure_and_recipe(tmp_path):
    result = Search({"x": Interval(-5.0, 5.0)}, 25, tmp_path).run(bowl)
    assert result["best_value"] < 0.5
    rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(rows) == 26
    assert (tmp_path / "search.png").stat().st_size > 1000
    recipe = (tmp_path / "experiment/best.yaml").read_text()
    assert recipe.startswith("# @package _global_\n")
    assert json.loads(recipe.split("\n", 1)[1])["x"] == pytest.approx(0.3, abs=1)


def test_whole_numbers_stay_whole(tmp_path):
    seen = []

    def objective(values, folder):
        seen.append(values["x"])
        return {"nats": 1.0}

    Search({"x": Interval(1, 9)}, 3, tmp_path).run(objective)
    assert all(isinstance(value, int) for value in seen)


def test_a_trial_that_fails_is_a_row(tmp_path):
    def objective(values, folder):
        if folder.name == "trial_0001":
            raise InputError("too wide")
        return bowl(values, folder)

    assert Search({"x": Interval(-1.0, 1.0)}, 3, tmp_path).run(objective)["trials"] == 2
    assert "InputError: too wide" in (tmp_path / "summary.csv").read_text()


def test_where_all_fail_the_first_reason_is_told(tmp_path):
    def objective(values, folder):
        raise InputError("too wide")

    with pytest.raises(InputError, match=r"All 2 trials failed.*too wide"):
        Search({"x": Interval(-1.0, 1.0)}, 2, tmp_path).run(objective)


@pytest.mark.parametrize(
    "stop", [TrainingStopped(3, 15), KeyboardInterrupt()], ids=["term", "int"]
)
def test_a_search_that_was_stopped_goes_on_with_the_same_trial(stop, tmp_path):
    seen = []

    def objective(values, folder):
        seen.append((folder.name, values["x"]))
        if len(seen) == 2:
            raise stop
        return bowl(values, folder)

    search = Search({"x": Interval(-1.0, 1.0)}, 3, tmp_path)
    with pytest.raises(type(stop)):
        search.run(objective)
    assert search.run(objective)["trials"] == 3
    assert seen[2] == seen[1]
    assert len({x for _, x in seen}) == 3
    search.run(objective)
    assert len(seen) == 4


def test_an_unknown_metric_names_what_there_is(tmp_path):
    with pytest.raises(InputError, match=r"search.metric.*nats, nfe.*fid"):
        Search({"x": Interval(-1.0, 1.0)}, 1, tmp_path, metric="fid").run(bowl)


# --- The program ---------------------------------------------------------------------------------

SMALL = [*TINY, "network=mlp", "examples=4"]  # digits have fewer figures than the plane


def test_the_program_searches_and_its_best_recipe_can_be_trained(tmp_path):
    program(
        "task=search",
        "search.trials=2",
        "+search.space.optimizer.lr={low:1e-4,high:1e-2,log:true}",
        "+search.space.network.width=[8,12]",
        *SMALL,
        "hydra.run.dir=search",
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "search/result.json").read_text())
    assert result["trials"] == 2
    assert (tmp_path / "search/trial_0001/checkpoint.pt").exists()
    assert "Real validation examples" in (tmp_path / "search/trial_0001/report.html").read_text()
    best = json.loads(result["best"][0].partition("=")[2])
    again = ["--config-dir", "search", "--cfg", "job"]
    shown = program("+experiment=best", *SMALL, *again, cwd=tmp_path)
    assert f"lr: {best}" in shown.stdout


@pytest.mark.parametrize(
    ("space", "said"),
    [("+search.space.sde=[vp,ve]", "search.space.sde"), ("seed=0", "search.space")],
)
def test_what_cannot_be_searched_is_a_sentence(space, said, tmp_path):
    assert said in refused("task=search", space, "hydra.run.dir=search", cwd=tmp_path)


# --- Sweeps by launchers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "seeds", "statuses"),
    [("joblib", "0,-1", ["ok", "failed"]), ("submitit_local", "0", ["ok"])],
)
def test_a_sweep_by_a_launcher_has_its_table(launcher, seeds, statuses, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    program(
        "--multirun",
        f"hydra/launcher={launcher}",
        f"seed={seeds}",
        *SMALL,
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
        code=int("failed" in statuses),
    )
    rows = (tmp_path / "sweep/summary.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == ["status", *statuses]


def test_the_launcher_of_slurm_asks_for_what_it_is_told(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    shown = program(
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.timeout_min=120",
        "hydra.launcher.signal_delay_s=120",
        "--cfg",
        "hydra",
        cwd=tmp_path,
    )
    for line in ("SlurmLauncher", "gpus_per_node: 1", "timeout_min: 120", "signal_delay_s: 120"):
        assert line in shown.stdout
