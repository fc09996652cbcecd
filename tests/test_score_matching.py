"""Explicit, sliced and one-level score matching: their identities, variances and optima."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from scoresde import (
    VESDE,
    VPSDE,
    DenoisingScoreMatching,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    NoiseWeighting,
    ScoreFunction,
    ScoreModel,
    ScoreParametrisation,
    fit,
)
from scoresde.divergence import ExactTrace, Gaussian, Hutchinson, IndependentProbes, Orthogonal
from scoresde.loss import ExplicitScoreMatching, OneLevel, SlicedScoreMatching, only_time
from scoresde.nn import MLP
from scoresde.times import FirstTime, LevelTimes, LowDiscrepancy, UniformTimes
from scoresde.train import ConstantRate, Training
from scoresde.train.update import Update

SDE = VESDE(0.01, 50.0)
ZERO = torch.zeros((), dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nodes(count=64):
    """Nodes and weights of the average over N(0, 1), exact for polynomials."""
    import numpy as np

    x, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


class Linear(ScoreFunction):
    """The score -P x, times a power of the noise level's width."""

    def __init__(self, precision, sde=SDE):
        super().__init__()
        self.sde, self.precision = sde, precision

    def score(self, x, t, **cond):
        return -x @ self.precision.to(x)

    noise = denoise = None


# Identities


@pytest.mark.parametrize("v", [0.3, 0.8, 2.0])
def test_explicit_is_the_error_of_the_score_less_a_constant(v):
    """J = E|s - grad log p|^2 / 2 - E|grad log p|^2 / 2 on N(0, c), by quadrature."""
    c = 0.8
    (x,), (w,) = ([part] for part in nodes())
    x = math.sqrt(c) * x[:, None]
    model = GaussianModel(mean=torch.zeros(1).double(), std=math.sqrt(v), sde=SDE)
    t = torch.tensor(0.4, dtype=torch.float64)
    # At x_t = x, whatever of it is noise: the law of x is that of the average.
    noise = torch.zeros_like(x)
    found = w @ ExplicitScoreMatching()(model, x, t, noise)
    variance = v + float(SDE.sigma(t)) ** 2
    error = 0.5 * w @ (-x / variance + x / c)[:, 0] ** 2
    assert abs(found - (error - 0.5 * w @ (x / c)[:, 0] ** 2)) < 1e-10
    assert abs(found - (c / (2 * variance**2) - 1 / variance)) < 1e-10


def test_the_best_gaussian_is_that_of_the_data():
    c, spread = 0.7, nodes()
    x = math.sqrt(c) * spread[0][:, None]

    def value(v):
        loss = ExplicitScoreMatching()
        return spread[1] @ loss(
            Linear(torch.tensor([[1 / v]]).double()), x, ZERO, torch.zeros_like(x)
        )

    assert value(c) < min(value(0.97 * c), value(1.03 * c))
    assert abs(value(c) + 0.5 / c) < 1e-10


@pytest.mark.parametrize("t", [0.0, 0.6])
def test_the_state_is_the_noised_one(t):
    model = GaussianMixtureModel(
        [0.3, 0.7], torch.tensor([[1.0, -0.5], [-0.8, 0.6]]).double(), [0.3, 0.5], SDE
    )
    x, z = normal(8, 2), normal(8, 2, seed=1)
    t = torch.full((8,), t, dtype=torch.float64)
    found = ExplicitScoreMatching().terms(model, x, t, z)
    state = SDE.perturb(x, t, z)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: model.score(y[None], t[:1])[0]))(state)
    square = 0.5 * model.score(state, t).square().sum(1)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(found.value, trace + square, atol=1e-12, rtol=1e-12)
    assert torch.allclose(found.parts["divergence"], trace, atol=1e-12, rtol=1e-12)
    assert torch.allclose(found.parts["half_square"], square, atol=1e-12, rtol=1e-12)


