"""The order of convergence that every method declares, on exact models and for the four SDEs.

Deterministic methods are held against the probability flow solved to 1e-12, stochastic ones
against the exact moments of a Gaussian, which a sampler's linear map gives without a random
number, and on a mixture by the means of coupled pairs of runs. An order is the slope over the last
three doublings.
"""

import functools
from itertools import pairwise

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    RectifiedFlow,
    SubVPSDE,
)
from scoresde.model import Conditioned
from scoresde.sample import (
    DDIM,
    DEIS,
    IPNDM,
    SEEDS,
    AncestralPredictor,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSDE,
    Euler,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    Restart,
    RestartInterval,
    UniPC,
)
from scoresde.sample.base import Noise, ProgressReporter
from scoresde.sample.exponential import DataIntegral
from scoresde.sample.multistep import adams_bashforth
from scoresde.sample.plan import Node
from scoresde.times import CosineGrid, KarrasGrid, LogSNRGrid, PowerGrid, UniformGrid

SDES = {
    "VP": VPSDE(),
    "subVP": SubVPSDE(),
    "VE": VESDE(0.01, 10.0),
    "RF": RectifiedFlow(),
}
EPS = 1e-2
each_sde = pytest.mark.parametrize("sde", list(SDES))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@functools.cache
def flow(sde, eps=EPS):
    """A mixture, four latents, and where the probability flow takes them."""
    process = SDES[sde]
    exact = GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, 2, seed=5), [0.3, 0.5], process)
    exact, latent = exact.double(), process.prior_std * normal(4, 2, seed=3)
    return exact, latent, ProbabilityFlow(1e-12, 1e-12, eps=eps)(exact, latent=latent).x


def order(sde, make, counts, eps=EPS):
    """The slope of the error over three doublings of the number of steps."""
    exact, latent, truth = flow(sde, eps)
    errors = [float((make(n)(exact, latent=latent).x - truth).abs().mean()) for n in counts]
    slopes = torch.tensor(errors).double().log2().diff().neg()
    return float(slopes.mean())


def check(sde, make, counts, eps=EPS):
    assert order(sde, make, counts, eps) > make(4).convergence - 0.15


# --- Deterministic methods -----------------------------------------------------------------------

METHODS = {
    "DDIM": DDIM,
    "Euler": Euler,
    "Heun": Heun,
    **{f"DPM-Solver-{p}": functools.partial(DPMSolver, order=p) for p in (1, 2, 3)},
    **{f"DPM-Solver++{p}M": functools.partial(DPMSolverPP, order=p) for p in (1, 2, 3)},
    "DPM-Solver++3M single": functools.partial(DPMSolverPP, order=3, single_steps=True),
    "DPM-Solver++3M as coded": functools.partial(DPMSolverPP, order=3, as_coded=True),
    **{f"DEIS-{p}": functools.partial(DEIS, order=p) for p in (2, 3, 4)},
    **{f"DEIS-{p} single": functools.partial(DEIS, order=p, single_steps=True) for p in (3, 4)},
    **{f"iPNDM-{p}": functools.partial(IPNDM, order=p) for p in (1, 2, 3, 4)},
    **{f"UniPC-{p}": functools.partial(UniPC, order=p) for p in (1, 2, 3)},
    "UniPC-2 of B1": functools.partial(UniPC, order=2, bh=1),
    "UniPC-3 single": functools.partial(UniPC, order=3, single_steps=True),
    "SEEDS without noise": functools.partial(SEEDS, tau=0.0),
    "DPM-Solver++2M-SDE without noise": functools.partial(DPMSolverPPSDE, order=2, tau=0.0),
}
# Where the noise vanishes as the root of t, as that of VP does, equal steps in time are far from
# small at eps = 0.01, and a high order shows late.
LATE = {"DEIS-3 single", "DEIS-4 single", "UniPC-2", "UniPC-2 of B1", "UniPC-3", "UniPC-3 single"}


@each_sde
@pytest.mark.parametrize("method", list(METHODS))
def test_the_order_on_equal_steps_of_the_log_snr(method, sde):
    make = functools.partial(METHODS[method], grid=LogSNRGrid(), eps=EPS)
    top = (192, 384, 768, 1536) if make(4).convergence > 3 else (32, 64, 128, 256)
    top = (64, 128, 256, 512) if method == "DEIS-4" else top
    check(sde, make, top)


