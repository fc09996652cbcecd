"""Our methods beside those of diffusers: on its noise levels they are the same to rounding."""

import functools

import pytest
import torch

from scoresde import DiscreteVP, GaussianMixtureModel
from scoresde.sample import DEIS, DPMSolverPP, DPMSolverPPSDE, HalfLogSNR, UniPC
from scoresde.streams import Purpose, Streams
from scoresde.times import ExplicitGrid

theirs = pytest.importorskip("diffusers", exc_type=ImportError)

MULTI = functools.partial(theirs.DPMSolverMultistepScheduler, final_sigmas_type="sigma_min")
SDE = functools.partial(MULTI, algorithm_type="sde-dpmsolver++", lower_order_final=False)
UNIPC = functools.partial(theirs.UniPCMultistepScheduler, final_sigmas_type="sigma_min")
ALWAYS = 10**6
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
PAIRS = {
    "2M": (MULTI, 2, DPMSolverPP, {}),
    "3M": (MULTI, 3, DPMSolverPP, {"as_coded": True}),
    "2M-SDE": (SDE, 2, DPMSolverPPSDE, {}),
    "UniPC-2": (UNIPC, 2, UniPC, {"lower_order_below": ALWAYS}),
    "UniPC-3": (UNIPC, 3, UniPC, {"lower_order_below": ALWAYS}),
    "DEIS-3": (
        theirs.DEISMultistepScheduler,
        3,
        DEIS,
        {"variable": HalfLogSNR(), "lower_order_below": 15},
    ),
}


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("name", PAIRS)
def test_the_methods_of_diffusers_are_ours(name, steps):
    kind, order, ours, settings = PAIRS[name]
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    model = GaussianMixtureModel([0.5, 0.3, 0.2], means, [0.3, 0.2, 0.4], DiscreteVP()).double()
    scheduler = kind(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        timestep_spacing="linspace",
        solver_order=order,
    )
    scheduler.set_timesteps(steps)
    streams = Streams.of(0, batch=8)
    latent = x = streams.normal((4,), Purpose.LATENT, 0, torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        noise = streams.normal((4,), Purpose.DIFFUSION, i, torch.float64)
        more = {"variance_noise": noise} if kind is SDE else {}
        x = scheduler.step(model.noise(x, (t.double() + 1) / 1000), t, x, **more).prev_sample
        x = x.double()
    grid = ExplicitGrid((*((float(t) + 1) / 1000 for t in scheduler.timesteps), 1 / 1000))
    mine = ours(steps, grid, order=order, **settings)(model, latent=latent, seed=0).x
    # Theirs are weights in float32: of order 3, differences of large numbers (DEIS) or the
    # solution of a nearly singular system (UniPC).
    atol = 3e-3 if name in ("DEIS-3", "UniPC-3") else 2e-4
    torch.testing.assert_close(mine, x, rtol=0, atol=atol)