class Basis(IndependentProbes):
    """All unit vectors, times sqrt(D): their second moment is the identity."""

    def one(self, streams, x, draw):
        d = x.shape[1:].numel()
        unit = torch.eye(d, dtype=x.dtype)[draw % d] * math.sqrt(d)
        return unit.reshape(x.shape[1:]).expand_as(x)


@pytest.mark.parametrize("probes", [Basis(), Orthogonal()], ids=["basis", "random frame"])
def test_sliced_over_a_basis_is_explicit(probes):
    model = Linear(normal(4, 4, seed=3))
    x, z = normal(6, 4), normal(6, 4, seed=1)
    t = torch.full((6,), 0.3, dtype=torch.float64)
    exact = ExplicitScoreMatching()(model, x, t, z)
    for reduced in (True, False):
        sliced = SlicedScoreMatching(probes=4, reduced=reduced, distribution=probes)
        assert (sliced(model, x, t, z, seed=0) - exact).abs().max() < 1e-12


def test_explicit_takes_the_probes_of_an_estimator():
    model, x = Linear(normal(3, 3, seed=3)), normal(5, 3)
    some = ExplicitScoreMatching(trace=Hutchinson(2))(model, x, ZERO, x, seed=4)
    sliced = SlicedScoreMatching(probes=2)(model, x, ZERO, x, seed=4)
    assert torch.equal(some, sliced)


# Variances. With s = -A x for a diagonal A and data N(0, I), by moments of normal numbers:


def widths(a):
    """The standard deviations of an example, in closed form."""
    exact, trace, squares = 0.5 * (a**4).sum(), 2 * (a**2).sum(), (a**2).sum() ** 2
    normal = 2 * ((0.5 * a**2 - a) ** 2).sum() + 0.5 * (squares + 2 * (a**4).sum())
    return [
        (ExplicitScoreMatching(), exact),
        (SlicedScoreMatching(), exact),
        (SlicedScoreMatching(distribution=Gaussian()), exact + trace),
        (SlicedScoreMatching(reduced=False), 0.5 * squares),
        (SlicedScoreMatching(reduced=False, distribution=Gaussian()), normal),
    ]


TRUTH = torch.ones(10, dtype=torch.float64)
# Two values whose moments give the published figures of 10 dimensions.
MIXED = torch.tensor([1.505, 0.09], dtype=torch.float64).repeat(5)


@pytest.mark.parametrize("a", [TRUTH, MIXED], ids=["truth", "mixed"])
def test_the_width_of_an_example_is_that_of_its_law(a):
    count = 40_000
    x, zero = normal(count, 10), torch.zeros(count, 10).double()
    with torch.no_grad():
        for loss, variance in widths(a):
            found = loss(Linear(a.diag()), x, ZERO, zero, seed=0)
            mean = float(0.5 * (a**2).sum() - a.sum())
            assert abs(found.mean() - mean) < 4 * variance.sqrt() / math.sqrt(count)
            kurtosis = ((found - found.mean()) / found.std()).pow(4).mean()
            error = found.var() * ((kurtosis - 1) / count).sqrt()  # of the sample variance
            assert abs(found.var() - variance) < 4 * error


def test_the_widths_are_those_of_the_notes():
    found = [float(variance.sqrt()) for _, variance in widths(MIXED)]
    assert found == pytest.approx([3.58, 3.58, 5.95, 8.05, 9.55], rel=0.005)
    reduced, plain = found[1], found[3]
    assert reduced <= 0.5 * plain


# Several levels


@pytest.mark.parametrize("sde", [SDE, VPSDE()], ids=["VE", "VP"])
def test_weighted_levels_equal_denoising_up_to_a_constant(sde):
    """w sigma^2 J and half the noise's error differ by what no model changes, at every level."""
    (x0, w0), (z0, wz) = nodes(24), nodes(24)
    x, z = (part.reshape(-1, 1) for part in torch.meshgrid(0.8 * x0, z0, indexing="ij"))
    weight = (w0[:, None] * wz).reshape(-1)
    for t in torch.tensor([0.2, 0.7], dtype=torch.float64):
        gaps = []
        for std in (0.5, 0.8, 1.3):
            model = GaussianModel(mean=torch.zeros(1).double(), std=std, sde=sde)
            explicit = ExplicitScoreMatching(weighting=NoiseWeighting())(model, x, t, z)
            denoising = DenoisingScoreMatching(NoiseWeighting(), reduce_mean=False)
            gaps.append(float(weight @ (denoising(model, x, t, z) - explicit).detach()))
        assert max(gaps) - min(gaps) < 1e-10
        assert gaps[0] == pytest.approx(0.5, abs=1e-10)  # half the variance of the noise


