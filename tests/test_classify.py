"""task=classify: metrics by their closed forms, and the program from a file to a report."""

import json
import math
import re

import numpy as np
import pytest
import torch

from scoresde import GaussianMixtureModel, InputError, Likelihood, RectifiedFlow
from scoresde.data import Dataset, array
from scoresde.likelihood import GenerativeClassifier
from scoresde.metrics import accuracy, confusion, logistic_regression, reliability
from scoresde.tasks.classification import classify_examples
from scoresde.tasks.classification_report import report_classes
from scoresde.tasks.parts import Parts, Rank
from tests.test_run import TINY, program, refused

pytestmark = pytest.mark.usefixtures("undrawn")


# --- Metrics -------------------------------------------------------------------------------------


def test_accuracy_has_wilsons_error():
    label = torch.tensor([1] * 90 + [0] * 10)
    result = accuracy(label, torch.ones(100).long())
    assert (result.mean, result.count) == (0.9, 100)
    assert result.standard_error == pytest.approx(math.sqrt(0.0009 + 1 / 40_000) / 1.01)
    assert accuracy(label[:90], label[:90]).standard_error == pytest.approx(0.5 / 91)


def test_the_confusion_matrix_counts_true_classes_by_rows():
    label, truth = torch.tensor([0, 2, 2, 1, -1]), torch.tensor([0, 1, 2, 1, 0])
    assert confusion(label, truth, 3).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_the_calibration_error_by_hand():
    """Two bins: 4 of confidence 0.75 with 1 right, and one of 0.25 that is right."""
    confidence = torch.tensor([0.75, 0.75, 0.75, 0.75, 0.25]).double()
    right = torch.tensor([True, False, False, False, True])
    result = reliability(confidence, right, bins=2)
    assert result.count.tolist() == [1, 4]
    assert result.accuracy.tolist() == [1.0, 0.25]
    assert result.expected_error == pytest.approx((4 * 0.5 + 0.75) / 5)
    # E|S - 3| of Binomial(4, 3/4): 3 * 1/256 + 2 * 12/256 + 54/256 + 81/256; of one trial 3/8.
    assert result.floor == pytest.approx(((3 + 24 + 54 + 81) / 256 * 2 / 2 + 3 / 8) / 5)
    expected = [math.sqrt(0.25 * 0.75), math.sqrt(4 * 0.75 * 0.25) / 4]
    assert result.error.tolist() == pytest.approx(expected)


def test_the_floor_is_the_mean_error_of_a_calibrated_classifier():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(60, generator=g).double()
    drawn = [reliability(p, torch.rand(60, generator=g) < p) for _ in range(1000)]
    errors = torch.tensor([one.expected_error for one in drawn])
    off = float(errors.mean()) - drawn[0].floor
    assert abs(off) < 4 * float(errors.std()) / 1000**0.5
    assert float(errors.mean()) > 0.05


