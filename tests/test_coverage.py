"""Density and coverage against their expectations, in the library and after a sweep."""

import json

import pytest
import torch

from scoresde import InputError
from scoresde.metrics import density_coverage, expected_coverage
from tests.test_docs import learn_none
from tests.test_run import TINY, program, refused


def normal(n, dimension, seed):
    return torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m", "k"), [(300, 300, 5), (200, 500, 3), (400, 100, 5)])
@pytest.mark.parametrize("dimension", [2, 16])
def test_samples_of_the_data_have_the_expected_values(dimension, n, m, k):
    """The mean of 40 pairs, within four standard errors."""
    pairs = [
        density_coverage(normal(n, dimension, 2 * i), normal(m, dimension, 2 * i + 1), k)
        for i in range(40)
    ]
    found = torch.tensor(pairs).double()
    error = found.std(0) / 40**0.5
    expected = torch.tensor([1.0, expected_coverage(n, m, k)]).double()
    assert bool(((found.mean(0) - expected).abs() < 4 * error).all())


def test_good_and_varied_are_told_apart():
    data = normal(500, 2, 0)
    narrow = density_coverage(data, 0.3 * normal(500, 2, 1))
    wide = density_coverage(data, 3 * normal(500, 2, 1))
    assert narrow[0] == pytest.approx(1, abs=0.15)
    assert narrow[1] < 0.7
    assert wide[0] < 0.5
    assert density_coverage(data, data + 100) == (0.0, 0.0)


def test_large_sets_are_compared_in_blocks():
    data, other = normal(2500, 3, 0), normal(50, 3, 1)
    assert density_coverage(data, other)[0] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 0)])
def test_too_few_examples_are_refused(n, m):
    with pytest.raises(InputError, match=str(n)):
        density_coverage(torch.zeros(n, 2), torch.zeros(m, 2))


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_of_the_scale_has_a_figure(tmp_path):
    """Of the classes that were asked for alone; the figure needs two jobs."""
    small = ("network.width=8", "network.blocks=1", "network.classes=10")
    program(*TINY, *small, "hydra.run.dir=RUN", cwd=tmp_path)
    learn_none(tmp_path / "RUN")
    words = (
        *("task=sample", "checkpoint=RUN", "label=[0,1]", "guidance=cfg", "sampler=ddim"),
        *("sampler.steps=2", "count=8", "progress=false", "device=cpu"),
    )
    said = program(
        *("--multirun", *words, "compare=test", "guidance.scale=0,2", "hydra.sweep.dir=out"),
        cwd=tmp_path,
    ).stdout
    results = [json.loads((tmp_path / f"out/{i}/result.json").read_text()) for i in (0, 1)]
    assert all({"density", "coverage"} <= found.keys() for found in results)
    assert results[0]["expected_coverage"] == expected_coverage(36, 8)
    assert (tmp_path / "out/quality.png").exists()
    assert "quality.png" in said
    assert "compare" in refused("compare=test", cwd=tmp_path)
    assert "nothing" in refused(*words, "compare=nothing", "guidance.scale=1", cwd=tmp_path)
