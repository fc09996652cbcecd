"""Likelihoods over a whole split: every example once, kept, resumed, shared, compared."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from scoresde import VPSDE, GaussianModel, InputError, Likelihood, VariationalBound
from scoresde.configuration import device_of
from scoresde.data import Dataset, TruncatedNormalDequantisation, UniformDequantisation
from scoresde.metrics import auroc
from scoresde.recipe import build
from scoresde.tasks import evaluate_likelihood
from scoresde.tasks.evaluation import Draws
from scoresde.tasks.identity import fingerprint
from scoresde.tasks.likelihood_report import Evaluated, check_comparable, report_likelihood
from scoresde.tasks.parts import Parts, Rank, gather
from scoresde.tasks.runs import list_runs
from scoresde.train import Checkpoint
from tests.test_run import program, refused

MODEL = GaussianModel(torch.zeros(2).double(), 1.0, VPSDE())


def normal(n=23):
    points = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Dataset.of("normal", [points] * 3, standardise=False)


def integers(levels=4):
    values = torch.randint(0, levels, (12, 2), generator=torch.Generator().manual_seed(0))
    return Dataset.of("dice", [values.to(torch.uint8)] * 3, levels=levels)


def evaluate(data=None, likelihood=None, **options):
    likelihood = likelihood or Likelihood(2, 1e-3, 1e-3)
    options = {"batch_size": 5, "progress": False, **options}
    return evaluate_likelihood(MODEL, likelihood, data or normal(), **options)


# --- Pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 5, 23, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_pieces_of_every_process_cover_all_examples_once(size, ranks, tmp_path):
    for index in range(ranks):
        pieces = Parts(tmp_path, Rank(index, ranks)).pieces(23, size)
        assert sorted(i for piece in pieces for i in piece) == list(range(23))


def test_processes_begin_with_different_pieces(tmp_path):
    firsts = [Parts(tmp_path, Rank(index, 3)).pieces(30, 5)[0] for index in range(3)]
    assert len(set(firsts)) == 3


def test_a_finished_piece_is_read_and_not_computed(tmp_path):
    calls = []

    def compute(piece):
        calls.append(piece)
        return {"value": torch.tensor(piece, dtype=torch.float64)}

    parts = Parts(tmp_path)
    first = list(gather(parts, 7, 3, compute))
    again = list(gather(parts, 7, 3, compute))
    assert len(calls) == 3
    assert [c["value"].tolist() for _, c, _ in first] == [c["value"].tolist() for _, c, _ in again]
    assert [fresh for *_, fresh in first + again] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle", "short", "words", "scalar"])
def test_a_damaged_piece_is_computed_again(damage, tmp_path):
    parts, piece = Parts(tmp_path), range(0, 3)
    parts.save(piece, {"value": torch.arange(3.0)})
    (path,) = tmp_path.glob("*.npz")
    content = path.read_bytes()
    if damage == "pickle":
        np.savez(path, value=np.array([print, print, print], dtype=object))
    elif damage in ("short", "words", "scalar"):
        value = {"short": np.zeros(2), "words": np.array(["a", "b", "c"]), "scalar": np.zeros(())}
        np.savez(path, value=value[damage], _mark=np.array(""))
    else:
        bad = {"empty": b"", "cut": content[: len(content) // 2], "text": b"no"}
        path.write_bytes(bad[damage])
    assert parts.load(piece) is None


def test_pieces_of_another_evaluation_are_refused_by_what_differs(tmp_path):
    Parts(tmp_path).claim({"split": "test", "seed": "0"})
    Parts(tmp_path).claim({"split": "test", "seed": "0"})
    with pytest.raises(InputError, match=r"seed = 0.*\b1\b"):
        Parts(tmp_path).claim({"split": "test", "seed": "1"})


def test_a_piece_of_another_evaluation_is_computed_again(tmp_path):
    """Whole, of the right name, length and columns, but without our mark."""
    ours = Parts(tmp_path / "ours").claim({"seed": "0"})
    theirs = Parts(tmp_path / "theirs").claim({"seed": "1"})
    truth = evaluate(parts=ours)
    evaluate(seed=1, parts=theirs)
    for path in theirs.folder.glob("0*.npz"):
        path.replace(ours.folder / path.name)
    np.savez(ours.folder / "00000000-00000005.npz", value=np.zeros(5))
    assert torch.equal(evaluate(parts=ours).log_prob, truth.log_prob)


def test_an_unreadable_identity_is_a_sentence(tmp_path):
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(InputError, match="remove the folder"):
        Parts(tmp_path).claim({"seed": "0"})


def test_a_fingerprint_sees_the_order_of_rows_and_no_threads():
    x = torch.randn(200, 700, generator=torch.Generator().manual_seed(0))
    assert fingerprint(x) != fingerprint(x.flip(0)) != fingerprint(x.flip(0).reshape(700, 200))
    assert fingerprint(x) == fingerprint(x.T.contiguous().T)
    assert fingerprint(torch.tensor(1.0), torch.zeros(2, dtype=torch.uint8))


# --- Conditioned ---------------------------------------------------------------------------------


def test_the_remainder_is_not_dropped_and_batches_do_not_matter():
    whole, pieces = evaluate(batch_size=23), evaluate(batch_size=5)
    assert len(pieces.values) == 23
    torch.testing.assert_close(pieces.log_prob, whole.log_prob, rtol=0, atol=1e-12)
    assert torch.equal(pieces.nfe, whole.nfe)


def test_processes_together_are_one(tmp_path):
    alone = evaluate()
    for index in range(3):
        shared = evaluate(parts=Parts(tmp_path, Rank(index, 3)))
        assert torch.equal(shared.log_prob, alone.log_prob)


def test_the_table_has_a_row_for_every_example(tmp_path):
    result = evaluate()
    result.save(tmp_path)
    with np.load(tmp_path / "likelihood.npz") as table:
        assert sorted(table.files) == sorted(
            ["index", "value", "standard_error", "log_prob", "nfe", "seconds"]
        )
        assert table["index"].tolist() == list(range(23))
        np.testing.assert_allclose(-table["log_prob"], table["value"])  # nats of the same units
    summary = json.loads((tmp_path / "likelihood.json").read_text())
    assert summary["count"] == 23
    assert summary["mean"] == pytest.approx(float(result.values.mean()))


def test_the_mismatch_of_the_prior_is_that_of_the_moments():
    """Standard normal data are standard normal at every time of VP; a shift of 3 is not."""
    data = normal(2000)
    shifted = Dataset.of("shifted", [data.train + 3] * 3, standardise=False)
    assert evaluate(data, examples=2).mismatch < 1e-5
    alpha = float(VPSDE().alpha(1.0))
    expected = 0.5 * 2 * (3 * alpha) ** 2
    assert evaluate(shifted, examples=2).mismatch == pytest.approx(expected, rel=0.1)


def test_an_example_that_fails_is_counted_and_left_out():
    data = normal(4)
    broken = Likelihood("exact", 1e-3, 1e-3, strict=False)
    model = Breaks(MODEL)
    result = evaluate_likelihood(model, broken, data, progress=False)
    assert result.summary()["failed"] == int((data.test[:, 0] > 0).sum())
    assert math.isfinite(result.mean)
    assert result.summary()["mean_log_prob"] == pytest.approx(-result.mean)
    assert result.summary()["standard_error_log_prob"] == pytest.approx(result.standard_error)


class Breaks(GaussianModel):
    """Not finite where the first number is positive."""

    def __init__(self, model):
        super().__init__(torch.zeros(2).double(), 1.0, model.sde)

    def noise(self, x, t):
        return torch.where(x[:, :1] > 0, math.nan, super().noise(x, t))


def test_the_variational_bound_is_evaluated_likewise():
    result = evaluate(likelihood=VariationalBound(draws=4))
    assert len(result.values) == 23
    exact = evaluate(likelihood=Likelihood("exact", 1e-4, 1e-4))
    assert result.mean == pytest.approx(exact.mean, abs=5 * result.standard_error + 0.2)


# --- Several dequantisations ---------------------------------------------------------------------


def test_one_uniform_draw_is_the_plain_evaluation():
    likelihood = Likelihood("exact", 1e-4, 1e-4)
    plain = evaluate(integers(), likelihood)
    drawn = evaluate(integers(), likelihood, draws=Draws(1))
    torch.testing.assert_close(drawn.values, plain.values, rtol=1e-6, atol=1e-6)


def test_importance_weights_tighten_the_bound():
    likelihood = Likelihood("exact", 1e-3, 1e-3)
    average, weighted = (
        evaluate(integers(), likelihood, draws=Draws(16, weighted=w)) for w in (False, True)
    )
    assert bool((weighted.values < average.values).all())
    assert bool((average.errors > 0).all())


def test_draws_need_integers():
    with pytest.raises(InputError, match="real-valued"):
        evaluate(draws=Draws(4, UniformDequantisation()))


def test_a_dequantisation_too_narrow_for_the_levels_is_refused():
    with pytest.raises(InputError, match="std"):
        evaluate(integers(4), draws=Draws(2, TruncatedNormalDequantisation(1e-9)))


# --- Other data ----------------------------------------------------------------------------------


def test_the_area_is_that_of_scikit_learn_ties_included():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (40,), generator=generator).double() + 1
    y = torch.randint(0, 6, (70,), generator=generator).double()
    labels = [1] * 40 + [0] * 70
    assert auroc(x, y)[0] == pytest.approx(roc_auc_score(labels, torch.cat((x, y)).numpy()))


def test_the_error_of_the_area_is_truthful():
    generator = torch.Generator().manual_seed(0)
    draws = [
        auroc(torch.randn(50, generator=generator) + 1, torch.randn(80, generator=generator))
        for _ in range(400)
    ]
    areas, errors = torch.tensor(draws).T
    assert float(errors.square().mean() / areas.var()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("values", [torch.ones(0), torch.tensor([1.0, math.nan])])
def test_numbers_that_cannot_be_ranked_are_refused(values):
    with pytest.raises(InputError, match=rf"larger.*\({len(values)},\)"):
        auroc(values, torch.ones(2))


@pytest.mark.parametrize("other", [normal(3).train[:, :1], integers().train])
def test_data_of_another_kind_are_refused(other):
    levels = 4 if other.dtype == torch.uint8 else None
    with pytest.raises(InputError, match=r"ood.*levels=None.*got other"):
        check_comparable(normal(), Dataset.of("other", [other] * 3, levels=levels))


def test_two_sets_of_images_of_one_name_are_both_reported(tmp_path):
    pixels = torch.randint(0, 4, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    model = GaussianModel(torch.zeros(1, 4, 4), 1.0, VPSDE())
    both = []
    for values in (pixels, 3 * (pixels > 1)):
        data = Dataset.of("same", [values.to(torch.uint8)] * 3, levels=4)
        result = evaluate_likelihood(model, Likelihood(1, 0.1, 0.1), data, progress=False)
        both.append(Evaluated(data, result))
    results = report_likelihood(*both, tmp_path, title="any")
    scores = [-e.evaluation.values for e in both]
    area = roc_auc_score([1] * 20 + [0] * 20, torch.cat(scores).numpy())
    assert results["auroc"] == pytest.approx(area)
    assert results["mean_log_prob"] == pytest.approx(float(both[0].evaluation.log_prob.mean()))
    assert len(list(tmp_path.glob("*_likely_*.png"))) == 4
    page = (tmp_path / "report.html").read_text()
    assert "same (ood) (test)" in page
    assert "AUROC" in page


# --- The program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The checkpoint of an untrained network for two moons."""
    network = {"_target_": "scoresde.nn.MLP", "shape": 2, "width": 16, "depth": 2}
    model = {
        "_target_": "scoresde.ScoreModel",
        "network": network,
        "sde": {"_target_": "scoresde.VPSDE"},
    }
    data = {"_target_": "scoresde.data.two_moons", "count": 1000}
    likelihood = {"_target_": "scoresde.Likelihood", "probes": 2}
    recipe = {
        "name": "moons",
        "model": model,
        "data": data,
        "likelihood": likelihood,
        "units": build(data).codec.describe(),
    }
    weights = build(model).state_dict()
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    Checkpoint(recipe, weights, weights, step=0, seed=0).save(path)
    return path