def test_logistic_regression_finds_the_linear_rule():
    """Two unit Gaussians at -1 and 1: the log-odds are 2 x, on any scale of the column."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    x = torch.randn(2000, 1, generator=g).double() + (2.0 * labels - 1)[:, None]
    test = torch.linspace(-2, 2, 9).double()[:, None]
    found = logistic_regression(1e4 * x, labels, 1e4 * test, 3)
    assert found[:, 2].isneginf().all()
    torch.testing.assert_close(found[:, 1] - found[:, 0], 2 * test[:, 0], atol=0.25, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accuracy(torch.ones(2), torch.ones(3)), r"\(2,\) and \(3,\)"),
        (lambda: accuracy(torch.ones(0), torch.ones(0)), r"\(0,\)"),
        (lambda: reliability(torch.tensor([1.5]), torch.tensor([True])), r"1\.5"),
        (lambda: reliability(torch.tensor([0.5]), torch.tensor([True]), 0), r"bins.*\b0\b"),
        (
            lambda: confusion(torch.tensor([0, 2]), torch.tensor([0, 1]), 2),
            r"label must be integers from 0 to 1, got \[0, 2\]",
        ),
        (
            lambda: confusion(torch.tensor([0, 1]), torch.tensor([0, -1]), 2),
            r"truth must be integers from 0 to 1, got \[-1, 0\]",
        ),
        (
            lambda: logistic_regression(
                torch.ones(3, 2), torch.ones(3).long(), torch.ones(1, 2), 2
            ),
            r"\[1\]",
        ),
        (
            lambda: logistic_regression(
                torch.ones(3, 5000), torch.arange(3), torch.ones(1, 5000), 3
            ),
            "5000",
        ),
    ],
)
def test_what_cannot_be_graded_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- A split -------------------------------------------------------------------------------------

MODEL = GaussianMixtureModel(
    [1, 1, 1], [[-2.0, 0], [2.0, 0], [0, 3.0]], [0.7] * 3, RectifiedFlow(), labels=[0, 1, 2]
)
CLASSIFIER = GenerativeClassifier(Likelihood("exact", 1e-4, 1e-4), 3)


def points(n=23, labels=True):
    truth = torch.arange(n) % 3
    x = MODEL.sample(n, seed=0, label=truth)
    if labels:
        truth[4] = -1
    known = [truth] * 3 if labels else None
    return Dataset.of("points", [x] * 3, standardise=False, labels=known)


def classified(data=None, **options):
    options = {"batch_size": 7, "progress": False, **options}
    return classify_examples(MODEL, CLASSIFIER, data or points(), **options)


def test_a_split_is_classified_by_bayes_rule(tmp_path):
    data, one = points(), classified()
    exact = MODEL.class_log_prob(data.test, 1e-4)
    torch.testing.assert_close(one.columns["posterior"].float(), exact, atol=0.02, rtol=0)
    assert torch.equal(one.label, exact.argmax(1))
    truth = data.labels[2]
    known = truth >= 0
    results = report_classes(data, one, tmp_path, title="three")
    assert results["with_class"] == 22
    assert results["accuracy"] == float((one.label == truth)[known].double().mean())
    given = MODEL.log_prob(data.test, 1e-4, label=truth)[known]
    assert results["given_class"] == pytest.approx(-float(given.mean()), abs=0.01)
    total = MODEL.log_prob(data.test, 1e-4)
    assert results["unlabelled"] == pytest.approx(-float(total.mean()), abs=0.01)
    assert results["information"] == pytest.approx(float((given - total[known]).mean()), abs=0.01)
    assert results["negative_log_posterior"] == pytest.approx(
        -float(exact[known].gather(1, truth[known, None]).mean()), abs=0.01
    )
    assert results["logistic_regression_accuracy"] > 0.8
    assert json.loads((tmp_path / "classify.json").read_text()) == results
    with np.load(tmp_path / "classes.npz") as table:
        assert table["log_prob"].shape == table["posterior"].shape == (23, 3)
        assert table["truth"].tolist() == truth.tolist()
        assert table["label"].tolist() == one.label.tolist()
        assert {"margin", "margin_error", "nfe", "index", "total_log_prob"} <= set(table.files)
    page = (tmp_path / "report.html").read_text()
    assert "logistic regression" in page
    for name in ("reliability", "confusion", "margins"):
        assert (tmp_path / f"{name}.png").exists()


def test_without_labels_there_are_predictions_alone(tmp_path):
    data = points(labels=False)
    one = classified(data)
    assert torch.equal(one.label, classified().label)
    results = report_classes(data, one, tmp_path, title="three")
    assert not {"accuracy", "information", "given_class"} & results.keys()
    assert results["with_class"] == 0
    with np.load(tmp_path / "classes.npz") as table:
        assert "truth" not in table.files
    assert "Predicted classes" in (tmp_path / "report.html").read_text()


def test_parts_are_shared_and_kept(tmp_path):
    alone, parts = classified(), Parts(tmp_path)
    for index in range(2):
        shared = classified(parts=Parts(tmp_path, Rank(index, 2)))
        assert torch.equal(shared.columns["log_prob"], alone.columns["log_prob"])
    kept = parts.load(range(0, 7))
    assert kept["log_prob"].shape == (7, 3)
    parts.save(range(0, 7), {**kept, "margin": kept["margin"] + 1})
    again = classified(parts=parts)
    assert torch.equal(again.columns["margin"][:7], alone.columns["margin"][:7] + 1)


def test_some_examples_are_those_of_the_likelihood_task():
    one = classified(examples=5)
    whole = classified()
    assert torch.equal(one.label, whole.label[one.rows])
    assert len(one.rows) == 5


def test_a_class_that_the_model_lacks_is_refused():
    data = points()
    strange = [part.clone() for part in data.labels]
    strange[2][0] = 7
    data = Dataset.of("points", [data.test] * 3, standardise=False, labels=strange)
    with pytest.raises(InputError, match=r"label .*classes=3.*7"):
        classified(data)


# --- Labels in a file ----------------------------------------------------------------------------


def test_an_array_brings_its_labels_to_each_split(tmp_path):
    x = np.arange(40.0).reshape(20, 2)
    np.savez(tmp_path / "t.npz", x=x, y=(np.arange(20) % 3).astype(np.int16))
    data = array(tmp_path / "t.npz", labels="y")
    for raw, label in zip((data.train, data.validation, data.test), data.labels, strict=True):
        assert torch.equal(label, (raw[:, 0] / 2).long() % 3)
    whole = array(tmp_path / "t.npz", labels="y", fractions=None, standardise=False)
    assert whole.undivided
    assert whole.labels[2].tolist() == [i % 3 for i in range(20)]


# --- The program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table with classes, rows without, and a run of two updates on the table."""
    place = tmp_path_factory.mktemp("person")
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 3)) + 3 * y[:, None]
    np.savez(place / "table.npz", x=x, y=y)
    np.save(place / "new.npy", x[:6])
    np.save(place / "plain.npy", x)
    np.savez(place / "strange.npz", x=x, y=y + 2)
    given = ("data=array", "data.path=table.npz", "data.key=x", "data.labels=y")
    idle = ("euler_maruyama", "predictor_corrector")
    tiny = (text for text in TINY if not any(name in text for name in idle))
    without = (f"~sampler@samplers.{name}" for name in idle)
    small = ("network=mlp", "network.width=8", *tiny, *without)
    for classes in (3, 1, 0):
        words = (given[0], "data.path=plain.npy") if classes == 1 else given
        run = (f"network.classes={classes}", f"hydra.run.dir=run{classes}")
        program(*words, *small, *run, cwd=place)
    return place


