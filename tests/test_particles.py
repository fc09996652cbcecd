"""Twisted particles: laws and evidence against closed forms, and what they may not depend on."""

import math
from itertools import pairwise

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    RectifiedFlow,
    SubVPSDE,
)
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.inverse import (
    DPS,
    MMPS,
    CovarianceKernel,
    IsotropicKernel,
    Linear,
    Masking,
    Observation,
    PiGDM,
    Twisted,
)
from scoresde.inverse.particles import systematic
from tests.models import ByLabel

SDES = [VPSDE(), SubVPSDE(), VESDE(), RectifiedFlow()]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
# For N(0, 1) and N(1, 1/4): mean, variance and log Z of the tilted law, by the scale.
TILTED = {
    0.5: (0.8, 0.4, -0.311572),
    1.5: (1.0909091, 0.1818182, 0.460074),
    2.0: (1.1428571, 0.1428571, 0.984768),
    3.0: (1.2, 0.1, 2.128149),
}
# A mixture whose modes are apart, and the same closer and sharper.
A = torch.tensor([[1, 0, 0.5, 0], [0, 1, 0, 0.5]], dtype=torch.float64)
CENTRES = torch.tensor(
    [[2, 1, 0, -1], [-2, 1, 1, 0], [1, -2, 0, 1], [-1, -1, -1, -1]], dtype=torch.float64
)
STDS = torch.tensor([0.3, 0.4, 0.25, 0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.25, 0.25, 0.2], dtype=torch.float64)
PROBLEMS = {
    # the scale of the centres: std of y, log p(y), weights of the posterior
    1.0: (0.7, -4.128927, (0.363468, 0.165855, 0.390131, 0.080546)),
    0.4: (0.3, -1.434541, (0.483674, 0.108157, 0.330564, 0.077604)),
}


def mixture(scale):
    std, _, _ = PROBLEMS[scale]
    prior = GaussianMixtureModel(WEIGHTS, scale * CENTRES, STDS, VPSDE())
    y = torch.tensor([0.3, 0.0], dtype=torch.float64)
    return prior, Observation(Linear(lambda x: x @ A.T), y, std)


def gaussian(sde, std=0.5):
    """N(0, 1) observed as 1: the posterior is N(.8, .2) for std .5."""
    prior = GaussianModel(torch.zeros(1).double(), 1.0, sde)
    seen = Observation(Masking(torch.tensor([True])), torch.ones(1).double(), std)
    return prior, seen


def wide(prior, seen):
    """A proposal that takes the data for twice as wide."""
    return PiGDM(prior, seen, data_std=2.0)


def moments(run):
    """Weighted mean and variance of one number."""
    w, x = run.log_weights.exp(), run.x.flatten(1)[:, 0]
    mean = (w * x).sum()
    return float(mean), float((w * (x - mean) ** 2).sum())


@each_sde
@pytest.mark.parametrize("guide", [MMPS, wide])
def test_particles_of_a_gaussian_have_its_posterior_and_its_evidence(guide, sde):
    """With any proposal; within four standard errors of the effective sample size, and 1 %."""
    run = Twisted(particles=2048, steps=40)(guide(*gaussian(sde)), seed=0)
    n = float(run.ess[-1])
    mean, variance = moments(run)
    assert mean == pytest.approx(0.8, abs=4 * (0.2 / n) ** 0.5 + 0.01)
    assert variance == pytest.approx(0.2, rel=4 * (2 / n) ** 0.5 + 0.01)
    truth = -0.5 * (1 / 1.25 + math.log(2 * math.pi * 1.25))
    gap = abs(float(run.log_evidence) - truth)
    assert gap < 3 * float(run.standard_error) + 0.01
    assert float(run.standard_error) < 0.1


def test_the_estimate_of_the_evidence_is_unbiased_for_a_bad_twist():
    """The mean of many small runs, relative to p(y), within four standard errors."""
    runs, (prior, seen) = 400, gaussian(VPSDE())
    many = Observation(seen.operator, seen.y.expand(runs, 1), 0.5)
    found = Twisted(particles=16, steps=20, groups=1)(DPS(prior, many), seed=0).log_evidence
    truth = -0.5 * (1 / 1.25 + math.log(2 * math.pi * 1.25))
    ratio = torch.exp(found - truth)
    error = float(ratio.std()) / runs**0.5
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * error + 0.005)  # and the prior's
    assert error < 0.1