def start(folder, *overrides, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "scoresde.run", *overrides, f"hydra.run.dir={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def task(run, *more):
    return (
        "task=likelihood",
        f"checkpoint={run}",
        "examples=48",
        "batch_size=4",
        "progress=false",
        *more,
    )


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An evaluation by one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    program(*task(run), f"hydra.run.dir={folder}", cwd=folder)
    return folder


def column(folder, name="log_prob", table="likelihood"):
    with np.load(folder / f"{table}.npz") as file:
        return file[name].tolist()


def test_killed_and_started_again_it_equals_the_uninterrupted(run, whole, tmp_path):
    victim = start(tmp_path / "killed", *task(run))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed/parts").glob("0*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list_runs(tmp_path)[0]["state"] == "running"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert list_runs(tmp_path)[0]["state"] == "killed"
    done = len(list((tmp_path / "killed/parts").glob("0*.npz")))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed/parts").glob("0*.npz")}
    assert 1 <= done < 12
    program(*task(run), "hydra.run.dir=killed", cwd=tmp_path)
    for name in ("index", "value", "standard_error", "log_prob", "nfe"):
        assert column(tmp_path / "killed", name) == column(whole, name)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    said = refused(*task(run, "seed=1"), "hydra.run.dir=killed", cwd=tmp_path)
    assert "seed = 0, got 1" in said
    # The refusal leaves the finished evaluation as it was.
    assert json.loads((tmp_path / "killed/result.json").read_text())["status"] == "ok"


def test_two_processes_equal_one_and_tell_data_apart(run, whole, tmp_path):
    ranks = [
        start(
            tmp_path / "two",
            *task(run, "ood=gaussian_ring"),
            RANK=str(index),
            WORLD_SIZE="2",
        )
        for index in range(2)
    ]
    outputs = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert column(tmp_path / "two") == column(whole)
    assert len(column(tmp_path / "two", table="ood")) == 48
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert 0 <= result["auroc"] <= 1
    assert (tmp_path / "two/report.html").exists()


def test_processes_without_a_common_folder_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "hydra.run.dir=FOLDER" in refused(*task(run), cwd=tmp_path)


def test_the_program_refuses_draws_of_real_numbers(run, tmp_path):
    draws = ("draws=2", "weighted=true")
    assert "real-valued" in refused(*task(run, *draws), "hydra.run.dir=real", cwd=tmp_path)


def test_every_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)  # tries the device
    assert device_of("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert device_of("auto") == device_of("cuda") == torch.device("cuda:2")
    assert device_of("cuda:1") == torch.device("cuda:1")
    assert device_of("cpu") == torch.device("cpu")
