"""The reference's sampling steps against a transcript of its rules; its samples and likelihoods.

The recorded samples need the folder of recorded numbers, named in SCORESDE_REFERENCE.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    DiscreteVP,
    GaussianMixtureModel,
    InputError,
    Likelihood,
    SubVPSDE,
)
from scoresde.divergence import Hutchinson
from scoresde.metrics import bits_per_dim
from scoresde.model import Conditioned
from scoresde.sample import (
    AncestralPredictor,
    AnnealedLangevin,
    BatchMeanNorm,
    EulerMaruyamaPredictor,
    Langevin,
    ProbabilityFlow,
    ReferencePredictorCorrector,
    ReverseDiffusionPredictor,
)
from scoresde.sample.base import Noise, ProgressReporter

STEPS, SNR, SHAPE = 32, 0.16, (6, 3)
COMPARED = 2  # of four recorded examples: an adaptive solver takes its time on such rough networks
PREDICTORS = {
    "euler_maruyama": EulerMaruyamaPredictor(),
    "reverse_diffusion": ReverseDiffusionPredictor(),
    "ancestral_sampling": AncestralPredictor(1.0),
}
CORRECTORS = {
    "none": None,
    "langevin": Langevin(SNR, rule=BatchMeanNorm()),
    "ald": AnnealedLangevin(SNR),
}
FOLDER = os.environ.get("SCORESDE_REFERENCE")


class Replay:
    """Gives recorded normal numbers, in their order, instead of random ones."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def normal(self, shape, purpose, draw=0, dtype=None):
        return self.numbers.pop(0).to(dtype)


def sampled(model, predictor, corrector, noise, eps):
    """Walks from the first of the recorded numbers, unscaled, as the reference does."""
    if isinstance(model.sde, VESDE) and predictor == "ancestral_sampling":
        predictor = AncestralPredictor(0.0)
    else:
        predictor = PREDICTORS[predictor]
    sampler = ReferencePredictorCorrector(
        len_steps(noise, corrector), predictor=predictor, corrector=CORRECTORS[corrector]
    )
    numbers = Replay(noise)
    x = model.sde.prior_std * numbers.normal((), 0, dtype=noise.dtype)
    with torch.no_grad():
        x = sampler._run(
            Conditioned(model), x, eps, Noise(numbers), ProgressReporter(None, False)
        ).x
    assert not numbers.numbers
    return x


def len_steps(noise, corrector):
    return (len(noise) - 1) // (1 if corrector == "none" else 2)


# --- A transcript of the rules -------------------------------------------------------------------


def tables(sde):
    """The chain of N levels: a_i^2 and tau_i^2, and SMLD's noise on the way back."""
    if isinstance(sde, VESDE):
        ends = math.log(sde.sigma_min), math.log(sde.sigma_max)
        levels = torch.linspace(*ends, STEPS, dtype=torch.float64).exp()
        before = torch.cat((torch.zeros(1), levels[:-1]))
        return torch.ones(STEPS), levels**2 - before**2, before / levels
    betas = torch.linspace(0.1 / STEPS, 20.0 / STEPS, STEPS, dtype=torch.float64)
    return 1 - betas, betas, torch.ones(STEPS)


def transcript(model, predictor, corrector, noise, eps):
    """Follows the published rules line by line, in the notation of scores."""
    sde, numbers = model.sde, iter(noise)
    a2, tau2, share = tables(sde)
    x = sde.prior_std * next(numbers)
    for t in torch.linspace(1, eps, STEPS, dtype=torch.float64):
        i = int(t.float() * (STEPS - 1))
        alpha = a2[i]
        if corrector != "none":
            score, z = model.score(x, t), next(numbers)
            if corrector == "langevin":
                ratio = z.norm(dim=1).mean() / score.norm(dim=1).mean()
            else:
                ratio = sde.sigma(t)
            step = 2 * alpha * (SNR * ratio) ** 2
            x = x + step * score + torch.sqrt(2 * step) * z
        score, z = model.score(x, t), next(numbers)
        if predictor == "euler_maruyama":
            mean = x - (sde.f(t) * x - sde.g(t) ** 2 * score) / STEPS
            x = mean + sde.g(t) / math.sqrt(STEPS) * z
        elif isinstance(sde, SubVPSDE):
            mean = x - (sde.f(t) * x / STEPS - sde.g(t) ** 2 / STEPS * score)
            x = mean + sde.g(t) / math.sqrt(STEPS) * z
        elif predictor == "reverse_diffusion":
            mean = x - ((torch.sqrt(a2[i]) - 1) * x - tau2[i] * score)
            x = mean + torch.sqrt(tau2[i]) * z
        else:
            mean = (x + tau2[i] * score) / torch.sqrt(a2[i])
            x = mean + share[i] * torch.sqrt(tau2[i]) * z
    return mean