@pytest.mark.parametrize("guide", [MMPS, PiGDM])
@pytest.mark.parametrize("scale", PROBLEMS)
def test_particles_of_a_mixture_have_its_posterior(scale, guide):
    """Weights of modes and evidence; sliced W2 within twice that of two exact sets."""
    prior, seen = mixture(scale)
    _, log_p, shares = PROBLEMS[scale]
    run = Twisted(particles=2048, steps=100)(guide(prior, seen), seed=1)
    gap = abs(float(run.log_evidence) - log_p)
    assert gap < 3 * float(run.standard_error) + 0.02
    exact = prior.exact_guide(seen)
    x = run.resampled(2048, seed=0)
    ours = exact._posterior(x, torch.zeros((), dtype=x.dtype), {})[1].mean(0)
    n = float(run.ess[-1])
    for found, share in zip(ours.tolist(), shares, strict=True):
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5 + 0.01)
    floor = sliced(exact.sample(2048, seed=2), exact.sample(2048, seed=3))
    assert sliced(x, exact.sample(2048, seed=4)) < 2 * max(floor, 0.054 if scale == 1 else 0.016)


def sliced(a, b):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(a.shape[1], 256, generator=generator, dtype=torch.float64)
    u = u / u.norm(dim=0)
    gap = (a.double() @ u).sort(0).values - (b.double() @ u).sort(0).values
    return float((gap**2).mean().sqrt())


@each_sde
@pytest.mark.parametrize("scale", TILTED)
def test_guided_particles_have_the_tilted_law(scale, sde):
    """Exact steps: within four standard errors of the effective sample size, and 2 %."""
    guided = ClassifierFreeGuidance(ByLabel(sde), scale)
    run = Twisted(particles=4096, steps=50)(guided, (1,), seed=0, label=0)
    mean, variance, log_z = TILTED[scale]
    n = float(run.ess[-1])
    found = moments(run)
    assert found[0] == pytest.approx(mean, abs=4 * (variance / n) ** 0.5 + 0.01)
    assert found[1] == pytest.approx(variance, rel=4 * (2 / n) ** 0.5 + 0.02)
    assert abs(float(run.log_evidence) - log_z) < 3 * float(run.standard_error) + 0.03


def test_the_chain_of_ddpm_errs_by_the_step_and_the_covariance_takes_that_away():
    guided, (_, _, log_z) = ClassifierFreeGuidance(ByLabel(VPSDE()), 2.0), TILTED[2.0]
    runs = {
        (steps, type(kernel).__name__): Twisted(4096, steps, kernel=kernel)(
            guided, (1,), seed=0, label=0
        )
        for steps, kernel in (
            (50, IsotropicKernel()),
            (200, IsotropicKernel()),
            (50, CovarianceKernel()),
        )
    }
    gaps = {key: float(run.log_evidence) - log_z for key, run in runs.items()}
    assert gaps[50, "IsotropicKernel"] > 0.1
    assert 2 < gaps[50, "IsotropicKernel"] / gaps[200, "IsotropicKernel"] < 8
    assert abs(gaps[50, "CovarianceKernel"]) < 0.03


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scales_of_nothing_and_of_the_condition_have_no_weights(scale):
    guided = ClassifierFreeGuidance(ByLabel(VPSDE()), scale)
    run = Twisted(particles=64, steps=20)(guided, (1,), seed=0, label=0)
    assert float(run.ess[-1]) == pytest.approx(64, abs=1e-6)
    assert float(run.log_evidence) == pytest.approx(0, abs=1e-6)


def test_systematic_resampling_keeps_expected_numbers():
    weights = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).double()
    for u in (0.01, 0.5, 0.99):
        parents = systematic(weights.log(), torch.tensor([u]), 40)[0]
        counts = torch.bincount(parents, minlength=4)
        assert counts.tolist() == pytest.approx([20, 10, 8, 2], abs=1)
    u = torch.linspace(0.0005, 0.9995, 1000)
    draws = systematic(weights.log().expand(1000, 4), u, 3)
    mean = torch.stack([(draws == k).double().sum(1).mean() for k in range(4)])
    torch.testing.assert_close(mean, 3 * weights[0], rtol=0, atol=0.01)


