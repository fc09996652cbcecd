"""Ways across the cut-off, on exact models, where only they can err."""

import math

import pytest
import torch

from experiments.likelihood_cutoff import (
    CASES,
    entropy,
    image_spectrum,
    measured_loss,
    plain_loss,
    rescaled_loss,
)
from experiments.likelihood_cutoff import main as write_table
from scoresde import (
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    RectifiedFlow,
    SubVPSDE,
)
from scoresde.likelihood.cutoff import PlainCutoff, RescaledCutoff, VariationalCutoff
from scoresde.model import Conditioned
from scoresde.passes import counting
from scoresde.streams import Streams

SDES = [VPSDE(), SubVPSDE(), VESDE(), RectifiedFlow()]
CUTOFFS = [PlainCutoff(), RescaledCutoff(), VariationalCutoff(), VariationalCutoff(0.7)]

each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
each_cutoff = pytest.mark.parametrize("cutoff", CUTOFFS, ids=repr)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(sde, *shape):
    return GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, *shape, seed=5), [0.3, 0.5], sde)


def clean(model, n, seed=0):
    """Data, and their own log-density: VE's marginal at t = 0 is noised, VP's is not."""
    sde, model.sde = model.sde, VPSDE()
    x = model.sample(n, seed=seed)
    truth = model.log_prob(x)
    model.sde = sde
    return x, truth


def noisy(sde):
    """The time at which the relative noise level is 0.15."""
    return float(sde.time(torch.tensor(-2 * math.log(0.15)).double()))


def log_prob(cutoff, model, x, eps, seed=0, draw=0):
    streams = Streams.of(seed, batch=len(x))
    state, correction = cutoff.start(Conditioned(model), x, eps, streams, draw)
    return model.log_prob(state, eps) + correction


def z_score(values, truth):
    """How many standard errors the mean of independent values is from the truth."""
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


# --- The three ways ------------------------------------------------------------------------------


@each_sde
def test_the_plain_one_changes_nothing(sde):
    x = normal(4, 3)
    field = Conditioned(mixture(sde, 3))
    with counting(4) as passes:
        state, correction = PlainCutoff().start(field, x, 0.1, Streams.of(0, batch=4))
    assert torch.equal(state, x)
    assert torch.equal(correction, torch.zeros(4).double())
    assert passes.network.tolist() == [0] * 4


@each_sde
def test_the_rescaled_one_is_the_density_of_data_with_a_little_noise(sde):
    model, x, eps = mixture(sde, 2, 3), normal(5, 2, 3), 0.1
    t = torch.tensor(eps).double()
    noise = sde.sigma(t) / sde.alpha(t)
    noised = GaussianMixtureModel(
        model.log_weights.exp(), model.means, (model.stds**2 + noise**2).sqrt(), VPSDE()
    )
    torch.testing.assert_close(log_prob(RescaledCutoff(), model, x, eps), noised.log_prob(x))


@each_sde
@pytest.mark.parametrize("variance", [1.0, 0.6])
def test_the_variational_one_adds_the_last_step_less_the_first(variance, sde):
    """Against the three normal densities themselves."""
    model, x, eps = mixture(sde, 3), normal(5, 3), 0.1
    streams = Streams.of(0, batch=5)
    with counting(5) as passes:
        state, correction = VariationalCutoff(variance).start(Conditioned(model), x, eps, streams)
    t = torch.tensor(eps).double()
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    std = variance**0.5 * sigma / alpha
    last = torch.distributions.Normal(model.denoise(state, t), std).log_prob(x).sum(1)
    first = torch.distributions.Normal(alpha * x, sigma).log_prob(state).sum(1)
    torch.testing.assert_close(correction, last - first)
    assert passes.network.tolist() == [1] * 5


@each_sde
def test_the_state_of_the_variational_one_is_a_state_of_the_diffusion(sde):
    eps, n = 0.3, 4000
    x = normal(1, 2).expand(n, 2)
    passes = Conditioned(mixture(sde, 2))
    state, _ = VariationalCutoff().start(passes, x, eps, Streams.of(0, batch=n))
    t = torch.tensor(eps).double()
    z = (state - sde.alpha(t) * x) / sde.sigma(t)
    assert abs(z_score(z.flatten(), 0)) < 4
    assert abs(z_score(z.flatten() ** 2, 1)) < 4


# --- What they lose ------------------------------------------------------------------------------


def loss(cutoff, c, sde, eps):
    """What an exact Gaussian model of centred data loses on average, nats per dimension."""
    t = torch.tensor(eps).double()
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    if isinstance(cutoff, PlainCutoff):
        ratio = alpha**2 * c + sigma**2
        ratio = ratio / c
    elif isinstance(cutoff, RescaledCutoff):
        ratio = 1 + (sigma / alpha) ** 2 / c
    else:  # the step's variance over that of the posterior
        ratio = cutoff.variance * (1 + (sigma / alpha) ** 2 / c)
    return 0.5 * (torch.log(ratio) + 1 / ratio - 1)


@each_sde
@each_cutoff
def test_the_loss_on_a_gaussian_is_its_closed_form(cutoff, sde):
    c = torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64)
    eps = noisy(sde)
    model = GaussianModel(torch.zeros(3).double(), c.sqrt(), sde)
    x, truth = clean(model, 20_000)
    lost = loss(cutoff, c, sde, eps).sum()
    assert abs(z_score(truth - log_prob(cutoff, model, x, eps), lost)) < 4
    assert float(lost) > 0.04


@each_sde
@each_cutoff
def test_no_way_gives_a_mixture_more_than_its_own_density_on_average(cutoff, sde):
    eps = noisy(sde)
    model = mixture(sde, 3)
    x, truth = clean(model, 4000)
    assert z_score(truth - log_prob(cutoff, model, x, eps), 0) > -3


