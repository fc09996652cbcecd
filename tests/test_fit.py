"""Training in one call, and a run's model and codec."""

import functools
import os

import numpy as np
import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    DenoisingScoreMatching,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    RectifiedFlow,
    ScoreModel,
    fit,
    load,
)
from scoresde.data import Dataset, digits, split_indices, two_moons
from scoresde.metrics import nats
from scoresde.nn import MLP
from scoresde.sample import UniPC
from scoresde.times import LogSNRGrid
from tests.test_run import program

quiet = functools.partial(fit, progress=False)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(d=2, **more):
    torch.manual_seed(0)
    return MLP(d, width=64, depth=2, **more)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 50.0), RectifiedFlow()], ids=repr)
def test_floats_in_model_units_are_fitted(sde):
    """Mean and std of 4000 samples within four standard errors and a tenth of the std."""
    x = 0.5 * normal(2000, 2) + torch.tensor([1.0, -0.3])
    model = quiet(ScoreModel(network(), sde), x, steps=500)
    samples = UniPC(30, LogSNRGrid())(model, (4000, 2), seed=0).x
    assert float((samples.mean(0) - x.mean(0)).abs().max()) < 0.05 + 4 * 0.5 / 4000**0.5
    assert float((samples.std(0) / x.std(0) - 1).abs().max()) < 0.1


def test_a_data_set_is_fitted_as_its_density_says():
    """Above the exact negative log-density by a tenth of a nat at most, within three errors."""
    data = two_moons()
    torch.manual_seed(0)
    model = quiet(ScoreModel(MLP(2), VPSDE()), data, steps=1000)
    x = data.encode(data.test[:400])
    ours = nats(Likelihood("exact")(model, x).log_prob, data.shape, data.scale)
    excess = ours + data.log_prob(data.test[:400])
    error = float(excess.std()) / 20
    assert -3 * error < float(excess.mean()) < 0.1 + 3 * error


def test_conditions_are_fitted_with_their_examples():
    """Two classes and no class, each sampled with its own mean and std."""
    exact = GaussianMixtureModel(
        [0.5, 0.5], [[-1.5, 0.0], [1.5, 0.5]], [0.3, 0.6], VPSDE(), labels=[0, 1]
    )
    label = (torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.5).long()
    x = exact.sample(3000, seed=0, label=label)
    model = quiet(ScoreModel(network(classes=2), VPSDE()), (x, {"label": label}), steps=700)
    for c in (0, 1):
        own = torch.full((2000,), c)
        samples = UniPC(30, LogSNRGrid())(model, (2000, 2), seed=0, label=own).x
        assert float((samples.mean(0) - x[label == c].mean(0)).abs().max()) < 0.1
        assert float((samples.std(0) / x[label == c].std(0) - 1).abs().max()) < 0.15


