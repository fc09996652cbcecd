"""What is said of a training: overfitting, divergence, copies, samples against data in numbers."""

import csv
import json
import logging
import math

import numpy as np
import pytest
import torch

from scoresde import VPSDE, GaussianModel, InputError, Likelihood
from scoresde.codec import Affine
from scoresde.data import Dataset
from scoresde.metrics import Moments, nearest
from scoresde.report import Score
from scoresde.sample import DDIM, EulerMaruyama
from scoresde.tasks import report_training
from scoresde.tasks.comparison import Neighbours, compare
from scoresde.tasks.report import Trained, _baselines
from scoresde.tasks.verdict import divergence, overfitting


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def losses(*values):
    return [{"step": 500 * (i + 1), "validation_loss": v} for i, v in enumerate(values)]


# --- Overfitting and divergence ------------------------------------------------------------------


def test_a_risen_held_out_loss_is_said_with_both_values_and_the_remedy():
    said = overfitting(losses(0.1035, 0.11, 0.1273), kept=True)
    for part in ("update 500 (0.1035)", "0.1273", "update 1500", "weights=best"):
        assert part in said
    assert "weights=best" not in overfitting(losses(0.1035, 0.1273), kept=False)


@pytest.mark.parametrize(
    "records",
    [[], losses(0.2, 0.1), losses(0.1, 0.104), losses(None), [{"step": 3, "loss": 1.0}]],
)
def test_a_held_out_loss_that_has_not_clearly_risen_is_not_mentioned(records):
    assert overfitting(records, kept=True) == ""


def test_of_a_step_that_was_done_twice_the_last_record_counts():
    assert overfitting([*losses(0.1, 0.5), *losses(0.45, 0.4)], kept=True) == ""


def test_a_model_worse_than_a_gaussian_is_said():
    gaussian = Score("Gaussian", 1.911, 0.02, "nats")
    said = divergence(Score("this model", 2.213, 0.02, "nats"), [gaussian])
    assert "2.213 nats" in said
    assert "1.911" in said
    for own in (1.5, 1.92, math.nan):
        assert divergence(Score("this model", own, 0.02, "nats"), [gaussian]) == ""
    assert divergence(Score("this model", 9.0, math.nan, "nats"), []) == ""


# --- Moments and neighbours ----------------------------------------------------------------------


def test_moments_are_those_of_numpy():
    x = noise(101, 3) @ noise(3, 3, seed=1) + 5
    found = Moments.of(x)
    rows = x.double().numpy()
    np.testing.assert_allclose(found.mean, rows.mean(0))
    np.testing.assert_allclose(found.std, rows.std(0))
    np.testing.assert_allclose(found.quantiles, np.quantile(rows, [0.05, 0.5, 0.95], axis=0).T)
    np.testing.assert_allclose(found.correlation, np.corrcoef(rows.T), atol=1e-12)


def test_channels_are_measured_over_all_places():
    x = noise(7, 2, 4, 5)
    found = Moments.of(x)
    np.testing.assert_allclose(found.mean, x.double().mean((0, 2, 3)))
    np.testing.assert_allclose(found.std, x.double().movedim(1, 0).flatten(1).std(1, correction=0))


def test_discrepancy_is_in_standard_deviations_and_correlations_name_their_columns():
    x = noise(4000, 3)
    y = x.clone()
    y[:, 1] += 0.5 * x[:, 1].std(correction=0)
    off = Moments.of(x).discrepancy(Moments.of(y))
    np.testing.assert_allclose(off, [0, 0.5, 0], atol=1e-6)
    y = torch.stack([x[:, 0], x[:, 1], x[:, 0]], dim=1)
    value, i, j = Moments.of(x).correlations_off(Moments.of(y))
    assert (i, j) == (0, 2)
    assert value == pytest.approx(1, abs=0.05)
    constant = Moments.of(torch.ones(5, 2))
    assert constant.correlation.abs().max() == 0
    assert constant.discrepancy(constant).tolist() == [0, 0]