@each_sde
@pytest.mark.parametrize("method", ["Euler", "Heun", "DPM-Solver++2M", "DPM-Solver++3M single"])
def test_the_order_on_equal_steps_of_time(method, sde):
    make = functools.partial(METHODS[method], grid=UniformGrid(), eps=EPS)
    top = (128, 256, 512, 1024) if make(4).convergence > 2 else (64, 128, 256, 512)
    check(sde, make, top)


@pytest.mark.slow
@each_sde
@pytest.mark.parametrize("method", [name for name in METHODS if name not in LATE])
def test_the_order_on_equal_steps_of_time_of_all(method, sde):
    make = functools.partial(METHODS[method], grid=UniformGrid(), eps=EPS)
    top = (128, 256, 512, 1024) if make(4).convergence > 2 else (64, 128, 256, 512)
    top = (512, 1024, 2048) if (method, sde) == ("DPM-Solver-3", "RF") else top
    check(sde, make, top)


@pytest.mark.slow
@each_sde
@pytest.mark.parametrize("method", sorted(LATE))
def test_the_order_on_equal_steps_of_time_shows_late(method, sde):
    make = functools.partial(METHODS[method], grid=UniformGrid(), eps=EPS)
    top = (1024, 2048, 4096, 8192) if sde == "VP" else (256, 512, 1024, 2048)
    check(sde, make, top)


@pytest.mark.parametrize("grid", [KarrasGrid(), PowerGrid(), CosineGrid(0.5)], ids=repr)
@pytest.mark.parametrize("method", ["DPM-Solver-2", "DPM-Solver++2M", "Heun", "iPNDM-4"])
def test_the_order_on_other_grids(method, grid):
    make = functools.partial(METHODS[method], grid=grid, eps=0.1)
    check("VE", make, (64, 128, 256, 512), eps=0.1)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_ipndm_has_its_full_order_where_its_steps_are_equal(p):
    make = functools.partial(IPNDM, grid=KarrasGrid(1), order=p, single_steps=True, eps=0.3)
    assert make(4).convergence == p
    check("VE", make, (128, 256, 512, 1024), eps=0.3)


@pytest.mark.slow
def test_ipndm_of_four_values_has_its_full_order_there_late():
    make = functools.partial(IPNDM, grid=KarrasGrid(1), single_steps=True, eps=0.3)
    assert make(4).convergence == 4
    check("VE", make, (1024, 2048, 4096, 8192), eps=0.3)


@pytest.mark.parametrize("p", [3, 4])
def test_ipndm_has_no_more_than_order_two_elsewhere(p):
    make = functools.partial(IPNDM, grid=LogSNRGrid(), order=p, single_steps=True, eps=EPS)
    assert order("VE", make, (64, 128, 256, 512)) < 2.15


@pytest.mark.parametrize(("method", "counts"), [("DEIS-4", (128, 256, 512, 1024))])
def test_rising_first_steps_leave_an_error_of_order_two(method, counts):
    """So that the option for single steps is needed for more, as declared."""
    make = functools.partial(METHODS[method], grid=LogSNRGrid(), eps=EPS)
    assert order("VE", make, counts) < 2.15


def test_the_coefficients_of_adams_and_bashforth():
    assert adams_bashforth(2) == pytest.approx([3 / 2, -1 / 2])
    assert adams_bashforth(4) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])


# --- Stochastic methods --------------------------------------------------------------------------


class Impulses:
    """Instead of random numbers: one for state i at the i-th number, and zero for the others."""

    def __init__(self, batch):
        self.batch = batch
        self.drawn = 0

    def normal(self, shape, purpose, draw, dtype):
        self.drawn += 1
        z = torch.zeros(self.batch, *shape, dtype=dtype)
        z[self.drawn - 1] = 1.0
        return z


def variance(sampler, exact, batch):
    """The variance at eps, of a Gaussian of independent features, started from its marginal at 1.

    There a sample is linear in the start and in all of the noises, and a batch reads every
    coefficient off it, without any random number.
    """
    sde, one = exact.sde, torch.ones((), dtype=torch.float64)
    x = torch.zeros(batch, len(exact.mean)).double()
    x[-1] = 1.0
    numbers = Impulses(batch)
    with torch.no_grad():
        y = sampler._run(
            Conditioned(exact), x, EPS, Noise(numbers), ProgressReporter(None, False)
        ).x
    assert numbers.drawn < batch - 1
    start, noises = y[-1] - y[-2], y[: numbers.drawn] - y[-2]
    first = sde.alpha(one) ** 2 * exact.variances + sde.sigma(one) ** 2
    return start**2 * first + noises.square().sum(0)


