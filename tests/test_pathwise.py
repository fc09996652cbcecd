"""Strong orders: one Brownian path per sample, at different step counts, by us and by torchsde.

The truth is torchsde's ``srk`` on a fine grid along the same path. Between t = 1 and 1/2 all times
of the grids are nodes of the path's tree, which is then cheap to ask.
"""

import functools

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianMixtureModel, InputError, SubVPSDE
from scoresde.errors import SolverError
from scoresde.sample import (
    DDIM,
    SEEDS,
    AncestralPredictor,
    DPMSolverPPSDE,
    EulerMaruyama,
    GottaGoFast,
    PredictorCorrector,
    TorchSDE,
)
from scoresde.solvers import BrownianInterval, Path, SDESolver
from scoresde.streams import Streams

SDES = {"VP": VPSDE(), "subVP": SubVPSDE(), "VE": VESDE(0.01, 10.0)}
EPS, N, COUNTS = 0.5, 256, (8, 16, 32, 64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@functools.cache
def problem(sde):
    """A mixture, latents, and the ends of their exact paths."""
    process = SDES[sde]
    exact = GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, 2, seed=5), [0.3, 0.5], process)
    exact, latent = exact.double(), process.prior_std * normal(N, 2, seed=3)
    fine = TorchSDE(256, "srk", Path(), eps=EPS)
    return exact, latent, fine(exact, latent=latent, seed=0).x


def strong_order(sde, make):
    """The slope of the root mean square distance to the exact path."""
    exact, latent, truth = problem(sde)
    ends = [make(n)(exact, latent=latent, seed=0).x for n in COUNTS]
    errors = torch.stack([(x - truth).square().mean().sqrt() for x in ends])
    return float(errors.log2().diff().neg().mean())


OURS = {
    "Euler-Maruyama": EulerMaruyama,
    "reverse diffusion": functools.partial(PredictorCorrector, corrector=None),
    "ancestral": functools.partial(
        PredictorCorrector, predictor=AncestralPredictor(), corrector=None
    ),
    "DDIM, eta 1": functools.partial(DDIM, eta=1.0),
    "DPM-Solver++2M-SDE": DPMSolverPPSDE,
    "SEEDS": SEEDS,
}


@pytest.mark.parametrize(
    ("method", "sde"),
    [*((m, s) for m in OURS for s in ("VP", "VE")), ("Euler-Maruyama", "subVP")],
)
def test_our_steps_have_strong_order_one_along_a_path(method, sde):
    make = functools.partial(OURS[method], along_path=True, eps=EPS)
    assert strong_order(sde, make) > 0.85


@pytest.mark.parametrize(
    ("method", "order"),
    [
        *(("euler", 1), ("milstein", 1), ("euler_heun", 1), ("heun", 1), ("midpoint", 1)),
        *(("log_ode", 1), ("srk", 1.5)),
    ],
)
def test_torchsdes_methods_have_their_strong_order_along_it(method, order):
    make = functools.partial(TorchSDE, method=method, motion=Path(), eps=EPS)
    assert strong_order("VP", make) > order - 0.15


def test_our_step_and_torchsdes_are_one_along_a_path():
    exact, latent, _ = problem("VP")
    ours = EulerMaruyama(32, along_path=True, eps=EPS)(exact, latent=latent, seed=0).x
    theirs = TorchSDE(32, "euler", Path(), eps=EPS)(exact, latent=latent, seed=0).x
    # torchsde's steps are longer by a part of 1e-12, over which the path stages by 1e-6.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_adaptive_steps_follow_the_path_to_their_tolerance():
    exact, latent, truth = problem("VP")
    errors = []
    for tolerance in (1e-1, 1e-2, 1e-3):
        solver = TorchSDE(8, "srk", Path(), adaptive=True, rtol=tolerance, atol=tolerance, eps=EPS)
        x = solver(exact, latent=latent[:32], seed=0).x
        errors.append(float((x - truth[:32]).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("sde", SDES)
def test_steps_of_each_samples_own_follow_the_path_to_their_tolerance(sde):
    """Steps of h^(3/2) ~ tolerance and random errors: in all as the tolerance to the 2/3."""
    exact, latent, truth = problem(sde)
    errors = []
    for tolerance in (0.2, 0.05):
        x = GottaGoFast(tolerance, tolerance, eps=EPS)(exact, latent=latent[:32], seed=0).x
        errors.append(float((x - truth[:32]).square().mean().sqrt()))
    assert errors[1] < 0.05
    assert errors[0] / errors[1] > 0.8 * 4 ** (2 / 3)


@pytest.mark.parametrize("method", ["euler", "srk", "heun", "log_ode"])
def test_torchsdes_own_interval_gives_the_moments_and_repeats(method):
    exact, latent, truth = problem("VP")
    sampler = TorchSDE(16, method, BrownianInterval(), eps=EPS)
    x = sampler(exact, latent=latent, seed=4).x
    assert torch.equal(x, sampler(exact, latent=latent, seed=4).x)
    error = 4 * float(truth.std()) / N**0.5
    torch.testing.assert_close(x.mean(0), truth.mean(0), rtol=0, atol=1.5 * error)
    torch.testing.assert_close(x.std(0), truth.std(0), rtol=4 / N**0.5, atol=0)


def test_adaptive_steps_need_a_path():
    with pytest.raises(InputError, match=r"motion=Path\(\)"):
        TorchSDE(adaptive=True)


def test_a_path_that_cannot_be_resolved_is_told():
    solver = SDESolver(4, motion=Path(), adaptive=True, rtol=1e-6, atol=1e-6, dt_min=0.01)
    with pytest.raises(SolverError, match=r"fell below 0.01 .* larger .* tolerance \(rtol=1e-06"):
        solver(lambda t, x: -x, torch.ones_like, torch.zeros(2, 2), 1.0, Streams.of(0, batch=2))


def test_a_number_of_the_draw_for_each_sample_is_that_draw():
    from scoresde.streams import Purpose

    streams = Streams.of(0, batch=3)
    draws = torch.tensor([5, 0, 2**32 - 1])
    together = streams.normal((4,), Purpose.BROWNIAN, draws)
    for i, draw in enumerate(draws.tolist()):
        assert torch.equal(together[i], streams.normal((4,), Purpose.BROWNIAN, draw)[i])