class Watched(DenoisingScoreMatching):
    """Remembers the losses of examples that are not trained on."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seen", [])

    def terms(self, model, x, *args, **options):
        found = super().terms(model, x, *args, **options)
        if not torch.is_grad_enabled():
            self.seen.append(float(found.value.mean()))
        return found


def test_the_weights_are_those_of_the_least_held_out_loss():
    """A network that is large for its data ends worse than its best."""
    x = normal(30, 16)
    torch.manual_seed(0)
    model, watched = ScoreModel(MLP(16, width=128, depth=3), VPSDE()), Watched()
    best = quiet(model, x, steps=600, loss=watched, ema=0.9)
    assert min(watched.seen) < 0.95 * watched.seen[-1]  # it has overfitted
    held = x[split_indices(x, (0.9, 0.1))[1]]
    value = float(DenoisingScoreMatching()(best, held, seed=0, seeds=range(3)).mean())
    assert value == pytest.approx(min(watched.seen), rel=1e-4)


def test_the_same_seed_gives_the_same_weights_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = normal(100, 2)
    a, b, c = (quiet(ScoreModel(network(), VPSDE()), x, steps=20, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert os.listdir(tmp_path) == []
    assert not a.training


def test_data_that_do_not_suit_the_noise_are_named():
    x = torch.cat([normal(200, 1), 500 * normal(200, 1, seed=1)], 1)
    with pytest.warns(UserWarning, match="1"):
        quiet(ScoreModel(network(), VPSDE()), x, steps=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((20, 2)), "ndarray"),
        (torch.zeros(20, 2), "20.*distinct"),
        (torch.zeros(20, 2, dtype=torch.int64), "int64"),
        (torch.full((20, 2), torch.nan), "finite"),
        ((normal(20, 2), {"label": torch.zeros(19)}), "label.*20.*19"),
        ((normal(20, 2), {"label": np.zeros(20)}), "label.*ndarray"),
        ((normal(20, 2), {"label": torch.tensor(1)}), "label.*20"),
    ],
)
def test_unusable_data_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        quiet(ScoreModel(network(), VPSDE()), data, steps=1)


def test_other_arguments_are_refused():
    x = normal(20, 2)
    with pytest.raises(InputError, match=r"held_out.*1\.5"):
        quiet(ScoreModel(network(), VPSDE()), x, steps=1, held_out=1.5)
    with pytest.raises(InputError, match=r"model.*MLP"):
        quiet(network(), x, steps=1)
    with pytest.raises(InputError, match="steps"):
        quiet(ScoreModel(network(), VPSDE()), x, steps=0)


def test_a_loss_that_is_not_finite_ends_in_a_sentence():
    """No weights are better than the others, and none are returned."""
    model = ScoreModel(network(), VPSDE())
    with torch.no_grad():
        model.network.linear_out.bias.fill_(torch.nan)
    with pytest.raises(InputError, match=r"held-out loss .*nan"):
        quiet(model, normal(50, 2), steps=3)


def test_a_run_is_loaded_with_its_codec(tmp_path):
    from scoresde.codec import Affine
    from scoresde.train import Checkpoint

    data = digits()
    torch.manual_seed(0)
    plan = {
        "_target_": "scoresde.ScoreModel",
        "network": {"_target_": "scoresde.nn.MLP", "shape": [1, 8, 8], "width": 8, "depth": 1},
        "sde": {"_target_": "scoresde.VPSDE"},
    }
    model = ScoreModel(MLP((1, 8, 8), width=8, depth=1), VPSDE())
    weights = model.state_dict()
    recipe = {"model": plan, "units": data.codec.describe(), "name": "mine"}
    raw = {name: value + 1 for name, value in weights.items()}
    Checkpoint(recipe, raw, weights, step=1, seed=0).save(tmp_path / "checkpoint.pt")
    run = load(tmp_path)
    assert isinstance(run.codec, Affine)
    assert run.recipe["name"] == "mine"
    x = UniPC(3)(run.model, (2, 1, 8, 8), seed=0).x
    assert torch.equal(x, UniPC(3)(model, (2, 1, 8, 8), seed=0).x)
    assert run.codec.decode(x).dtype == torch.uint8
    first = next(iter(load(tmp_path, weights="raw").model.parameters()))
    torch.testing.assert_close(first, next(model.parameters()) + 1)
    with pytest.raises(InputError, match=r"weights.*best"):
        load(tmp_path, weights="best")
    with pytest.raises(InputError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_an_exact_model_has_nothing_to_fit():
    with pytest.raises(InputError, match="weights"):
        quiet(GaussianModel(torch.zeros(2), 1.0, VPSDE()), normal(50, 2), steps=1)


# --- Kept in a folder ----------------------------------------------------------------------------


def test_a_folder_keeps_the_weights_that_fit_returns(tmp_path):
    """With the codec of the data: samples come back in the user's units."""
    raw = 5e4 + 2e4 * normal(400, 2)
    data = Dataset.of("incomes", [raw[:320], raw[320:360], raw[360:]])
    folder = tmp_path / "new/run"
    model = quiet(ScoreModel(network(), VPSDE()), data, steps=60, folder=folder)
    run = load(folder)
    kept, own = run.model.state_dict(), model.state_dict()
    assert kept.keys() == own.keys()
    assert all(torch.equal(kept[name], own[name]) for name in own)
    x = UniPC(20, LogSNRGrid())(run.model, (500, 2), seed=0).x
    assert float(run.codec.decode(x).mean()) == pytest.approx(5e4, rel=0.1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


def test_a_folder_does_not_change_the_weights(tmp_path):
    one, other = (
        quiet(ScoreModel(network(), VPSDE()), normal(100, 2), steps=8, **more)
        for more in ({}, {"folder": tmp_path})
    )
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def test_the_program_samples_what_fit_has_kept(tmp_path):
    labels = torch.arange(100) % 2
    data = (normal(100, 2), {"label": labels})
    quiet(ScoreModel(network(classes=2), VPSDE()), data, steps=4, folder=tmp_path / "run")
    program("task=sample", "checkpoint=run", "label=1", "count=3", "progress=false", cwd=tmp_path)
    (path,) = tmp_path.glob("runs/**/samples.npz")
    with np.load(path) as file:
        assert file["x"].shape == (3, 2)


def test_a_checkpoint_is_never_replaced_by_another_fit(tmp_path):
    quiet(ScoreModel(network(), VPSDE()), normal(50, 2), steps=2, folder=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"folder .*checkpoint\.pt"):
        quiet(ScoreModel(network(), VPSDE()), normal(50, 2), steps=2, folder=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"folder .*file"):
        quiet(ScoreModel(network(), VPSDE()), normal(50, 2), steps=2, folder=tmp_path / "file")


def test_a_model_that_cannot_be_described_is_refused_before_training(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, c):
            return self.scale * x

    with pytest.raises(InputError, match=r"Own.*describable"):
        quiet(ScoreModel(Own(), VPSDE()), normal(50, 2), steps=2, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
