"""Models made of models: clipping and thresholding of the expected data."""

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianModel, InputError, SubVPSDE
from scoresde.guidance import Clipped, DynamicThreshold
from scoresde.sample import DDIM, ProbabilityFlow

SDES = [VPSDE(), SubVPSDE(), VESDE(0.01, 10.0)]
MAKERS = [
    Clipped,
    DynamicThreshold,
    lambda model: DynamicThreshold(model, 0.5, -0.2, 0.4),
]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def exact(sde, std=1.0, d=64):
    return GaussianModel(torch.zeros(d, dtype=torch.float64), std, sde).double()


def states(sde, t, n=8, d=64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 2 * (sde.alpha(t) + sde.sigma(t)) * x


@each_sde
@pytest.mark.parametrize("make", MAKERS)
def test_the_three_views_stay_one_function(make, sde):
    t = torch.tensor(0.3, dtype=torch.float64)
    model, x = make(exact(sde)), states(sde, t)
    noise, data = model.noise(x, t), model.denoise(x, t)
    torch.testing.assert_close(sde.alpha(t) * data + sde.sigma(t) * noise, x)
    torch.testing.assert_close(model.score(x, t), -noise / sde.sigma(t))


@each_sde
def test_data_in_the_range_are_left_as_they_are(sde):
    t = torch.tensor(1e-3, dtype=torch.float64)
    plain, x = exact(sde, std=0.1), 0.1 * states(sde, t)
    assert torch.equal(Clipped(plain, -50, 50).noise(x, t), plain.noise(x, t))
    assert torch.equal(Clipped(plain, -50, 50).denoise(x, t), plain.denoise(x, t))


def test_clipped_data_keep_to_the_range():
    t = torch.tensor(0.1, dtype=torch.float64)
    data = Clipped(exact(VPSDE()), -0.5, 0.25).denoise(states(VPSDE(), t), t)
    assert (float(data.min()), float(data.max())) == (-0.5, 0.25)


def test_a_threshold_is_that_of_each_example():
    """Values 1 to 100 with the limit at the 90th: scaled by 90, and those above are clipped."""
    model = DynamicThreshold(exact(VPSDE(), d=100), 0.9)
    values = torch.arange(1.0, 101.0)
    data = torch.stack([values, -values, 0.005 * values])
    changed = model.change(data)
    scaled = (values / 90).clamp(max=1)
    torch.testing.assert_close(changed, torch.stack([scaled, -scaled, 0.005 * values]))


def test_a_threshold_about_another_middle():
    model = DynamicThreshold(exact(VPSDE(), d=4), 1.0, low=0.0, high=1.0)
    data = torch.tensor([[0.0, 0.5, 1.0, 2.0]])
    torch.testing.assert_close(model.change(data), torch.tensor([[1 / 3, 0.5, 2 / 3, 1.0]]))


@each_sde
@pytest.mark.parametrize("sampler", [DDIM(16), ProbabilityFlow(1e-3, 1e-3)], ids=repr)
def test_samplers_take_them(sampler, sde):
    """Of data four times as wide as the range, samples that end there."""
    wide = exact(sde, std=4.0)
    x = sampler(Clipped(wide), shape=(8, 64), seed=0).x
    rest = 5 * float(sde.sigma(torch.tensor(sde.cutoffs.sampling)))
    assert float(x.abs().max()) < 1 + rest < float(sampler(wide, (8, 64), seed=0).x.abs().max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Clipped(m, 1, 1), "low.*high.*1 and 1"),
        (lambda m: DynamicThreshold(m, low=2), "low.*high.*2 and 1"),
        (lambda m: DynamicThreshold(m, 0), r"quantile.*\b0;"),
        (lambda m: Clipped(torch.nn.Linear(2, 2)), "ScoreModel"),
    ],
    ids=["range", "low", "quantile", "model"],
)
def test_unusable_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(exact(VPSDE()))
