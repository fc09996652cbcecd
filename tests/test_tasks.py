"""Sampling, evaluation and the table of a sweep, as functions of objects."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from scoresde import VPSDE, GaussianModel, InputError, Likelihood
from scoresde.codec import Affine
from scoresde.data import Dataset
from scoresde.sample import EulerMaruyama
from scoresde.tasks import draw_samples, evaluate_likelihood
from scoresde.tasks.summary import format_table, summarise


def gaussian_data(levels: int | None = None) -> tuple[Dataset, GaussianModel]:
    x = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
    if levels is None:
        splits, codec = [2 * x + 1] * 3, Affine((3,), 1.0, 2.0)
        return (
            Dataset("normal", *splits, codec=codec),
            GaussianModel(torch.zeros(3), 1.0, VPSDE()),
        )
    raw = (x * 2 + levels / 2).clamp(0, levels - 1).to(torch.uint8)
    data = Dataset.of("levels", [raw] * 3, levels=levels)
    return data, GaussianModel(torch.zeros(3), 0.3, VPSDE())


def test_evaluation_of_real_data_is_in_nats_of_raw_units() -> None:
    data, model = gaussian_data()
    result = evaluate_likelihood(
        model, Likelihood(probes="exact"), data, batch_size=32, progress=False
    )
    exact = torch.distributions.Normal(1.0, 2.0).log_prob(data.test).sum(1)
    assert result.unit == "nats"
    torch.testing.assert_close(result.values.float(), -exact, atol=2e-3, rtol=0)
    assert result.mean == pytest.approx(float(-exact.mean()), abs=2e-3)


def test_evaluation_of_levels_is_in_bits_per_dimension() -> None:
    data, model = gaussian_data(levels=16)
    result = evaluate_likelihood(
        model, Likelihood(probes=3), data, batch_size=32, seed=1, progress=False
    )
    assert result.unit == "bits/dim"
    assert result.values.shape == result.errors.shape == (70,)
    # A diagonal Jacobian: every probe gives the exact trace.
    assert float(result.errors.max()) < 1e-4
    assert math.isclose(
        result.standard_error, float(result.values.std()) / math.sqrt(70), rel_tol=1e-6
    )


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    data, model = gaussian_data(levels=16)
    tight = Likelihood(probes=1, rtol=1e-7, atol=1e-7)
    first, second = (
        evaluate_likelihood(model, tight, data, batch_size=b, progress=False) for b in (70, 11)
    )
    torch.testing.assert_close(first.values, second.values, atol=1e-5, rtol=0)


def test_drawing_covers_the_count_with_its_own_seeds() -> None:
    data, model = gaussian_data()
    draw = [
        draw_samples(model, EulerMaruyama(5), data.codec, 7, batch_size=b, seed=3, progress=False)
        for b in (7, 3)
    ]
    assert draw[0].x.shape == (7, 3)
    torch.testing.assert_close(draw[0].x, draw[1].x)
    with pytest.raises(InputError, match=r"count.*\b0\b"):
        draw_samples(model, EulerMaruyama(5), data.codec, 0)


def test_summary_has_a_row_for_every_job(tmp_path: Path) -> None:
    results = [
        {"overrides": ["sde=vp", "seed=0"], "status": "ok", "nats": 1.25},
        {"overrides": ["sde=ve", "seed=0"], "status": "failed", "error": "a, comma"},
        {"overrides": ["sde=ve", "seed=1"], "status": "running"},
    ]
    for i, result in enumerate(results):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "result.json").write_text(json.dumps(result))
    rows = summarise(tmp_path)
    assert [row["status"] for row in rows] == ["ok", "failed", "interrupted"]
    with (tmp_path / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["sde"] for row in table] == ["vp", "ve", "ve"]
    assert table[0]["nats"] == "1.25"
    assert table[1]["error"] == "a, comma"
    assert "interrupted" in format_table(rows)