def classify(folder, *words, run="run3"):
    quick = ("likelihood.probes=2", "progress=false", "batch_size=4")
    return ("task=classify", f"checkpoint={folder / run}", *quick, *words)


def test_a_table_is_classified_and_resumed(folder, tmp_path):
    out = ("hydra.run.dir=out",)
    program(*classify(folder, *out), cwd=folder)
    first = json.loads((folder / "out/classify.json").read_text())
    assert first["count"] == first["with_class"] == 6
    assert "logistic_regression_accuracy" in first
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "out/parts").glob("0*.npz")}
    assert len(stamps) == 2
    program(*classify(folder, *out, "baselines=false"), cwd=folder)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    again = json.loads((folder / "out/result.json").read_text())
    assert again["accuracy"] == first["accuracy"]
    assert "logistic_regression_accuracy" not in again
    assert "prior" not in refused(*classify(folder, *out, "seed=1"), cwd=folder)
    assert "accuracy" in program("runs", str(folder), cwd=tmp_path).stdout


def test_rows_without_classes_from_another_folder(folder, tmp_path):
    words = ("data=array", f"data.path={folder / 'new.npy'}", "hydra.run.dir=out")
    said = program(*classify(folder, *words, "prior=[0.5,0.25,0.25]"), cwd=tmp_path)
    assert "unknown" in (tmp_path / "out/run.log").read_text() + said.stdout
    with np.load(tmp_path / "out/classes.npz") as table:
        assert table["label"].shape == (6,)
        joint = table["log_prob"] + np.log([0.5, 0.25, 0.25])
        difference = table["posterior"] - joint
        np.testing.assert_allclose(difference, difference[:, :1].repeat(3, 1), atol=1e-12)


@pytest.mark.parametrize(
    ("words", "run", "message"),
    [
        ((), "run0", "network.classes=C"),
        ((), "run1", "classes must be at least 2, got 1"),
        (
            ("data=array", "data.path=strange.npz", "data.key=x", "data.labels=y"),
            "run3",
            "label must be .*classes=3 .*4",
        ),
        (("examples=0",), "run3", r"examples.*\b0\b"),
        (("prior=[0.5,0.5]",), "run3", r"prior .*\[0\.5, 0\.5\]"),
        (("prior=[0.5,0.6,-0.1]",), "run3", r"prior .*-0\.1"),
        (("prior=some",), "run3", "prior .*some"),
        (("likelihood.target_error=0.1",), "run3", r"target_error .*0\.1"),
        (("draws=4",), "run3", "draws"),
        (("sampler=ddim",), "run3", "sampler"),
    ],
)
def test_what_the_task_cannot_use_is_a_sentence(words, run, message, folder):
    said = refused(*classify(folder, *words, run=run), "hydra.run.dir=refused", cwd=folder)
    assert re.search(message, said), said
    assert len(said.strip().splitlines()) == 1


def test_prior_serves_no_other_task(folder):
    words = ("task=likelihood", f"checkpoint={folder / 'run3'}", "prior=[1.0]")
    assert "task=likelihood has no option prior" in refused(*words, cwd=folder)