@each_sde
def test_the_variational_one_bounds_every_example(sde):
    """Where the noise is large, over many draws for each."""
    model, draws = mixture(sde, 2), 2000
    eps = noisy(sde)
    x, truth = clean(model, 16)
    rows = log_prob(VariationalCutoff(), model, x.repeat_interleave(draws, 0), eps)
    values = rows.reshape(16, draws)
    error = values.std(1) / draws**0.5
    assert bool((values.mean(1) - 4 * error < truth).all())


@each_sde
@each_cutoff
def test_little_is_lost_at_the_default_cutoff(cutoff, sde):
    """Of data much coarser than the noise; a variance of 0.7 is wrong for them."""
    model, eps = mixture(sde, 64), sde.cutoffs.likelihood
    x, truth = clean(model, 64)
    error = (truth - log_prob(cutoff, model, x, eps)) / (64 * math.log(2))
    wrong = 0.0519 if cutoff == VariationalCutoff(0.7) else 0.0
    assert float(error.mean()) == pytest.approx(wrong, abs=0.02 if wrong else 5e-4)


# --- Image-like data -----------------------------------------------------------------------------


def test_image_like_data_have_the_entropy_of_images():
    c = image_spectrum()
    assert c.shape == (3072,)
    assert entropy(c) == pytest.approx(2.72, abs=0.01)
    assert float(c.mean()) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("sde", "eps", "bits"),
    [
        (VPSDE(), 1e-6, 0.0000),
        (VPSDE(), 1e-5, 0.0008),
        (VPSDE(), 1e-4, 0.0394),
        (VPSDE(), 1e-3, 0.4164),
        (SubVPSDE(), 1e-3, 0.0000),
        (SubVPSDE(), 1e-2, 0.0094),
        (VESDE(sigma_min=0.001), 0.0, 0.0008),
        (VESDE(sigma_min=0.01), 0.0, 0.3907),
        (VESDE(sigma_min=0.02), 0.0, 0.8502),
    ],
    ids=str,
)
def test_the_documented_losses(sde, eps, bits):
    """Those of the likelihood's module docstring, and of experiments/likelihood_cutoff."""
    assert plain_loss(image_spectrum(), sde, eps) == pytest.approx(bits, abs=5e-5)


def test_the_default_of_sub_vp_loses_less_than_a_hundred_thousandth_of_a_bit():
    assert 0 < plain_loss(image_spectrum(), SubVPSDE(), 1e-3) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("cutoff", CUTOFFS[:3], ids=repr)
def test_exact_models_lose_on_images_what_the_closed_form_says(cutoff, case):
    c = image_spectrum()
    closed = plain_loss if isinstance(cutoff, PlainCutoff) else rescaled_loss
    ours = measured_loss(cutoff, c, case.sde, case.eps, examples=16)
    assert abs(ours.mean - closed(c, case.sde, case.eps)) < 4.5 * ours.standard_error + 1e-9


def test_the_best_variance_of_the_last_step_recovers_a_third():
    c, sde, eps = image_spectrum(), VPSDE(), 1e-3
    t = torch.tensor(eps).double()
    best = float((1 / (1 + (sde.sigma(t) / sde.alpha(t)) ** 2 / c)).mean())
    ours = measured_loss(VariationalCutoff(best), c, sde, eps, examples=16).mean
    assert ours == pytest.approx(0.274, abs=0.01)
    assert ours < 0.7 * rescaled_loss(c, sde, eps)


def test_the_command_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path), "--examples", "2"])
    write_table()
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out
    assert text.count("\n| ") == len(CASES) + 1
    assert (tmp_path / "table.json").exists()


# --- Streams and values --------------------------------------------------------------------------


def test_an_example_is_the_same_alone_and_in_a_batch():
    model, x = mixture(VPSDE(), 3), normal(4, 3)
    both = Streams.of(0, batch=4)
    together, added = VariationalCutoff().start(Conditioned(model), x, 0.1, both)
    alone, more = VariationalCutoff().start(Conditioned(model), x[2:3], 0.1, both[2:3])
    torch.testing.assert_close(alone, together[2:3])
    torch.testing.assert_close(more, added[2:3])


def test_another_draw_is_another_noise():
    model, x = mixture(VPSDE(), 3), normal(4, 3)
    first, again, other = (
        log_prob(VariationalCutoff(), model, x, 0.1, draw=draw) for draw in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not bool((first == other).any())


@each_cutoff
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_type_of_the_data(dtype, cutoff):
    model, x = mixture(VPSDE(), 2, 3).to(dtype), normal(4, 2, 3).to(dtype)
    state, correction = cutoff.start(Conditioned(model), x, 0.1, Streams.of(0, batch=4))
    assert {state.dtype, correction.dtype} == {dtype}
    assert (state.shape, correction.shape) == ((4, 2, 3), (4,))


def test_float32_is_enough_for_the_variational_one():
    """Noise and prediction are small beside the data at the default cut-off."""
    model, eps = mixture(VPSDE(), 64), 1e-5
    x, _ = clean(model, 64)
    wide = VariationalCutoff().start(Conditioned(model), x, eps, Streams.of(0, batch=64))[1]
    narrow = VariationalCutoff().start(
        Conditioned(model.float()), x.float(), eps, Streams.of(0, batch=64)
    )[1]
    assert float((narrow - wide).abs().max()) < 1e-3


@each_cutoff
def test_cutoffs_are_values(cutoff):
    assert hash(cutoff) == hash(type(cutoff)(**vars(cutoff)))
    with pytest.raises(AttributeError):
        cutoff.variance = 2.0


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_an_unusable_variance_is_refused(variance):
    with pytest.raises(InputError, match=f"variance .*{variance}"):
        VariationalCutoff(variance)