CASES = [
    *[(sde, p, c) for sde in (VPSDE(), VESDE()) for p in PREDICTORS for c in CORRECTORS],
    (SubVPSDE(), "euler_maruyama", "none"),
    (SubVPSDE(), "reverse_diffusion", "none"),
]


@pytest.mark.parametrize(("sde", "predictor", "corrector"), CASES)
def test_the_steps_are_the_published_ones(sde, predictor, corrector):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, *SHAPE[1:], generator=generator, dtype=torch.float64)
    model = GaussianMixtureModel([1.0, 2.0, 1.0], means, [0.3, 0.2, 0.5], sde)
    draws = 1 + STEPS * (1 if corrector == "none" else 2)
    noise = torch.randn(draws, *SHAPE, generator=generator, dtype=torch.float64)
    eps = 1e-5 if isinstance(sde, VESDE) else 1e-3
    ours = sampled(model, predictor, corrector, noise, eps)
    truth = transcript(model, predictor, corrector, noise, eps)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_it_samples_by_itself_and_counts_its_passes():
    model = GaussianMixtureModel([1.0], torch.zeros(1, 2).double(), [0.5], VPSDE())
    out = ReferencePredictorCorrector(100)(model, shape=(2000, 2), seed=0)
    assert out.nfe.unique().tolist() == [200]
    assert float(out.x.std()) == pytest.approx(0.5, rel=0.1)


def test_a_chain_is_sampled_on_its_own_levels_only():
    model = GaussianMixtureModel([1.0], torch.zeros(1, 2).double(), [0.5], DiscreteVP())
    with pytest.raises(InputError, match=r"steps.*1000.*got 100;"):
        ReferencePredictorCorrector(100)(model, shape=(2, 2), seed=0)


# --- Its own samples -----------------------------------------------------------------------------


needs_numbers = pytest.mark.skipif(
    FOLDER is None, reason="needs the recorded numbers: SCORESDE_REFERENCE=FOLDER"
)
each_continuous = pytest.mark.parametrize(
    "name",
    [
        "vp_ddpmpp_continuous",
        "subvp_ddpmpp_continuous",
        "ve_ncsnpp_continuous",
        "ve_ncsnpp_skip_continuous",
    ],
)


def recorded_model(name):
    from scoresde.interop.score_sde import load_checkpoint

    folder = Path(FOLDER) / "tiny"
    model = load_checkpoint(folder / f"{name}.pth", folder / f"{name}.json")
    return model, np.load(folder / f"{name}.npz")


@needs_numbers
@each_continuous
def test_recorded_samples_are_reproduced(name):
    model, recorded = recorded_model(name)
    ve = isinstance(model.sde, VESDE)
    cases = [key.split("/")[1:3] for key in recorded.files if key.endswith("/noise")]
    assert len(cases) >= 2
    for predictor, corrector in cases:
        noise = torch.from_numpy(recorded[f"pc/{predictor}/{corrector}/noise"])
        x = sampled(model, predictor, corrector, noise, 1e-5 if ve else 1e-3)
        truth = torch.from_numpy(recorded[f"pc/{predictor}/{corrector}/sample"])
        error = (x if ve else (x + 1) / 2) - truth
        assert float(error.abs().max() / truth.abs().max()) < 1e-3, (predictor, corrector)


class Fixed(Hutchinson):
    """One probe that is given."""

    def __init__(self, probe):
        super().__init__(1)
        object.__setattr__(self, "probe", probe)

    def probes(self, streams, x, draw=0):
        return self.probe.to(x).reshape(1, *x.shape)


@needs_numbers
@each_continuous
def test_recorded_likelihoods_are_reproduced(name):
    model, recorded = recorded_model(name)
    exact = Likelihood(
        Fixed(torch.from_numpy(recorded["lik_probe"])[:COMPARED]), 1e-5, 1e-5, eps=1e-5
    )
    x = torch.from_numpy(recorded["x"])[:COMPARED]
    result = exact(model, x)
    scale = (1.0 if isinstance(model.sde, VESDE) else 2.0) / 256
    values = bits_per_dim(result.log_prob, x.shape[1:], scale)
    torch.testing.assert_close(
        values.float(), torch.from_numpy(recorded["lik_bpd"])[:COMPARED], rtol=0, atol=1e-2
    )


@needs_numbers
@each_continuous
def test_recorded_flows_are_reproduced(name):
    model, recorded = recorded_model(name)
    ve = isinstance(model.sde, VESDE)
    flow = ProbabilityFlow(1e-5, 1e-5, eps=1e-5 if ve else 1e-3)
    x = flow(model, latent=torch.from_numpy(recorded["ode_latent"])[:COMPARED]).x
    truth = torch.from_numpy(recorded["ode_sample"])[:COMPARED]
    error = (x if ve else (x + 1) / 2) - truth
    assert float(error.abs().max() / truth.abs().max()) < 1e-2