def test_nearest_agrees_with_the_table_of_all_distances():
    x, train = noise(20, 2, 3), noise(50, 2, 3, seed=1) + 100
    x = x + 100
    distance, which = nearest(x, train.split(7))
    table = torch.cdist(x.double().flatten(1), train.double().flatten(1))
    np.testing.assert_allclose(distance, table.min(1).values)
    assert which.tolist() == table.argmin(1).tolist()
    assert nearest(train[3:5], train.split(7))[0].tolist() == [0, 0]
    with pytest.raises(InputError, match=r"train.*none"):
        nearest(x, [])


def test_copies_are_counted():
    codec, train = Affine.of_levels((3,), 17), torch.randint(0, 17, (40, 3), dtype=torch.uint8)
    other = torch.full((2, 3), 16, dtype=torch.uint8)
    found = Neighbours.of(codec, train, torch.cat([train[5:8], other[:1]]), other)
    assert found.rows[:3].tolist() == [
        int((train == train[i]).all(1).nonzero()[0]) for i in (5, 6, 7)
    ]
    assert "3 of 4 are exact copies" in found.sentence
    assert len(found.held_out) == 2


def test_the_table_shows_what_differs_most_and_the_file_holds_all(tmp_path):
    real, drawn = noise(300, 12), noise(300, 12, seed=1)
    drawn[:, 9] *= 5
    table = compare({"data": real, "ddim": drawn}, "column", tmp_path / "all.csv")
    assert len(table.rows) == 16
    assert any(row[0] == "column 9" for row in table.rows)
    assert "Of 12 the 8 are shown" in table.about
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 24
    assert float(rows[-5][3]) == pytest.approx(float(drawn[:, 9].double().std(correction=0)))


# --- The report ----------------------------------------------------------------------------------


def trained(data, std=1.0, **options):
    model = GaussianModel(torch.zeros(data.shape), std, VPSDE())
    return Trained("mine", model, data, seconds=1.0, seed=0, **options)


def data_of(*shape):
    return Dataset.of("mine", [noise(n, *shape, seed=n) for n in (200, 30, 30)])


@pytest.mark.parametrize("shape", [(5,), (2, 20), (2, 6, 6), (1, 3, 4, 5)])
def test_every_report_tells_passes_seconds_and_samples_against_data(shape, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    samplers = {"ddim": DDIM(4), "euler_maruyama": EulerMaruyama(7)}
    report_training(
        trained(data_of(*shape)),
        samplers,
        Likelihood(rtol=0.1, atol=0.1),
        tmp_path,
        count=8,
        examples=4,
        progress=False,
        baselines=False,
    )
    text = (tmp_path / "report.html").read_text()
    assert '<td class="number">4</td>' in text
    assert '<td class="number">7</td>' in text
    assert "Samples against data" in text
    assert "median distance to the nearest training example" in text
    assert text.count("<img") >= 5
    for name in ("comparison.png", "ddim.png", "euler_maruyama.png", "statistics.csv"):
        assert (tmp_path / name).exists()


def test_overfitting_and_divergence_stand_at_the_head_and_in_the_log(tmp_path, caplog):
    lines = [json.dumps(record) for record in losses(0.1, 0.2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "best.pt").touch()
    with caplog.at_level(logging.WARNING, "scoresde"):
        report_training(
            trained(data_of(3), std=40.0),
            {"ddim": DDIM(4)},
            Likelihood(probes="exact"),
            tmp_path,
            count=8,
            progress=False,
        )
    head = (tmp_path / "report.html").read_text().partition("</header>")[0]
    for part in ("weights=best", "worse than a Gaussian"):
        assert part in head
        assert sum(part in record.message for record in caplog.records) == 1


def test_baselines_are_left_out_above_so_many_features(caplog):
    wide = Dataset.of("wide", [noise(3, 4097)] * 3)
    with caplog.at_level(logging.INFO, "scoresde"):
        assert _baselines(trained(wide)) == []
    assert "4097 features" in caplog.text


def test_baselines_of_few_examples_are_finite_and_say_how_they_were_fitted():
    few = Dataset.of("few", [noise(n, 60, seed=n) for n in (40, 8, 8)])
    gaussian, mixture = _baselines(trained(few))
    assert gaussian.value < 2 * 60 * 1.42
    assert ": 40 examples of 60 features" in gaussian.note
    assert math.isfinite(mixture.value)
