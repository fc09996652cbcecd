"""The page docs/variational.md: its programs run, and each of its equations holds in them."""

import shlex

import pytest
import torch

from scoresde.train import Checkpoint
from tests.test_docs import blocks
from tests.test_run import ROOT, TINY, program, tiny

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


def test_the_hybrid_loss_has_two_parts(space):
    assert sorted(space["parts"]) == ["simple", "vb"]


def test_a_weight_has_two_units(space):
    for unit in space["units"]:
        torch.testing.assert_close(unit, torch.ones_like(unit), atol=1e-9, rtol=0)


def test_the_schedule_that_is_learned_varies_less(space):
    """The least is 17.2; the standard deviation of 8192 draws has an error of about 0.4."""
    assert space["before"] == pytest.approx(33.1, abs=1.5)
    assert space["after"] < 24


def test_the_two_forms_of_score_matching_have_one_mean(space):
    """The error of 4000 examples is 0.035."""
    for loss in ("explicit", "sliced"):
        assert float(space[loss].detach().mean()) == pytest.approx(-5.0, abs=0.14)


def test_the_design_is_the_published_one(space):
    assert space["design"].step_size == pytest.approx(6.19e-6, abs=0.02e-6)


@pytest.mark.usefixtures("undrawn")
def test_the_commands_of_the_page_run(tmp_path):
    lines = filter(None, "\n".join(blocks(PAGE, "sh")).splitlines())
    first, *others = (shlex.split(line, comments=True)[3:] for line in lines)
    small = ["network.width=8", "network.blocks=1"]
    program(*first, *tiny("digits_vdm"), *small, "hydra.run.dir=DIGITS", cwd=tmp_path)
    run = "DIGITS"
    for words in others:
        if any(word.startswith("+experiment") for word in words):
            run = "MOONS"
            program(*words, *TINY, "data.count=400", f"hydra.run.dir={run}", cwd=tmp_path)
            continue
        words = [word.replace("checkpoint=RUN", f"checkpoint={run}") for word in words]
        quick = ["examples=3", "likelihood.draws=2"] if "task=likelihood" in words else []
        quick += ["count=3", "sampler.steps=2"] if "task=sample" in words else []
        program(*words, *quick, "progress=false", cwd=tmp_path)
    assert Checkpoint.load(tmp_path / "DIGITS").recipe["loss"]["decoder"]["levels"] == 17
