"""The page docs/variational.md: its programs run, and each of its equations holds in them."""

import pytest

from tests.test_docs import blocks
from tests.test_run import ROOT

PAGE = (ROOT / "docs/variational.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def space():
    """What the programs of the page leave, run in their order."""
    found = {}
    for part in blocks(PAGE, "python"):
        exec(part, found)
    return found


def test_the_divergence_of_two_normal_densities(space):
    assert space["ours"] == pytest.approx(float(space["theirs"]), abs=1e-6)  # torch's in float32


def test_the_evidence_is_the_bound_and_a_divergence(space):
    kl = space["kl"](0.2, 0.5, space["posterior_mean"], space["posterior_variance"])
    assert space["gap"] == pytest.approx(kl, abs=1e-12)
    assert space["tight"] == pytest.approx(0.0, abs=1e-12)


def test_the_parts_of_the_chain_add_up(space):
    assert float(space["total"]) < 1e-12


def test_a_step_costs_the_difference_of_signal_to_noise(space):
    assert float(space["off"]) < 1e-12


def test_the_forward_variance_fits_better_here(space):
    found = space["by_variance"]
    assert 0 < found["ForwardVariance"] < found["PosteriorVariance"]


def test_the_three_names_are_one_estimate(space):
    assert max(float(difference.abs().max()) for difference in space["same"]) < 1e-12


def test_the_levels_share_their_probability(space):
    assert [float(total) for total in space["sums"]] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_the_gap_falls_as_one_over_the_steps(space):
    """With twice the steps it is between 0.45 and 0.65 of it; its error is 0.01 nats."""
    gaps = space["gaps"]
    assert 0.45 < gaps[10] / gaps[5] < 0.65
    assert 0.45 < gaps[20] / gaps[10] < 0.65
    assert abs(gaps["limit"]) < 0.084  # four standard errors of 20,000 examples