def test_a_population_depends_on_no_other():
    prior = GaussianModel(torch.zeros(2).double(), 1.0, VPSDE())
    y = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.5, 0.0]]).double()
    seen = Observation(Masking(torch.tensor([True, False])), y, 0.3)
    run = Twisted(particles=32, steps=15)
    together = run(MMPS(prior, seen), seed=4)
    assert together.x.shape == (3, 32, 2)
    assert together.ess.shape == (3, 17)
    one = Observation(seen.operator, y[1], 0.3)
    alone = run(MMPS(prior, one), seed=4, seeds=[1])
    assert alone.x.shape == (32, 2)
    torch.testing.assert_close(alone.x, together.x[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(alone.log_evidence, together.log_evidence[1])


def test_batches_change_nothing_and_passes_are_counted():
    model = MMPS(*gaussian(VPSDE()))
    whole = Twisted(particles=32, steps=10)(model, seed=0)
    parts = Twisted(particles=32, steps=10, batch_size=7)(model, seed=0)
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-12)
    assert torch.equal(parts.nfe, whole.nfe)
    assert set(whole.nfe.tolist()) == {11}
    guided = ClassifierFreeGuidance(ByLabel(VPSDE()), 2.0)
    run = Twisted(particles=16, steps=10, kernel=IsotropicKernel())(
        guided, (1,), seed=0, label=torch.tensor([0, 0])
    )
    assert run.x.shape == (2, 16, 1)
    assert (set(run.nfe.flatten().tolist()), int(run.vjps.sum())) == ({22}, 0)


def test_offspring_do_not_share_the_noise_of_their_parent():
    run = Twisted(particles=64, steps=20, groups=1)(DPS(*gaussian(VPSDE(), 0.2)), seed=0)
    assert float(run.ess.min()) < 32  # resampled on the way
    assert len(run.x.unique(dim=0)) == 64


def test_many_measurements_have_a_diagonal_twist():
    """Of 100 pixels; the weights stay right: the evidence is that of the chain, a Gaussian."""
    n, std, sde, plan = 100, 3.0, VPSDE(), Twisted(particles=512, steps=30)
    prior = GaussianModel(torch.zeros(n).double(), 1.0, sde)
    y = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    seen = Observation(Masking(torch.ones(n, dtype=torch.bool)), y, std)
    run = plan(MMPS(prior, seen), seed=0)
    v = std**2 + variance_of_the_chain(sde, plan)
    truth = float(-0.5 * (y**2 / v + math.log(2 * math.pi * v)).sum())
    assert abs(float(run.log_evidence) - truth) < 3 * float(run.standard_error) + 0.02
    assert float(run.ess[-1]) > 64


def variance_of_the_chain(sde, plan):
    """That of clean data by the chain of DDPM, for data N(0, 1)."""
    times = plan.grid(plan.steps, sde, sde.cutoffs.sampling)
    variance = sde.prior_std**2
    for t, s in pairwise(times):
        one = torch.ones(1, 1).double()
        gain = sde.alpha(t) / (sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
        mean, std = sde.posterior(one, gain * one, t, s)
        variance = float(mean**2 * variance + std**2)
    gain = sde.alpha(times[-1]) / (sde.alpha(times[-1]) ** 2 + sde.sigma(times[-1]) ** 2)
    return float(gain) ** 2 * variance


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Twisted(particles=100), "groups=8.*100.*104"),
        (lambda: Twisted(threshold=2.0), "threshold.*2"),
        (lambda: Twisted(batch_size=0), "batch_size.*0"),
        (lambda: Twisted()(gaussian(VPSDE())[0]), "GaussianModel"),
        (lambda: Twisted()(MMPS(*gaussian(VPSDE(), 0.0))), "std.*0.0"),
        (
            lambda: Twisted()(
                ClassifierFreeGuidance(ByLabel(VPSDE()), 2.0, (0.2, 5.0)), (1,), label=0
            ),
            "interval",
        ),
        (lambda: Twisted()(ClassifierFreeGuidance(ByLabel(VPSDE()), 2.0), label=0), "shape"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
