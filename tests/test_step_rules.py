"""Samplers with rules for observations, against exact recursions of their laws on Gaussians."""

from itertools import pairwise

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianModel, InputError, RectifiedFlow
from scoresde.inverse import DDNM, DPSStep, Replacement, SDEdit
from scoresde.operators import Downsampling, Masking, NonLinear, Observation
from scoresde.sample import DDIM, Heun, ProbabilityFlow
from scoresde.times import LogSNRGrid, UniformGrid

C = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
SEEN = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
Y = torch.tensor([1.0, 0.0], dtype=torch.float64)
SDES = [VPSDE(), VESDE(0.01, 20.0)]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def exact(sde):
    return GaussianModel(torch.zeros(2).double(), covariance=C, sde=sde)


def observed(std=0.0):
    return Observation(Masking(torch.tensor([True, False])), Y, std)


def name(value):
    return getattr(value, "__name__", repr(value))


def number(value):
    return float(value)


class Law:
    """The mean and the covariance of a state that only linear steps change."""

    def __init__(self, sde):
        self.sde = sde
        self.mean, self.cov = torch.zeros(2).double(), sde.prior_std**2 * EYE

    def at(self, t):
        alpha, sigma = number(self.sde.alpha(t)), number(self.sde.sigma(t))
        inverse = torch.linalg.inv(alpha**2 * C + sigma**2 * EYE)
        return alpha, sigma, alpha * C @ inverse, sigma * inverse  # D and z of a state

    def move(self, matrix, shift, noise):
        self.mean = matrix @ self.mean + shift
        self.cov = matrix @ self.cov @ matrix.T + noise


def law_of_ddnm(sde, sampler):
    law, times = Law(sde), sampler.times(sde, sde.cutoffs.sampling)
    for t, s in pairwise(times):
        _, _, data, noise = law.at(t)
        alpha, sigma, _, _ = law.at(s)
        kept = (1 - sampler.eta**2) ** 0.5
        matrix = alpha * (EYE - SEEN) @ data + sigma * kept * noise
        law.move(matrix, alpha * Y, (sigma * sampler.eta) ** 2 * EYE)
    _, _, data, _ = law.at(times[-1])
    law.move((EYE - SEEN) @ data, Y, 0 * EYE)
    return law


def law_of_replacement(sde, sampler):
    law, times = Law(sde), sampler.times(sde, sde.cutoffs.sampling)
    for first in range(0, sampler.steps, sampler.jump):
        piece = times[first : first + sampler.jump + 1]
        for again in range(sampler.resamplings):
            if again:
                a, tau = (number(v) for v in sde.transition(piece[-1], piece[0]))
                law.move(a * EYE, 0 * Y, tau**2 * EYE)
            for t, s in pairwise(piece):
                _, sigma_t, data, _ = law.at(t)
                alpha, sigma, _, _ = law.at(s)
                a, tau = (number(v) for v in sde.transition(s, t))
                step = a * (sigma / sigma_t) ** 2 * EYE + alpha * (tau / sigma_t) ** 2 * data
                law.move(step, 0 * Y, (sigma * tau / sigma_t) ** 2 * EYE)
                law.move(EYE - SEEN, alpha * Y, sigma**2 * SEEN)
    law.move(EYE - SEEN, Y, 0 * EYE)
    return law


def agrees(x, law):
    """Within four standard errors; the observed entry exactly."""
    n = len(x)
    assert torch.allclose(x[:, 0], torch.ones(n).double(), atol=1e-12)
    mean, variance = number(law.mean[1]), number(law.cov[1, 1])
    assert abs(number(x[:, 1].mean()) - mean) < 4 * (variance / n) ** 0.5
    assert abs(number(x[:, 1].var()) / variance - 1) < 4 * (2 / n) ** 0.5


@each_sde
@pytest.mark.parametrize("grid", [UniformGrid(), LogSNRGrid()], ids=repr)
def test_ddnm_is_its_recursion_to_the_last_digits(sde, grid):
    """Without fresh noise the whole map is linear: basis vectors show its matrix and shift."""
    sampler = DDNM(30, grid)
    start = torch.cat((torch.zeros(1, 2).double(), EYE))
    end = sampler(exact(sde), latent=start, observed=observed()).x
    law, matrix = law_of_ddnm(sde, sampler), (end[1:] - end[0]).T
    torch.testing.assert_close(end[0], law.mean, rtol=0, atol=1e-10)
    cov = sde.prior_std**2 * matrix @ matrix.T
    torch.testing.assert_close(cov, law.cov, rtol=0, atol=1e-9)


@each_sde
@pytest.mark.parametrize(
    ("sampler", "law_of"),
    [
        (DDNM(40, eta=0.85), law_of_ddnm),
        (Replacement(40, resamplings=1), law_of_replacement),
        (Replacement(24, resamplings=3, jump=4), law_of_replacement),
    ],
    ids=name,
)
def test_stochastic_rules_have_the_law_of_their_recursion(sde, sampler, law_of):
    x = sampler(exact(sde), (4000, 2), observed=observed(), seed=1).x
    agrees(x, law_of(sde, sampler))


@pytest.mark.parametrize(
    ("sampler", "law_of", "mean", "variance"),
    [
        (DDNM(100), law_of_ddnm, 0.746, 0.361),
        (DDNM(100, eta=0.85), law_of_ddnm, 0.737, 0.284),
        (DDNM(1000), law_of_ddnm, 0.784, 0.361),
        (Replacement(100, UniformGrid(), resamplings=1), law_of_replacement, 0.490, 0.457),
        (Replacement(100, UniformGrid(), resamplings=5), law_of_replacement, 0.728, 0.316),
        (Replacement(100, UniformGrid(), resamplings=20), law_of_replacement, 0.781, 0.258),
    ],
    ids=name,
)
def test_the_table_of_the_docstring(sampler, law_of, mean, variance):
    law = law_of(VPSDE(), sampler)
    assert number(law.mean[1]) == pytest.approx(mean, abs=0.0035)
    assert number(law.cov[1, 1]) == pytest.approx(variance, abs=0.0035)


