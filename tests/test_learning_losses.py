"""Losses with weights and buffers: their laws, and that a training run keeps them."""

import functools
import math
import shutil

import pytest
import torch

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    DiscreteVP,
    GaussianModel,
    InputError,
    NoiseWeighting,
    ScoreModel,
    fit,
)
from scoresde.data import two_moons
from scoresde.errors import OtherRunError
from scoresde.likelihood import ForwardVariance
from scoresde.loss import BoundLoss, HybridLoss, ImportanceSampled, UncertaintyWeighted
from scoresde.nn import MLP
from scoresde.recipe import build, describe
from scoresde.sde import LinearBetas
from scoresde.times import ImportanceTimes, LowDiscrepancy, UniformTimes
from scoresde.train import Checkpoint, Training, train

T, C = 20, 0.25
CHAIN = DiscreteVP(LinearBetas(steps=T, beta_max=10.0))


def exact(sde, dims=1):
    zeros = torch.zeros(dims, dtype=torch.float64)
    return GaussianModel(mean=zeros, std=math.sqrt(C), sde=sde)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Uncertainty ---------------------------------------------------------------------------------


def test_the_loss_is_the_formula():
    model, x = exact(VPSDE(), 3), 0.5 * normal(5, 3)
    t, noise = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), normal(5, 3, seed=1)
    inner = DenoisingScoreMatching(NoiseWeighting(), UniformTimes())
    loss = UncertaintyWeighted(inner, 16).double()
    torch.nn.init.normal_(loss.linear.weight)
    u, plain = loss.uncertainty(VPSDE(), t), inner(model, x, t, noise)
    found = loss.terms(model, x, t, noise)
    torch.testing.assert_close(found.value, plain / u.exp() + u, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.parts["error"], plain)
    torch.testing.assert_close(found.parts["uncertainty"], u.detach())
    assert loss.fixed() is inner


def test_drawn_times_keep_their_weight():
    """At u = 0 it is the loss itself, whatever the density of the times."""
    inner = DenoisingScoreMatching(NoiseWeighting(), LowDiscrepancy(ImportanceTimes()))
    one, two = (
        loss(exact(VPSDE(), 3), 0.5 * normal(64, 3), seed=0)
        for loss in (inner, UncertaintyWeighted(inner, 16))
    )
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_the_optimum_is_the_mean_loss_of_each_level():
    """With the exact model the mean error is a^2 c / (a^2 c + s^2), from 0.0006 to 0.93."""
    torch.manual_seed(0)
    model, dims = exact(VPSDE(), 64), 64
    inner = DenoisingScoreMatching(NoiseWeighting(), UniformTimes())
    loss = UncertaintyWeighted(inner).double()
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    steps = 500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    # Where every level is drawn as often as any in the log-SNR.
    edges = VPSDE().log_snr(torch.tensor([0.01, 1.0], dtype=torch.float64))
    for step in range(steps):
        u = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
        t = VPSDE().time(edges[0] + u * (edges[1] - edges[0]))
        x = math.sqrt(C) * normal(256, dims, seed=step)
        optimiser.zero_grad()
        loss(model, x, t, normal(256, dims, seed=10_000 + step)).mean().backward()
        optimiser.step()
        schedule.step()
    levels = VPSDE().time(torch.linspace(4.0, -6.0, 11, dtype=torch.float64))
    signal = VPSDE().alpha(levels) ** 2 * C
    expected = signal / (signal + VPSDE().sigma(levels) ** 2)
    found = loss.uncertainty(VPSDE(), levels).exp()
    assert float(expected.max() / expected.min()) > 100
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    # The contribution of every level is 1, and so is the gradient in the logarithm of its loss.
    noise, x = normal(11 * 2000, dims, seed=1), math.sqrt(C) * normal(11 * 2000, dims, seed=2)
    errors = inner(model, x, levels.repeat(2000), noise).reshape(2000, 11).mean(0)
    torch.testing.assert_close(errors / found, torch.ones_like(found), rtol=0.05, atol=0)


# --- Steps drawn by their losses -----------------------------------------------------------------


def sampled(**options):
    return ImportanceSampled(BoundLoss(variance=ForwardVariance()), T, **options)


def warmed(model, rounds=60):
    loss = sampled()
    for seed in range(rounds):
        terms = loss.terms(model, math.sqrt(C) * normal(64, 1, seed=seed), seed=seed)
        loss.keep(terms.record)
    return loss