def test_drawn_times_are_the_given_ones():
    model, x = Linear(torch.eye(2).double()), normal(6, 2)
    loss = SlicedScoreMatching(NoiseWeighting(), LowDiscrepancy(UniformTimes()))
    drawn = loss(model, x, seed=3)
    parts = [
        loss(model, x[i : i + 3], seed=3, seeds=range(6), part=slice(i, i + 3)) for i in (0, 3)
    ]
    assert torch.equal(drawn, torch.cat(parts))
    one = ExplicitScoreMatching(eps=0.4)
    noise = torch.zeros_like(x)
    given = one(model, x, torch.full((6,), 0.4).double(), noise)
    assert torch.equal(one(model, x, noise=noise, seed=0), given)


def test_each_example_has_its_own_directions():
    model, x = Linear(normal(3, 3, seed=1)), normal(4, 3)
    loss = SlicedScoreMatching(probes=2)
    whole = loss(model, x, ZERO, x, seed=5)
    assert torch.equal(loss(model, x[2:], ZERO, x[2:], seed=5, seeds=[2, 3]), whole[2:])
    assert not torch.equal(loss(model, x, ZERO, x, seed=6), whole)


# Training


class LinearNetwork(nn.Module):
    """A linear score."""

    def __init__(self, d=2):
        super().__init__()
        self.weight = nn.Parameter(-torch.eye(d))
        self.shape = (d,)

    def forward(self, x, c):
        return x @ self.weight.T


class LabelledNetwork(nn.Module):
    """A linear score with a slope and a shift for each class."""

    def __init__(self):
        super().__init__()
        self.slope, self.shift = nn.Parameter(-torch.ones(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x, c, label):
        return self.slope[label][:, None] * x + self.shift[label][:, None]


def learned(network, loss, x, cond=None, sde=SDE, steps=400):
    model = ScoreModel(network, sde, ScoreParametrisation(sigma_data=None))
    optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.02)  # noqa: E731
    data = x if cond is None else (x, cond)
    options = {"batch_size": 1000, "optimizer": optimizer, "ema": 0.98, "progress": False}
    return fit(model, data, steps, loss=loss, **options).network


