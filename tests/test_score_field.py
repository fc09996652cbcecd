"""The picture of a score, whose arrows point where it does; models of one noise level."""

import math

import numpy as np
import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianModel, InputError, SubVPSDE
from scoresde.data import Dataset, two_moons
from scoresde.loss import ExplicitScoreMatching, OneLevel
from scoresde.report import figures as plots
from scoresde.sample import LangevinDynamics
from scoresde.tasks import report
from scoresde.tasks.sampling import at_time
from scoresde.tasks.views import view_of


def drawn(monkeypatch):
    """What the figure gets: arrows at their places."""
    from matplotlib.axes import Axes

    calls = []
    monkeypatch.setattr(Axes, "quiver", lambda self, *a, **k: calls.append((a, k)))
    return calls


def grid(extent, n):
    return report._grid(extent, n)


EXTENT = (-2.0, 4.0, -3.0, 3.0)


@pytest.mark.parametrize("kind", ["density", "samples"])
def test_arrows_point_along_the_score_from_their_places(tmp_path, monkeypatch, kind):
    calls = drawn(monkeypatch)
    places = grid(EXTENT, 9)
    score = -places.reshape(9, 9, 2)
    score[0, 0] = math.nan
    under = {"log_density": score.square().sum(2)} if kind == "density" else {"samples": places}
    path = plots.score_field(score, EXTENT, tmp_path / "f/a.png", **under)
    assert path.stat().st_size > 10_000
    (x, y, u, v), options = calls[0]
    assert np.allclose(np.stack([x, y], -1).reshape(-1, 2), places)
    assert u[0, 0] == v[0, 0] == 0
    u, v, expected = (part.reshape(81, *part.shape[2:])[1:] for part in (u, v, score.numpy()))
    norms = np.hypot(*expected.T)
    lengths = np.hypot(u, v)
    assert np.allclose(u * expected[:, 0] + v * expected[:, 1], norms * lengths)
    assert (np.diff(lengths[norms.argsort()]) > -1e-6).all()
    assert lengths.max() < 6 / 9
    assert options["angles"] == "xy"


@pytest.mark.parametrize(
    ("score", "under"),
    [
        (torch.zeros(3, 4, 2), {"samples": torch.zeros(5, 2)}),
        (torch.zeros(3, 3), {"samples": torch.zeros(5, 2)}),
        (torch.zeros(3, 3, 2), {}),
        (torch.zeros(3, 3, 2), {"samples": torch.zeros(5, 2), "log_density": torch.zeros(3, 3)}),
        (torch.zeros(3, 3, 2), {"samples": torch.zeros(5, 3)}),
    ],
)
def test_what_is_no_field_is_refused(tmp_path, score, under):
    with pytest.raises(InputError):
        plots.score_field(score, EXTENT, tmp_path / "a.png", **under)


@pytest.mark.parametrize("sde", [VESDE(0.01, 50.0), VPSDE(), SubVPSDE()], ids=str)
def test_the_score_of_a_report_is_in_raw_units(tmp_path, monkeypatch, sde):
    """Columns of other sizes: the score of raw data is that of the raw Gaussian, to the noise."""
    calls = []
    monkeypatch.setattr(plots, "score_field", lambda *a: calls.append(a) or a[2])
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    raw = torch.tensor([100.0, -3.0]) + torch.tensor([20.0, 0.5]) * z
    data = Dataset.of("sizes", [raw] * 3)
    exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=sde)
    trained = report.Trained("x", exact, data, 0.0, 0, loss=ExplicitScoreMatching(eps=1e-2))
    extent = view_of(data.codec, raw).extent()
    report._score_figure(trained, extent, tmp_path)
    score, _, _, log_density, samples = calls[0]
    places = grid(extent, len(score)).reshape(score.shape)
    t = torch.tensor(1e-2, dtype=torch.float64)
    noise = float(sde.sigma(t) / sde.alpha(t))
    expected = -(places - raw.mean(0)) / raw.std(0, correction=0) ** 2 / (1 + noise**2)
    assert torch.allclose(score, expected, rtol=1e-3, atol=1e-5)
    assert log_density is None
    assert samples.shape == raw.shape


@pytest.mark.parametrize("loss", [None, ExplicitScoreMatching(eps=0.3), OneLevel(0.2)])
def test_the_drawn_level_is_that_of_the_loss_or_a_tenth_of_the_data(loss):
    sde, data = VPSDE(), two_moons(count=400)
    exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=sde)
    t = report._score_time(report.Trained("x", exact, data, 0.0, 0, loss=loss))
    level = float(sde.sigma(t) / sde.alpha(t))
    if loss is None:
        assert level == pytest.approx(0.1 * data.sigma_data, rel=1e-6)
    else:
        assert float(t) == loss.first_time(sde)


# Models of one level


def test_langevin_dynamics_keeps_the_law_of_its_level():
    """N(0, V + sigma^2) with the variance V' / (1 - delta / 2 V') of a finite step."""
    sde, t = VESDE(0.01, 3.0), 0.6
    exact = GaussianModel(mean=torch.zeros(1), std=0.5, sde=sde)
    sigma = float(sde.sigma(torch.tensor(t)))
    v, delta = 0.25 + sigma**2, 0.05
    x = LangevinDynamics(steps=150, delta=delta, eps=t)(exact, shape=(20_000, 1), seed=0).x
    expected = v / (1 - delta / (2 * v))
    assert float(x.square().mean()) == pytest.approx(expected, rel=4 * math.sqrt(2 / len(x)))
    assert abs(float(x.mean())) < 4 * math.sqrt(expected / len(x))


def test_other_samplers_are_refused_at_one_level():
    from scoresde.sample import Heun

    assert at_time(LangevinDynamics(), 0.2).eps == 0.2
    with pytest.raises(InputError, match="sampler"):
        at_time(Heun(), 0.2)
    with pytest.raises(InputError, match="delta"):
        LangevinDynamics(delta=0)