def test_the_history_is_that_of_a_plain_list():
    """Rings of values against lists, with repeated, missing and infinite ones in a batch."""
    loss, lists = sampled(history=3), [[] for _ in range(T)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        row = torch.randint(0, T // 2, (17,), generator=generator)
        value = torch.randn(17, generator=generator, dtype=torch.float64)
        value[3] = math.nan
        loss.keep(torch.stack((row.double(), value), 1))
        for i, v in zip(row.tolist(), value.tolist(), strict=True):
            lists[i] += [v] if math.isfinite(v) else []
    for i, values in enumerate(lists):
        assert sorted(loss.values[i].tolist()) == sorted(
            [*values, 0, 0, 0][:3] if len(values) < 3 else values[-3:]
        )
        assert int(loss.counts[i]) == len(values)


def test_steps_are_equally_likely_until_every_step_has_a_history():
    loss = sampled()
    values = torch.stack((torch.arange(T).double(), torch.arange(T).double() + 1), 1)
    for _ in range(9):
        loss.keep(values)
    loss.keep(values[:-1])
    assert torch.equal(loss.shares(), torch.full((T,), 1 / T, dtype=torch.float64))
    loss.keep(values[-1:])
    size = torch.arange(1, T + 1).double()
    torch.testing.assert_close(loss.shares(), 0.999 * size / size.sum() + 0.001 / T)
    assert float(loss.shares().sum()) == pytest.approx(1, abs=1e-12)


def test_the_mean_stays_and_the_variance_falls():
    model, count = exact(CHAIN), 20_000
    loss, x = warmed(model), math.sqrt(C) * normal(20_000, 1, seed=99)
    plain = loss.fixed()(model, x, seed=7)
    drawn = loss(model, x, seed=8)
    error = math.sqrt(float(plain.var() + drawn.var()) / count)
    assert abs(float(plain.mean() - drawn.mean())) < 4 * error
    assert float(drawn.var()) < 0.5 * float(plain.var())


def test_shares_follow_the_root_of_the_mean_squares():
    model = exact(CHAIN)
    loss = warmed(model, 400)
    t = CHAIN.time_of_index(torch.arange(T)).repeat(2000)
    x, noise = math.sqrt(C) * normal(T * 2000, 1, seed=3), normal(T * 2000, 1, seed=4)
    values = loss.loss(model, x, t, noise).reshape(2000, T)
    size = values.square().mean(0).sqrt()
    assert torch.corrcoef(torch.stack((loss.shares(), size)))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UncertaintyWeighted(HybridLoss()), "loss must be a DenoisingScoreMatching"),
        (lambda: UncertaintyWeighted(width=3), "width=3"),
        (lambda: sampled(floor=0.0), "floor must be .* got 0.0"),
        (lambda: sampled(history=0), r"history.*\b0\b"),
        (lambda: ImportanceSampled(UncertaintyWeighted()), "loss must be a Loss without weights"),
        (lambda: sampled().check(exact(VPSDE())), "sde must be a discrete chain"),
        (lambda: sampled().check(exact(DiscreteVP())), "steps must be .* 1000, got 20"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_they_are_described_and_built_again():
    inner = DenoisingScoreMatching(NoiseWeighting())
    for loss in (UncertaintyWeighted(inner, 16), sampled(history=5), UncertaintyWeighted()):
        recipe = describe(loss)
        again = build(recipe)
        again.load_state_dict(loss.state_dict())
        assert describe(again) == recipe


# --- Training runs -------------------------------------------------------------------------------


def losses():
    uncertain = UncertaintyWeighted(DenoisingScoreMatching(times=LowDiscrepancy()), 8)
    return {"uncertain": uncertain, "history": ImportanceSampled(BoundLoss(), T, history=2)}


def run(folder, name, loss=None, steps=20):
    torch.manual_seed(0)
    sde = CHAIN if name == "history" else VPSDE()
    folder.mkdir(exist_ok=True)
    options = {"save_every": 8, "keep": 5, "log_every": 10, "validate_every": 10}
    return train(
        ScoreModel(MLP(2, width=16, depth=1), sde),
        two_moons(count=300),
        losses()[name] if loss is None else loss,
        Training(steps=steps, batch_size=64, **options),
        functools.partial(torch.optim.Adam, lr=1e-2),
        folder,
        recipe={"name": "moons"},
        progress=False,
    )


@pytest.mark.parametrize("name", losses())
def test_a_run_goes_on_bit_for_bit(name, tmp_path):
    run(tmp_path / "whole", name)
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    early = tmp_path / "whole/checkpoints/00000008.pt"
    shutil.copy(early, tmp_path / "again/checkpoints")
    run(tmp_path / "again", name)
    one, two = (Checkpoint.load(tmp_path / place) for place in ("whole", "again"))
    before = Checkpoint.load(early).state["loss"]
    assert one.state["loss"].keys() == losses()[name].state_dict().keys()
    for key, value in one.state["loss"].items():
        assert torch.equal(value, two.state["loss"][key])
    moved = [key for key in before if not torch.equal(before[key], one.state["loss"][key])]
    assert moved == (
        ["linear.weight", "linear.bias"] if name == "uncertain" else ["values", "counts"]
    )
    for key, value in one.model.items():
        assert torch.equal(value, two.model[key])


def test_a_run_without_the_weights_of_its_loss_is_another(tmp_path):
    run(tmp_path, "uncertain", DenoisingScoreMatching())
    assert Checkpoint.load(tmp_path).state["loss"] == {}
    with pytest.raises(OtherRunError, match="weights of the loss"):
        run(tmp_path, "uncertain", steps=30)


def test_an_older_checkpoint_without_a_loss_goes_on(tmp_path):
    run(tmp_path, "uncertain", DenoisingScoreMatching())
    checkpoint = Checkpoint.load(tmp_path)
    del checkpoint.state["loss"]
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoint.save(tmp_path / "checkpoint.pt")
    run(tmp_path, "uncertain", DenoisingScoreMatching(), steps=24)
    assert Checkpoint.load(tmp_path).step == 24


@pytest.mark.parametrize("name", losses())
def test_fit_trains_them(name):
    loss = losses()[name]
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    sde = CHAIN if name == "history" else VPSDE()
    fit(ScoreModel(MLP(2, width=16), sde), normal(200, 2).float(), 10, loss=loss, progress=False)
    assert any(not torch.equal(value, before[key]) for key, value in loss.state_dict().items())
