"""Averages of weights whose length is chosen after the training."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from scoresde import VPSDE, DenoisingScoreMatching, InputError, Preconditioned, ScoreModel
from scoresde.data import two_moons
from scoresde.nn import MLP
from scoresde.train import Checkpoint, PowerEMA, Snapshots, Training, train
from scoresde.train.ema import LONGEST, power_of_length
from scoresde.train.snapshots import Profile, weights_of


def model():
    torch.manual_seed(0)
    return ScoreModel(MLP(2, width=8, depth=1), VPSDE(), Preconditioned(1.0))


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, LONGEST])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    power = power_of_length(length)
    mean = (power + 1) / (power + 2)
    second = (power + 1) / (power + 3)
    assert math.sqrt(second - mean**2) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("length", [0, -0.1, 0.3, "long", None])
def test_a_length_out_of_range_is_refused(length):
    with pytest.raises(InputError, match=rf"length .*{length!r}"):
        power_of_length(length)


def test_the_longest_length_of_the_message_is_accepted():
    with pytest.raises(InputError, match=r"\(0, 0\.288675\], got 0\.2887"):
        power_of_length(0.2887)
    assert power_of_length(0.288675) >= 0


def test_an_average_weighs_the_updates_by_its_profile():
    source = model()
    average, first = PowerEMA(source, 0.1), next(source.parameters())
    for i in range(1, 31):
        with torch.no_grad():
            first.fill_(math.sin(i))
        average.update()
    p, n = average.power + 1, 30
    wanted = sum((i**p - (i - 1) ** p) / n**p * math.sin(i) for i in range(1, n + 1))
    assert float(next(average.model.parameters()).flatten()[0]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("other", [(100, 0.05), (70, 0.1), (30, 0.2)])
def test_the_product_of_two_profiles_is_its_integral(other):
    a, b = Profile(100, 0.1), Profile(*other)

    def density(profile, t):
        p = profile.power
        return (p + 1) * (t / profile.step) ** p / profile.step

    wanted, _ = quad(lambda t: density(a, t) * density(b, t), 0, min(a.step, b.step))
    assert a.dot(b) == pytest.approx(wanted, rel=1e-8)
    assert a.dot(b) == b.dot(a)


def test_a_stored_average_is_found_again_and_weights_sum_to_one():
    stored = [Profile(step, length) for step in (25, 50, 75, 100) for length in (0.05, 0.1)]
    found = weights_of(stored, Profile(100, 0.1))
    np.testing.assert_allclose(found, np.eye(8)[7], atol=1e-9)
    assert weights_of(stored, Profile(90, 0.07)).sum() == pytest.approx(1, abs=1e-12)


def profile_of(stored, weights, n, steps):
    """Returns what a combination counts for each update."""
    i = np.arange(1, steps + 1)
    total = np.zeros(steps)
    for w, one in zip(weights, stored, strict=True):
        p = one.power + 1
        total += w * np.where(i <= one.step, (i**p - (i - 1.0) ** p) / one.step**p, 0)
    return total


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15])
def test_the_combination_is_near_the_average_that_is_wanted(length):
    n = 1000
    stored = [Profile(n * i // 32, sigma) for i in range(1, 33) for sigma in (0.05, 0.1)]
    ours = profile_of(stored, weights_of(stored, Profile(n, length)), n, n)
    wanted = profile_of([Profile(n, length)], [1.0], n, n)
    assert np.linalg.norm(ours - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(
        model(),
        two_moons(count=200),
        DenoisingScoreMatching(),
        Training(steps=64, batch_size=16, snapshots=16, lengths=(0.05, 0.1)),
        functools.partial(torch.optim.Adam, lr=1e-2),
        folder,
        progress=False,
    )
    return folder


def test_a_training_stores_them_and_gives_the_average_of_a_third_length(run, tmp_path):
    assert len(list((run / "snapshots").iterdir())) == 32
    train(
        model(),
        two_moons(count=200),
        DenoisingScoreMatching(),
        Training(steps=64, batch_size=16, snapshots=1, lengths=(0.07, 0.2)),
        functools.partial(torch.optim.Adam, lr=1e-2),
        tmp_path,
        progress=False,
    )
    ours, wanted = Snapshots.of(run).average(0.07), Snapshots.of(tmp_path).average(0.07)
    moved = Checkpoint.load(run).model
    for name, value in wanted.ema.items():
        scale = float((moved[name] - value).norm()) + 1e-6
        assert float((ours.ema[name] - value).norm()) < 0.05 * scale, name


def test_what_does_not_change_stays_what_it_is(run):
    source, average = model().state_dict(), Snapshots.of(run).average(0.03).ema
    frozen = [name for name, _ in model().named_buffers()]
    assert frozen
    for name in frozen:
        torch.testing.assert_close(average[name], source[name], rtol=1e-6, atol=0)


def test_a_run_without_any_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path.name} .*train\.snapshots"):
        Snapshots.of(tmp_path)


def test_a_step_before_the_first_is_a_sentence(run):
    with pytest.raises(InputError, match=r"step .*\b2\b"):
        Snapshots.of(run).average(0.1, step=2)
