"""The variational bound as a loss, and the schedule that is learned by it."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch

from scoresde import (
    SDE,
    VPSDE,
    Cutoffs,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    LearnedSchedule,
    RectifiedFlow,
    ScoreModel,
)
from scoresde.data import two_moons
from scoresde.likelihood import DiscreteBound, Levels, VariationalBound, prior_kl
from scoresde.loss import LeastVariance, VariationalLoss, WholeBound
from scoresde.nn import MLP
from scoresde.sde import as_time
from scoresde.tasks.schedule import schedule_figure, spreads
from scoresde.times import ImportanceTimes, LowDiscrepancy, UniformTimes

D, VARIANCE = 8, 0.25
INDEPENDENT = UniformTimes()


def uneven(seed=0, log_snr_max=10.0, **options):
    """A schedule with random weights."""
    sde = LearnedSchedule(log_snr_max, **options)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in interior(sde):
            weight += torch.randn(weight.shape, generator=draw)
    return sde


def interior(sde):
    return [p for name, p in sde.named_parameters() if not name.startswith("log_snr")]


def ends(sde):
    return [sde.log_snr_max, sde.log_snr_min]


def gaussian(sde, std=VARIANCE**0.5):
    return GaussianModel(mean=torch.zeros(D), std=std, sde=sde)


def network(sde):
    """A network that has learned nothing, and reads the state and the noise label."""
    torch.manual_seed(0)
    net = MLP(2, width=16, depth=1)
    torch.nn.init.normal_(net.linear_out.weight, std=0.3)
    return ScoreModel(net, sde).double()


def examples(count, d=D, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return VARIANCE**0.5 * torch.randn(count, d, generator=draw)


def moments(sde, count=20_000):
    """The mean and the standard deviation of the diffusion term of the exact model, in nats.

    The error of the noise is normal with the variance h in each of D dimensions.
    """
    t = ((torch.arange(count) + 0.5) / count).to(torch.float64)
    signal = sde.alpha(t) ** 2 * VARIANCE
    h = signal / (signal + sde.sigma(t) ** 2)
    rate = (sde.g(t) / sde.sigma(t)) ** 2
    mean = (0.5 * rate * D * h).mean()
    square = (0.25 * rate**2 * h**2 * (D**2 + 2 * D)).mean()
    return mean, (square - mean**2).sqrt()


# --- The schedule --------------------------------------------------------------------------------


def test_the_ends_are_exactly_those_that_were_set():
    for seed in range(5):
        sde = uneven(seed).double()
        with torch.no_grad():
            sde.log_snr_max += 0.123
        found = sde.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(found, torch.stack(ends(sde)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_monotone_whatever_the_weights(seed):
    sde = uneven(seed).double()
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert bool((sde.log_snr(t).diff() < 0).all())
    torch.testing.assert_close(
        sde.time(sde.log_snr(t)), t, rtol=0, atol=1e-12
    )  # and so it has an inverse


def test_it_begins_nearly_linear():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    sde = LearnedSchedule().double()
    torch.testing.assert_close(sde.log_snr(t), 13.3 - 18.3 * t, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["alpha_dot", "sigma_dot", "f", "g"])
def test_coefficients_follow_from_alpha_and_sigma(name):
    sde, t = uneven().double(), torch.linspace(0, 1, 101, dtype=torch.float64)
    found, by_autograd = getattr(sde, name)(t), getattr(SDE, name)(sde, t)
    torch.testing.assert_close(found, by_autograd, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["alpha", "sigma", "alpha_dot", "sigma_dot", "f", "g", "log_snr"])
def test_float32_keeps_its_digits(name):
    single, t = uneven(log_snr_max=13.3), torch.linspace(0, 1, 101)
    double = copy.deepcopy(single).double()
    found, truth = getattr(single, name)(t), getattr(double, name)(t.double())
    scale = 13.3 if name == "log_snr" else 0.0
    torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=1e-6 * scale)


def test_fixed_ends_are_no_weights():
    sde = LearnedSchedule(fixed_ends=True)
    assert {name for name, _ in sde.named_parameters()} == {
        *("slope", "steepness", "centre", "height")
    }
    assert {"log_snr_max", "log_snr_min"} <= sde.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"log_snr_max": -6.0}, "log_snr_max"),
        ({"log_snr_min": -math.inf}, "log_snr_min"),
        ({"width": 0}, "width"),
    ],
)
def test_wrong_settings_of_a_schedule(options, name):
    with pytest.raises(InputError, match=name):
        LearnedSchedule(**options)


# --- The value -----------------------------------------------------------------------------------


def test_the_bound_of_an_exact_model_is_the_entropy():
    """But for what the prior and the last step miss, below 0.01 nats."""
    model, x = gaussian(uneven(log_snr_max=13.3)), examples(40_000)
    value = VariationalLoss(times=INDEPENDENT)(model, x, seed=0).detach() * D
    entropy = 0.5 * D * math.log(2 * math.pi * math.e * VARIANCE)
    assert abs(float(value.mean()) - entropy) < 4 * float(value.std()) / len(x) ** 0.5 + 0.01


def test_the_parts_add_to_the_value():
    terms = VariationalLoss()(gaussian(uneven()), examples(16), seed=0)
    parts = VariationalLoss().terms(gaussian(uneven()), examples(16), seed=0).parts
    assert parts.keys() == {"reconstruction", "diffusion", "prior"}
    torch.testing.assert_close(sum(parts.values()), terms.detach())


@pytest.mark.parametrize("sde", [uneven(), VPSDE()], ids=["learned", "vp"])
def test_a_chain_has_the_terms_of_the_discrete_bound(sde):
    """Where no noise is left at t = 0, the first of its steps is the decoder's."""
    model, x = gaussian(sde).double(), examples(4000).double()
    bound = DiscreteBound(None, steps=10)(model, x, seed=1)
    loss = VariationalLoss(steps=10, times=INDEPENDENT)
    parts = [loss.terms(model, x, seed=seed).parts for seed in range(8)]
    for name, truth in (
        ("diffusion", bound.consistency),
        ("reconstruction", bound.reconstruction),
    ):
        found = D * torch.stack([part[name] for part in parts]).mean(1)
        error = math.hypot(float(found.std()) / 8**0.5, float(truth.std()) / len(x) ** 0.5)
        assert abs(float(found.mean() - truth.mean())) < 4 * error + 1e-3
    torch.testing.assert_close(D * parts[0]["prior"], bound.prior)


