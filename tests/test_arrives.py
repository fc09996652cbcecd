"""What is evaluated, and what arrives in the files: subsets, whole files, densities of samples."""

import math
import re

import numpy as np
import pytest
import torch

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    GaussianMixtureModel,
    GaussianModel,
    Likelihood,
)
from scoresde.data import Dataset, array, folder, random_rows
from scoresde.metrics import bits_per_dim
from scoresde.sample import ProbabilityFlow
from scoresde.tasks.evaluation import evaluate_likelihood
from scoresde.tasks.likelihood_report import Evaluated, report_likelihood
from scoresde.tasks.sampling import draw_samples
from scoresde.train.validation import EXAMPLES, validation_loss
from tests.small_sets import write_pictures
from tests.test_run import TINY, program, refused

LOOSE = ("sampler.rtol=0.1", "sampler.atol=0.1")
EXACT = Likelihood("exact", 1e-4, 1e-4)


def test_a_subset_is_random_and_the_first_of_a_larger_one():
    """Its mean rank is that of all, within four standard errors."""
    some, more = random_rows(10_000, 100), random_rows(10_000, 1000)
    assert torch.equal(more[:100], some)
    assert len(more.unique()) == 1000
    off = (more.double().mean() - 4999.5) / (10_000 / math.sqrt(12 * 1000))
    assert abs(float(off)) < 4
    assert torch.equal(random_rows(5, 5), torch.arange(5))


def test_examples_of_a_sorted_file_stand_for_all_of_it():
    """Temperatures in the order of a year: the first hundred days would be those of a winter."""
    values = torch.linspace(-3, 3, 2000)[:, None]
    data = Dataset.of("year", [values] * 3, standardise=False)
    model = GaussianModel(torch.zeros(1), 1.0, VPSDE())
    some = evaluate_likelihood(model, EXACT, data, examples=100, progress=False)
    whole = evaluate_likelihood(model, EXACT, data, progress=False, batch_size=2000)
    assert abs(some.mean - whole.mean) < 4 * some.standard_error
    torch.testing.assert_close(some.values, whole.values[some.rows], atol=1e-5, rtol=0)


class Recording(DenoisingScoreMatching):
    """Keeps the examples that it is given."""

    def terms(self, model, x, *values, **options):
        seen.append(x[:, 0])
        return super().terms(model, x, *values, **options)


seen: list[torch.Tensor] = []


def test_validation_takes_a_random_subset_too():
    """Of 4000 sorted values, whose first 1024 have a mean of -2.2; four standard errors."""
    values = torch.linspace(-3, 3, 4000)[:, None]
    data = Dataset.of("year", [values] * 3, standardise=False)
    seen.clear()
    validation_loss(GaussianModel(torch.zeros(1), 1.0, VPSDE()), data, Recording(), seed=0)
    x = torch.cat(seen)
    assert len(x) == EXAMPLES
    assert abs(float(x.mean())) < 4 * float(values.std()) / math.sqrt(EXAMPLES)


def test_the_natural_encoding_of_integers_gives_a_likelihood():
    """Levels 100 and 101 have an entropy of one bit. A density that is sharp at their centres
    promises less there; at dequantised values it cannot."""
    raw = torch.tensor([[100], [101]], dtype=torch.uint8).repeat(500, 1)
    data = Dataset.of("two levels", [raw] * 3, levels=256)
    centres = data.encode(torch.tensor([[100], [101]], dtype=torch.uint8), centre=True)
    sharp = GaussianMixtureModel([0.5, 0.5], centres, [0.1 / 128] * 2, VPSDE())
    at_centres, natural = (
        float(bits_per_dim(sharp.log_prob(data.encode(data.test, **how)), (1,), data.scale).mean())
        for how in ({"centre": True}, {})
    )
    assert at_centres < 0
    assert natural >= 1
    assert torch.equal(data.decode(data.encode(data.test)), data.test)


# --- Densities of samples ------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 256])
def test_the_density_of_samples_is_kept_in_raw_units(levels):
    raw = 50 + 20 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    raw = raw if levels is None else raw.round().clamp(0, 255).to(torch.uint8)
    data = Dataset.of("d", [raw] * 3, levels=levels)
    model = GaussianModel(torch.zeros(3), 0.5, VPSDE())
    flow = ProbabilityFlow(1e-6, 1e-6, probes="exact", final_denoise=False)
    drawn = draw_samples(model, flow, data.codec, 20, seed=0, progress=False)
    expected = model.log_prob(drawn.x, VPSDE().cutoffs.sampling) + data.log_det(raw, drawn.x)
    torch.testing.assert_close(drawn.densities["log_prob"], expected.double(), atol=2e-3, rtol=0)
    assert drawn.densities["log_prob_error"].tolist() == [0.0] * 20


def test_the_program_keeps_the_density_of_samples(tmp_path):
    moons = ("+experiment=moons_vp", *TINY, "data.count=400", "hydra.run.dir=run")
    program(*moons, "+samplers.probability_flow.probes=exact", cwd=tmp_path)
    with np.load(tmp_path / "run/probability_flow.npz") as file:
        own = file["log_prob"]
    words = ("task=sample", "checkpoint=run", "count=4", "sampler.rtol=0.1", "sampler.atol=0.1")
    program(*words, "+sampler.probes=exact", "hydra.run.dir=s", "progress=false", cwd=tmp_path)
    with np.load(tmp_path / "s/samples.npz") as file:
        np.testing.assert_allclose(file["log_prob"], own, rtol=1e-4)
        assert file["x"].shape == (4, 2)