STOCHASTIC = {
    "Euler-Maruyama": EulerMaruyama,
    "reverse diffusion": functools.partial(PredictorCorrector, corrector=None),
    "ancestral": functools.partial(
        PredictorCorrector, predictor=AncestralPredictor(), corrector=None
    ),
    "DDIM, eta 1": functools.partial(DDIM, eta=1.0),
    "DDIM, eta 0.5": functools.partial(DDIM, eta=0.5),
    **{f"DPM-Solver++{p}M-SDE": functools.partial(DPMSolverPPSDE, order=p) for p in (1, 2, 3)},
    "DPM-Solver++2M-SDE, tau 0.5": functools.partial(DPMSolverPPSDE, order=2, tau=0.5),
    "SEEDS": SEEDS,
    "SEEDS, tau 0.5": functools.partial(SEEDS, tau=0.5),
    "Heun with churn": functools.partial(Heun, churn=20.0),
}


# From zero SNR on, what depends on the step before or on a power of the SNR shows late.
LATE_ON_RF = {
    "Heun with churn": (128, 256, 512),
    "DPM-Solver++2M-SDE, tau 0.5": (384, 768, 1536),
}


def restart(n, grid):
    return Restart(Heun(n, grid), (RestartInterval(0.1, 1.0, n // 8, 2),))


def weak_order(make, sde, counts):
    """The slope of the relative error of the variance, of its worst feature."""
    process, eps = SDES[sde], torch.tensor(EPS, dtype=torch.float64)
    exact = GaussianModel(torch.zeros(3).double(), torch.tensor([0.3, 1.0, 1.5]).double(), process)
    truth = process.alpha(eps) ** 2 * exact.variances + process.sigma(eps) ** 2
    errors = [(variance(make(n), exact, 3 * n + 8) / truth - 1).abs().max() for n in counts]
    return float(torch.stack(errors).log2().diff().neg().mean())


@each_sde
@pytest.mark.parametrize("method", list(STOCHASTIC))
def test_the_weak_order_of_the_variance(method, sde):
    make = functools.partial(STOCHASTIC[method], grid=LogSNRGrid())
    declared = make(4).convergence
    # Churn is at its limit, whatever the number of steps, until there are many of them.
    counts = LATE_ON_RF.get(method) if sde == "RF" else None
    if counts is None:
        counts = (64, 128, 256) if method == "Heun with churn" else (48, 96, 192)
    assert weak_order(make, sde, counts) > declared - 0.15


@each_sde
def test_restarts_keep_the_order_of_what_they_repeat(sde):
    assert weak_order(lambda n: restart(n, LogSNRGrid()), sde, (32, 64, 128)) > 1.85


class Given:
    """Gives noises in their order."""

    def __init__(self, noises):
        self.noises = list(noises)

    def normal(self, shape, purpose, draw, dtype):
        return self.noises.pop(0)


def halved(noises, nodes):
    """The noises of steps twice as long, exactly."""
    integral = DataIntegral(1.0)
    pairs = zip(noises[::2], noises[1::2], nodes[:-2:2], nodes[1:-1:2], nodes[2::2], strict=True)
    return [
        (integral.scale(m, b) * integral.noise(a, m) * y + integral.noise(m, b) * z)
        / integral.noise(a, b)
        for y, z, a, m, b in pairs
    ]


@pytest.mark.parametrize(("p", "least"), [(1, 0.6), (2, 1.85)])
def test_the_weak_order_of_multistep_noise_holds_for_a_mixture(p, least):
    """Means of x^2 over 20 000 pairs of runs of n and 2n steps that share their noise."""
    n, process = 20_000, SDES["VE"]
    exact = GaussianMixtureModel([0.3, 0.7], normal(2, 1).sign(), [0.3, 0.5], process).double()
    start, counts = exact.sample(n, 1.0, seed=1), (64, 32, 16, 8)
    noises = list(normal(counts[0], n, 1, seed=2))
    nodes = Node.of(process, LogSNRGrid()(counts[0], process, EPS))
    squares = []
    for count in counts:
        sampler = DPMSolverPPSDE(count, LogSNRGrid(), order=p)
        with torch.no_grad():
            run = sampler._run(
                Conditioned(exact), start, EPS, Noise(Given(noises)), ProgressReporter(None, False)
            )
        squares.append(run.x.square())
        noises, nodes = halved(noises, nodes), nodes[::2]
    gaps = torch.stack([(a - b).mean().abs() for a, b in pairwise(squares)])
    assert float(gaps.log2().diff().mean()) > least