def test_many_steps_tend_to_continuous_time():
    model, x = gaussian(uneven()).double(), examples(4000).double()
    t = torch.full((len(x),), 0.5, dtype=torch.float64)
    whole, chain = (
        VariationalLoss(steps=steps).terms(model, x, t, seed=0).parts["diffusion"].mean()
        for steps in (None, 20_000)
    )
    torch.testing.assert_close(chain, whole, rtol=2e-3, atol=0)


def test_levels_are_read_wherever_in_their_step_a_value_lies():
    """Training data may lie at the centres, and held-out data are dequantised."""
    model, loss = network(uneven()), VariationalLoss(Levels(17))
    centres = (2 * torch.arange(17.0) + 1) / 17 - 1
    x = centres.repeat(2)[:34].reshape(17, 2).double()
    beside = x + (torch.rand(17, 2, generator=torch.Generator().manual_seed(0)) - 0.5) / 9
    torch.testing.assert_close(loss(model, beside, seed=0), loss(model, x, seed=0))
    bound = VariationalBound(draws=64, replicates=8, decoder=Levels(17))(model, x, seed=0)
    many = torch.stack([loss(model, x, seed=seed).detach() for seed in range(400)]).mean(1)
    truth = -bound.log_prob.mean() / 2
    error = math.hypot(float(many.std()) / 20, float(bound.standard_error.mean()) / 17**0.5 / 2)
    assert abs(float(many.mean() - truth)) < 4 * error


# --- Its invariance ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power(SDE):
    """A log-SNR from 10 to -5 whose fall is a power of the time."""

    power: float = 1.0

    @property
    def cutoffs(self):
        return Cutoffs(0.0, 0.0, 0.0)

    def log_snr(self, t):
        return 10 - 15 * as_time(t) ** self.power

    def alpha(self, t):
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t):
        return torch.sigmoid(-self.log_snr(t)).sqrt()


def test_the_mean_does_not_depend_on_the_interior_and_the_spread_does():
    loss, x = VariationalLoss(times=INDEPENDENT), examples(40_000)
    found = {
        power: D * loss.terms(gaussian(Power(power)), x, seed=0).parts["diffusion"]
        for power in (0.8, 1.0, 1.6)
    }
    linear = found[1.0]
    for power, value in found.items():
        error = math.hypot(float(value.std()), float(linear.std())) / len(x) ** 0.5
        assert abs(float(value.mean() - linear.mean())) < 4 * error
        assert float(value.std()) == pytest.approx(float(moments(Power(power))[1]), rel=0.03)
    spreads = {power: float(value.std()) for power, value in found.items()}
    assert spreads[1.0] == pytest.approx(33.1, rel=0.02)
    assert spreads[0.8] > 1.2 * spreads[1.0] > 1.2 * 1.05 * spreads[1.6]