# --- Data that are given for evaluation ----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training on a table of two columns."""
    place = tmp_path_factory.mktemp("table")
    rows = np.random.default_rng(0).normal([0, 5e4], [1, 2e4], (300, 2))
    np.save(place / "train.npy", rows)
    table = ("data=array", "data.path=train.npy", "network=mlp", "hydra.run.dir=run")
    program(*TINY, *table, "~samplers.predictor_corrector", cwd=place)
    return place


def likelihood(place, *words, code=0):
    quick = ("likelihood.rtol=0.1", "likelihood.atol=0.1", "examples=null", "progress=false")
    out = ("task=likelihood", "checkpoint=run", *quick, *words)
    return program(*out, cwd=place, code=code)


@pytest.mark.parametrize("count", [1, 50])
def test_a_file_that_is_given_is_evaluated_whole_and_in_its_order(count, trained):
    """Values of the same rows in another order are the same values in that order."""
    rows = np.random.default_rng(1).normal([0, 5e4], [1, 2e4], (count, 2))
    np.save(trained / f"new{count}.npy", rows)
    words = ("data=array", f"data.path=new{count}.npy", "likelihood.probes=exact")
    likelihood(trained, *words, f"hydra.run.dir=new{count}")
    with np.load(trained / f"new{count}/likelihood.npz") as file:
        assert file["index"].tolist() == list(range(count))
        values = file["value"]
    np.save(trained / f"new{count}.npy", rows[::-1])
    likelihood(trained, *words, f"hydra.run.dir=back{count}")
    with np.load(trained / f"back{count}/likelihood.npz") as file:
        np.testing.assert_allclose(file["value"][::-1], values, rtol=1e-3)
    assert '"split": "all"' in (trained / f"new{count}/likelihood.json").read_text()


def test_the_trainings_own_file_keeps_its_test_split(trained):
    for name, words in {"a": (), "b": ("data=array", "data.path=train.npy")}.items():
        likelihood(trained, *words, f"hydra.run.dir=own_{name}")
        assert '"count": 30' in (trained / f"own_{name}/likelihood.json").read_text()


def test_a_split_that_is_asked_for_is_taken(trained):
    np.save(trained / "other.npy", np.random.default_rng(2).normal([0, 5e4], [1, 2e4], (50, 2)))
    likelihood(trained, "data=array", "data.path=other.npy", "split=test", "hydra.run.dir=split")
    assert '"count": 5' in (trained / "split/likelihood.json").read_text()
    likelihood(trained, "data=array", "data.path=other.npy", "hydra.run.dir=whole")
    assert '"count": 50' in (trained / "whole/likelihood.json").read_text()


def test_encoding_takes_a_file_whole_too(trained):
    np.save(trained / "few.npy", np.random.default_rng(3).normal([0, 5e4], [1, 2e4], (7, 2)))
    words = (
        "task=encode",
        "checkpoint=run",
        "data=array",
        "data.path=few.npy",
        "sampler.rtol=0.1",
    )
    program(*words, "sampler.atol=0.1", "hydra.run.dir=latents", "progress=false", cwd=trained)
    with np.load(trained / "latents/latents.npz") as file:
        assert file["index"].tolist() == list(range(7))


def test_undivided_data_are_one_split_in_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.save(tmp_path / "x.npy", np.arange(8.0).reshape(4, 2))
    data = array(tmp_path / "x.npy", fractions=None, standardise=False)
    assert data.undivided
    assert torch.equal(data.train, torch.arange(8.0, dtype=torch.float64).reshape(4, 2))
    assert torch.equal(data.test, data.train)
    write_pictures(tmp_path / "pictures")
    whole, divided = (
        folder(tmp_path / "pictures", 8, fractions=f) for f in (None, (0.6, 0.2, 0.2))
    )
    assert len(whole.test) == len(divided.train) + len(divided.validation) + len(divided.test)


# --- Telling data sets apart ---------------------------------------------------------------------


def test_data_that_are_more_likely_than_ones_own_are_told_apart(tmp_path):
    """A narrow set inside of a wide model: AUROC near 0 says so, and typicality is near 1."""
    model = GaussianModel(torch.zeros(20), 1.0, VPSDE())
    own, narrow = (
        scale * torch.randn(200, 20, generator=torch.Generator().manual_seed(seed))
        for scale, seed in ((1.0, 0), (0.1, 1))
    )
    both = []
    for name, x in (("own", own), ("narrow", narrow)):
        data = Dataset.of(name, [x] * 3, standardise=False)
        both.append(Evaluated(data, evaluate_likelihood(model, EXACT, data, progress=False)))
    results = report_likelihood(*both, tmp_path, title="a Gaussian")
    assert results["auroc"] < 0.05
    assert results["auroc_typicality"] > 0.95
    page = (tmp_path / "report.html").read_text()
    assert re.search("other direction: narrow .* is the more likely", page)
    same = report_likelihood(both[0], both[0], tmp_path, title="a Gaussian")
    assert same["auroc"] == pytest.approx(0.5)
    assert "other direction" not in (tmp_path / "report.html").read_text()


def test_a_folder_of_other_examples_is_left_alone(trained):
    likelihood(trained, "examples=4", "hydra.run.dir=some")
    said = refused(
        *("task=likelihood", "checkpoint=run", "hydra.run.dir=some", "likelihood.rtol=0.1"),
        *("likelihood.atol=0.1", "progress=false"),
        cwd=trained,
    )
    assert "examples" in said