def whitened(x):
    """The numbers with mean 0 and covariance I to rounding, so that no sampling error is left."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x))).T


COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.5]])


@pytest.mark.parametrize(
    "loss",
    [ExplicitScoreMatching(eps=0.0), SlicedScoreMatching(probes=2, eps=0.0)],
    ids=["explicit", "sliced"],
)
def test_the_precision_of_a_gaussian_is_learned(loss):
    x = whitened(normal(4000, 2, dtype=torch.float32)) @ torch.linalg.cholesky(COVARIANCE).T
    precision = -learned(LinearNetwork(), loss, x).weight.detach()
    expected = torch.linalg.inv(COVARIANCE + 1e-4 * torch.eye(2))
    assert (precision - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_one_level_learns_the_noised_variance(sigma):
    """The slope is averaged over 400,000 draws: its error is 2.4 / sqrt(400,000) = 0.4 %."""
    c, loss = 0.5, OneLevel(sigma)
    x = math.sqrt(c) * whitened(normal(2000, 1, dtype=torch.float32))
    model = ScoreModel(LinearNetwork(1), SDE, ScoreParametrisation(sigma_data=None))
    update = Update(
        model, loss, Training(rate=ConstantRate(0)), partial(torch.optim.Adam, lr=0.02)
    )
    slopes = []
    for step in range(400):
        update(x, {}, step, len(x))
        slopes.append(model.network.weight.item())
    mean = sum(slopes[200:]) / 200
    assert -1 / mean == pytest.approx(c + sigma**2, rel=0.02)


def test_one_level_is_of_the_noise_relative_to_the_data():
    sde = VPSDE()
    t = torch.tensor(OneLevel(0.3).first_time(sde), dtype=torch.float64)
    assert float(sde.sigma(t) / sde.alpha(t)) == pytest.approx(0.3, abs=1e-12)
    assert OneLevel(0.01).first_time(VESDE(0.01, 50.0)) == 0
    assert OneLevel(50.0).first_time(VESDE(0.01, 50.0)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("loss", [ExplicitScoreMatching(eps=0.0), SlicedScoreMatching(eps=0.0)])
def test_each_class_of_a_mixture_is_learned(loss):
    label = torch.arange(4000) % 2
    means, stds = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 0.8])
    halves = whitened(normal(2000, 1, dtype=torch.float32)).repeat_interleave(2, 0)
    x = means[label][:, None] + stds[label][:, None] * halves
    found = learned(LabelledNetwork(), loss, x, {"label": label}, steps=600)
    precision, shift = -found.slope.detach(), found.shift.detach()
    assert torch.allclose(precision, 1 / stds**2, rtol=0.04)
    assert torch.allclose(shift / precision, means, atol=0.06)


def test_the_gradient_is_that_of_the_formula():
    """d/dP of tr(-P) + |P x|^2 / 2, also while nothing is recorded outside."""
    x = normal(16, 2, dtype=torch.float32)
    model = ScoreModel(LinearNetwork(), SDE, ScoreParametrisation(sigma_data=None))
    ExplicitScoreMatching()(model, x, torch.zeros(16), torch.zeros_like(x)).sum().backward()
    w = model.network.weight
    expected = 16 * torch.eye(2) + w.detach() @ (x.T @ x)
    assert torch.allclose(w.grad, expected, rtol=1e-5)
    with torch.no_grad():
        assert not ExplicitScoreMatching()(model, x, ZERO, x).requires_grad


def test_a_compiled_network_is_trained():
    model = ScoreModel(MLP(2, width=8), SDE)
    model.network.compile(backend="aot_eager")
    loss = SlicedScoreMatching()(model, normal(4, 2, dtype=torch.float32), seed=0)
    loss.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


# What is refused, and what a loss of one level says of itself


def test_a_loss_of_one_time_says_so():
    vp = VPSDE()
    assert only_time(ExplicitScoreMatching(), vp) == vp.cutoffs.training
    assert only_time(DenoisingScoreMatching(times=FirstTime(), eps=0.2), vp) == 0.2
    assert only_time(OneLevel(1.0), VESDE(0.1, 10.0)) == pytest.approx(0.5)
    assert only_time(SlicedScoreMatching(times=LevelTimes(5)), vp) is None
    assert only_time(DenoisingScoreMatching(), vp) is None
    assert only_time(None, vp) is None


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ExplicitScoreMatching(trace="exact"), "trace"),
        (lambda: ExplicitScoreMatching(weighting="noise"), "weighting"),
        (lambda: ExplicitScoreMatching(times=0.1), "times"),
        (lambda: SlicedScoreMatching(probes=0), "probes"),
        (lambda: SlicedScoreMatching(reduced="yes"), "reduced"),
        (lambda: SlicedScoreMatching(distribution=ExactTrace()), "distribution"),
        (lambda: OneLevel(0), "sigma"),
        (lambda: OneLevel(60.0).first_time(SDE), "sigma"),
        (lambda: OneLevel(200.0).first_time(VPSDE()), r"sigma must be in \(0, 15\d\], .*got 200"),
        (lambda: ExplicitScoreMatching(eps=0.0).first_time(VPSDE()), "eps"),
        (lambda: OneLevel(0.1).check(3), "model"),
    ],
)
def test_what_cannot_be_used_is_refused(make, name):
    with pytest.raises(InputError, match=name):
        make()