def test_the_interior_has_no_gradient_of_the_mean():
    """For a network too, which the state and the label reach by the schedule."""
    model = network(uneven())
    loss = VariationalLoss(schedule=WholeBound(), times=INDEPENDENT)
    found = []
    for seed in range(40):
        model.zero_grad()
        loss(model, examples(500, 2, seed).double(), seed=seed).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in interior(model.sde)]))
    gradients = torch.stack(found)
    scores = gradients.mean(0) / (gradients.std(0) / len(gradients) ** 0.5)
    assert len(scores) == 97
    assert float(scores.abs().max()) < 4
    moved = [float(end.grad) for end in ends(model.sde)]
    assert min(map(abs, moved)) > 1e-3


# --- One backward pass ---------------------------------------------------------------------------


def nudged(value, weight, place, step=1e-5):
    """The derivative of a value in one entry of a weight, by finite differences."""
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.view(-1)[place] += sign * step
            found.append(float(value()))
            weight.view(-1)[place] -= sign * step
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("exact", [True, False])
def test_one_backward_pass_serves_the_bound_and_its_variance(exact):
    """The interior gets the gradient of the mean square, all else that of the mean."""
    model = gaussian(uneven()).double() if exact else network(uneven())
    x, loss = examples(300, D if exact else 2).double(), VariationalLoss(times=INDEPENDENT)
    loss(model, x, seed=0).mean().backward()

    def mean():
        return loss(model, x, seed=0).mean()

    def square():
        return loss.terms(model, x, seed=0).parts["diffusion"].square().mean()

    for weight in interior(model.sde):
        place = int(weight.grad.abs().argmax())
        truth = nudged(square, weight, place)
        assert float(weight.grad.view(-1)[place]) == pytest.approx(truth, rel=1e-3)
    others = [*ends(model.sde), *([] if exact else [model.network.linear_in.weight])]
    for weight in others:
        truth = nudged(mean, weight, 0)
        assert float(weight.grad.view(-1)[0]) == pytest.approx(truth, rel=1e-3)


def test_the_gradient_is_that_of_the_variance():
    """Its law: that of the closed form, within the error of the draws."""
    sde = uneven()
    model, count = gaussian(sde).double(), 40
    moments(sde)[1].square().backward()
    truth = torch.cat([p.grad.flatten() for p in interior(sde)]) / D**2
    found = []
    for seed in range(count):
        sde.zero_grad()
        VariationalLoss(times=INDEPENDENT)(
            model, examples(2000, seed=seed).double(), seed=seed
        ).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in interior(sde)]))
    gradients = torch.stack(found)
    error = gradients.std(0) / count**0.5
    assert float(((gradients.mean(0) - truth) / error).abs().max()) < 4