def test_ddnm_tends_to_the_exact_posterior_of_a_gaussian():
    law = law_of_ddnm(VPSDE(), DDNM(4000, LogSNRGrid()))
    assert number(law.mean[1]) == pytest.approx(0.8, abs=0.01)
    assert number(law.cov[1, 1]) == pytest.approx(0.36, abs=0.005)


def test_the_published_push_of_dps_has_the_law_that_its_docstring_states():
    """Mean 1.00 and variance .0299 for N(0, 1) observed as 1, whatever the noise of y."""
    model = GaussianModel(torch.zeros(1).double(), 1.0, VPSDE())
    seen = Observation(Masking(torch.tensor([True])), torch.ones(1).double(), 0.5)
    out = DPSStep(1000)(model, (3000, 1), observed=seen, seed=0)
    assert number(out.x.mean()) == pytest.approx(1.0, abs=4 * (0.03 / 3000) ** 0.5 + 0.005)
    assert number(out.x.var()) == pytest.approx(0.0299, rel=4 * (2 / 3000) ** 0.5)
    assert (int(out.nfe[0]), int(out.vjps[0])) == (1000, 1000)


@pytest.mark.parametrize("rule", [DDNM(8, eta=0.5), Replacement(6), DPSStep(8)], ids=repr)
def test_a_sample_does_not_depend_on_its_batch(rule):
    std = 0.5 if isinstance(rule, DPSStep) else 0.0
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    seen = Observation(Masking(mask), y, std)
    model, row = exact(VPSDE()), torch.tensor([1])
    together = rule(model, (3, 2), observed=seen, seed=3).x
    alone = rule(model, (1, 2), observed=seen.take(row), seed=3, seeds=[1]).x
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sde", [VPSDE(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize(
    ("sampler", "stochastic"), [(DDIM(400, LogSNRGrid(), eta=1.0), True), (Heun(60), False)]
)
def test_sdedit_has_the_law_of_its_docstring(sde, sampler, stochastic):
    """Within four standard errors and .01 for the steps and the cut-off."""
    n, t0, source = 20_000, 0.3, 2.0
    c = torch.tensor([1.0, 0.25], dtype=torch.float64)
    model = GaussianModel(torch.zeros(2).double(), c.sqrt(), sde)
    edit = SDEdit(t0, sampler, final_denoise=False)
    x = edit(model, source=torch.full((n, 2), source).double(), seed=0).x
    alpha, sigma = (float(v(torch.tensor(t0).double())) for v in (sde.alpha, sde.sigma))
    v = alpha**2 * c + sigma**2
    k = alpha * c / v
    mean = alpha * (k if stochastic else (c / v).sqrt()) * source
    variance = c * sigma**2 / v + (sigma**2 * k**2 if stochastic else 0)
    assert bool(((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt() + 0.01).all())
    assert float((x.var(0) / variance - 1).abs().max()) < 4 * (2 / n) ** 0.5 + 0.01


def test_sdedit_takes_the_steps_below_its_time_and_each_row_its_own_stream():
    model, source = exact(VPSDE()), torch.ones(3, 2).double()
    edit = SDEdit(0.5, DDIM(100, UniformGrid(), eta=1.0))
    out = edit(model, source=source, seed=5)
    assert 50 <= int(out.nfe[0]) <= 51
    alone = edit(model, source=source[:1], seed=5, seeds=[2])
    torch.testing.assert_close(alone.x[0], out.x[2], rtol=0, atol=1e-12)


def test_a_projected_picture_agrees_with_its_pixels():
    """Downsampled images on a scale other than that of the model."""
    model = GaussianModel(torch.full((1, 4, 4), 3.0).double(), 2.0, VPSDE())
    y = torch.arange(4.0).reshape(1, 2, 2).double()
    seen = Observation(Downsampling(2), y, 0.0)
    for rule in (DDNM(10), Replacement(10, resamplings=2)):
        x = rule(model, (2, 1, 4, 4), observed=seen, seed=0).x
        torch.testing.assert_close(Downsampling(2)(x), y.expand(2, 1, 2, 2), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDNM(eta=1.5), "eta.*1.5"),
        (lambda: DPSStep(zeta=0.0), "zeta.*0.0"),
        (lambda: Replacement(resamplings=0), "resamplings.*0"),
        (lambda: SDEdit(1.0), "t0.*1.0"),
        (lambda: SDEdit(0.5, ProbabilityFlow()), "sampler.*ProbabilityFlow"),
        (lambda: SDEdit(1e-4)(exact(VPSDE()), source=torch.zeros(1, 2)), "t0.*0.0001"),
        (lambda: DDNM()(exact(VPSDE()), (2, 2), observed=observed(0.1), seed=0), "std.*0.1"),
        (lambda: DDNM()(exact(VPSDE()), (2, 2), observed=Y, seed=0), "observed.*Tensor"),
        (
            lambda: DDNM()(
                exact(VPSDE()), (2, 2), observed=Observation(NonLinear(torch.tanh), Y, 0.0)
            ),
            "NonLinear",
        ),
        (lambda: DDNM()(exact(VPSDE()), (2, 3), observed=observed(), seed=0), "3"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