def test_a_scaled_loss_has_scaled_gradients():
    model, x = network(uneven()), examples(16, 2).double()
    found = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        (scale * VariationalLoss()(model, x, seed=0).sum()).backward()
        found.append(torch.cat([p.grad.flatten() / scale for p in model.sde.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_gradients_in_float32():
    found = []
    for model in (network(uneven()).float(), network(uneven())):
        VariationalLoss()(model, examples(64, 2).to(model.dtype), seed=0).mean().backward()
        found.append([p.grad.double() for p in model.parameters()])
    for single, double in zip(*found, strict=True):
        atol = 1e-4 * float(double.abs().max())
        torch.testing.assert_close(single, double, rtol=0, atol=atol)


def test_an_example_has_the_same_gradient_in_any_batch():
    model, x = network(uneven()), examples(6, 2).double()
    loss = VariationalLoss(times=INDEPENDENT)

    def gradient(part):
        model.zero_grad()
        loss(model, x[part], seed=0, seeds=range(6), part=part).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(slice(0, 6))
    torch.testing.assert_close(gradient(slice(0, 2)) + gradient(slice(2, 6)), whole)


def test_nothing_is_left_of_the_factors():
    """Another loss of the same model gets plain gradients afterwards."""
    model = network(uneven())
    found = []
    for first in (lambda: None, lambda: VariationalLoss()(model, examples(4, 2).double(), seed=0)):
        first()
        model.zero_grad()
        model.sde.log_snr(torch.tensor([0.3, 0.6], dtype=torch.float64)).sum().backward()
        found.append(model.sde.height.grad.clone())
    assert torch.equal(*found)


def test_the_prior_has_a_gradient_in_the_end_point():
    sde, x = LearnedSchedule(10.0, 0.5).double(), examples(4).double()
    prior_kl(sde, x).sum().backward()
    truth = nudged(lambda: prior_kl(sde, x).sum(), sde.log_snr_min, 0)
    assert abs(truth) > 0.1
    assert float(sde.log_snr_min.grad) == pytest.approx(truth, rel=1e-6)
    assert float(sde.log_snr_max.grad) == 0


# --- What is learned -----------------------------------------------------------------------------


def test_a_schedule_learns_the_least_spread():
    """From 33.1 to at most 18.1; no schedule has less than 17.22, and the mean stays."""
    sde = LearnedSchedule(10.0, -5.0, fixed_ends=True)
    model, loss = gaussian(sde), VariationalLoss(times=INDEPENDENT)
    mean, std = (float(m.detach()) for m in moments(sde))
    assert std == pytest.approx(33.1, rel=5e-3)
    steps, rate = 400, 5e-2
    optimiser = torch.optim.Adam(sde.parameters(), lr=rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        loss(model, examples(1024, seed=step), seed=step).mean().backward()
        optimiser.step()
    after, least = (float(m.detach()) for m in moments(sde, 100_000))
    assert least <= 18.1
    assert least >= mean * (2 / D) ** 0.5 - 1e-3
    assert after == pytest.approx(mean, rel=1e-4)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "sde", "name"),
    [
        (VariationalLoss(schedule=LeastVariance()), VPSDE(), "sde .*LearnedSchedule.*VPSDE"),
        (VariationalLoss(schedule=LeastVariance(), steps=10), LearnedSchedule(), "steps .*10"),
        (VariationalLoss(steps=10), RectifiedFlow(), "steps .*10"),
    ],
)
def test_what_does_not_fit_the_model(loss, sde, name):
    with pytest.raises(InputError, match=name):
        loss(gaussian(sde), examples(4), seed=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: VariationalLoss(decoder=17), "decoder .*17"),
        (lambda: VariationalLoss(steps=1), r"steps .*\b1\b"),
        (lambda: VariationalLoss(schedule="variance"), "schedule .*variance"),
        (lambda: VariationalLoss(times=ImportanceTimes()), "times .*ImportanceTimes"),
        (
            lambda: VariationalLoss(times=LowDiscrepancy(ImportanceTimes())),
            "times .*ImportanceTimes",
        ),
        (lambda: LeastVariance(0.0), r"weight .*0\.0"),
    ],
)
def test_wrong_settings_of_the_loss(make, name):
    with pytest.raises(InputError, match=name):
        make()


def test_a_mixture_is_bounded_too():
    model = GaussianMixtureModel(
        weights=[0.3, 0.7], means=[[-1.0, 0.0], [1.0, 0.5]], stds=[0.3, 0.4], sde=uneven()
    )
    with torch.no_grad():
        x = model.sample(20_000, seed=0)
        value = VariationalLoss()(model, x, seed=0) * 2
        truth = -model.log_prob(x, 0.0)
    error = float((value - truth).std()) / len(x) ** 0.5
    assert abs(float((value - truth).mean())) < 4 * error + 0.01


# --- What is drawn -------------------------------------------------------------------------------


def test_the_spread_that_a_figure_tells_is_the_closed_form():
    """Along the learned schedule, and along a straight line, from the same errors."""
    sde, line = uneven().double(), Power(1.0)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    signal = sde.alpha(t).detach() ** 2 * VARIANCE
    h = signal / (signal + sde.sigma(t).detach() ** 2)
    noise = torch.randn(4000, 50, D, generator=torch.Generator().manual_seed(0)).double()
    errors = h[:, None] * noise.square().mean(2)
    found = spreads(sde, t, errors)
    truth = [float(moments(process)[1].detach()) / D for process in (sde, line)]
    assert found == pytest.approx(truth, rel=0.02)


def test_a_schedule_with_weights_is_drawn(tmp_path):
    data, model = two_moons(count=100), network(uneven()).float()
    (figure,) = schedule_figure(model, data, VariationalLoss(), 0, tmp_path)
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
    assert "straight line" in figure.caption
    assert schedule_figure(gaussian(VPSDE()), data, None, 0, tmp_path) == []
