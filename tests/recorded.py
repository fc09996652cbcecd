"""Numbers that the library gave at commit 073b527, to hold every later one against.

Every argument that a later default could change is named. What is built in more than one place
has a helper at the top, so that a change of names is made once.

    python -m tests.recorded record FILE     writes the numbers of this code
    python -m tests.recorded compare FILE    says which numbers of this code differ

A name begins with ``exact/`` or ``adaptive/`` and its group. A number of ``exact/`` may differ by
1e-6, relative to max(1, |value|). A name of ``adaptive/`` ends with ``@TOLERANCE``, and its
numbers may differ by three times that; passes of an adaptive solve have the tolerance 0.1.
"""

import functools
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from scoresde import (
    VESDE,
    VPSDE,
    ChainIndex,
    DataParametrisation,
    DenoisingScoreMatching,
    DiscreteVP,
    EDMWeighting,
    GaussianMixtureModel,
    GaussianModel,
    Likelihood,
    LikelihoodWeighting,
    NoiseLevel,
    NoiseParametrisation,
    NoiseWeighting,
    Preconditioned,
    ScaledTime,
    ScoreModel,
    ScoreParametrisation,
    SubVPSDE,
    VariationalBound,
    VParametrisation,
)
from scoresde.data import (
    GeometricAugmentation,
    TruncatedNormalDequantisation,
    UniformDequantisation,
    checkerboard,
    digits,
    gaussian_ring,
    spirals,
    two_moons,
)
from scoresde.divergence import (
    ColourProbing,
    ExactTrace,
    Gaussian,
    Hutchinson,
    Orthogonal,
    Rademacher,
    Sphere,
)
from scoresde.guidance import Clipped, DynamicThreshold
from scoresde.likelihood import prior_kl, prior_mismatch, spectrum
from scoresde.likelihood.clock import NoiseClock, TimeClock
from scoresde.likelihood.cutoff import PlainCutoff, RescaledCutoff, VariationalCutoff
from scoresde.model import ReversedIndex, Sigma
from scoresde.nn import (
    MLP,
    Architecture,
    FIRResampling,
    FourierEmbedding,
    InputResidual,
    PositionalEmbedding,
    UNet,
)
from scoresde.sample import (
    DDIM,
    DEIS,
    IPNDM,
    SEEDS,
    AncestralPredictor,
    AnnealedLangevin,
    AnnealedLangevinDynamics,
    BatchMeanNorm,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSDE,
    Euler,
    EulerMaruyama,
    EulerMaruyamaPredictor,
    GottaGoFast,
    HalfLogSNR,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReferencePredictorCorrector,
    Restart,
    RestartInterval,
    ReverseDiffusionPredictor,
    ShrunkNorm,
    Time,
    TorchSDE,
    UniPC,
    sample_trajectory,
    slerp,
)
from scoresde.sample import RelativeNoise as NoiseVariable
from scoresde.sde import CosineBetas, LinearBetas
from scoresde.solvers import Increments
from scoresde.solvers import Path as BrownianMotion
from scoresde.streams import Streams
from scoresde.times import (
    ChainTimes,
    CosineGrid,
    ExplicitGrid,
    FoldedTimes,
    ImportanceTimes,
    KarrasGrid,
    LevelTimes,
    LogNormalTimes,
    LogSNRGrid,
    LowDiscrepancy,
    PowerGrid,
    UniformGrid,
    UniformTimes,
)
from scoresde.train import ConstantRate, CosineRate, Training, train
from scoresde.train.update import Update

FILE = Path(__file__).parent / "fixtures/recorded.npz"
EXACT, PASSES = 1e-6, 0.1

GROUPS = {}


def group(function):
    """Notes a function that gives a group of numbers by their names."""
    GROUPS[function.__name__] = function
    return function


def numbers(*groups):
    """Returns the numbers by their names: of all groups, or of those named."""
    found = {}
    for name in groups or GROUPS:
        for key, value in GROUPS[name]():
            kind, _, rest = key.partition("/")
            key = f"{kind}/{name}/{rest}"
            assert key not in found, key
            found[key] = torch.as_tensor(value).detach().clone()
    return found


# --- What is built in more than one place --------------------------------------------------------


def sdes():
    return {
        "vp": VPSDE(beta_min=0.1, beta_max=20.0),
        "subvp": SubVPSDE(beta_min=0.1, beta_max=20.0),
        "ve": VESDE(sigma_min=0.01, sigma_max=50.0),
        "chain": DiscreteVP(betas=LinearBetas(beta_min=0.1, beta_max=20.0, steps=1000)),
        "cosine": DiscreteVP(betas=CosineBetas(steps=1000, offset=0.008, limit=0.999)),
    }


def labels():
    return {
        "noise_level": NoiseLevel(),
        "scaled_time": ScaledTime(scale=999.0),
        "chain_index": ChainIndex(),
        "reversed_index": ReversedIndex(scales=1000),
        "sigma": Sigma(),
    }


def parametrisations(sigma_data=0.5):
    return {
        "noise": NoiseParametrisation(sigma_data=sigma_data),
        "data": DataParametrisation(sigma_data=sigma_data),
        "v": VParametrisation(sigma_data=sigma_data),
        "score": ScoreParametrisation(sigma_data=sigma_data),
        "preconditioned": Preconditioned(sigma_data=sigma_data),
    }


def score_model(network, sde, parametrisation, label):
    return ScoreModel(network, sde, parametrisation=parametrisation, noise_label=label)


def embedding(label):
    if label == "noise_level":
        return FourierEmbedding(8, scale=1.0, log=False)
    if label == "sigma":
        return FourierEmbedding(8, scale=16.0, log=True)
    return PositionalEmbedding(8, scale=1.0, max_period=10000.0)


def filled(module, dtype=torch.float64, size=0.4):
    """Gives a network weights that do not depend on how they are initialised."""
    for name, p in sorted(module.named_parameters()):
        generator = torch.Generator().manual_seed(len(name) * 1009 + sum(map(ord, name)))
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scale = size if p.ndim < 2 else size * (2 / math.sqrt(p[0].numel()))
        p.data = (values * scale).to(p.dtype)
    return module.to(dtype).eval()


def mlp(label="noise_level", dimension=2, dtype=torch.float64):
    net = MLP(
        (dimension,), width=8, depth=1, dropout=0.0, embedding=embedding(label), conditions=None
    )
    return filled(net, dtype)


def unet(label="noise_level", dtype=torch.float64, **more):
    net = UNet(
        (1, 8, 8),
        width=8,
        multipliers=(1, 2),
        blocks=1,
        attention=(1,),
        dropout=0.0,
        embedding=embedding(label),
        **more,
    )
    return filled(net, dtype, 0.2)


def learned(sde, parametrisation="preconditioned", label="noise_level", **more):
    return score_model(
        mlp(label, **more), sde, parametrisations()[parametrisation], labels()[label]
    )


def imaging(sde, dtype=torch.float64):
    parametrisation = parametrisations()["preconditioned"]
    return score_model(unet(dtype=dtype), sde, parametrisation, NoiseLevel())


def mixture(sde, dtype=torch.float64):
    return GaussianMixtureModel(
        torch.tensor([0.3, 0.7], dtype=dtype),
        torch.tensor([[-1.0, 0.5], [0.8, -0.4]], dtype=dtype),
        torch.tensor([0.2, 0.4], dtype=dtype),
        sde,
    )


def gaussians(sde, dtype=torch.float64):
    mean = torch.tensor([0.3, -0.2, 0.5], dtype=dtype)
    root = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.1, 0.3, 0.6]], dtype=dtype)
    return {
        "std": GaussianModel(mean, std=0.6, sde=sde),
        "stds": GaussianModel(mean, std=torch.tensor([0.2, 0.6, 0.9], dtype=dtype), sde=sde),
        "covariance": GaussianModel(mean, covariance=root @ root.T, sde=sde),
    }


def points(count, *shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, *shape, generator=generator, dtype=torch.float64)).to(dtype)


def loss_of(weighting, times, eps=1e-3, reduce_mean=True):
    return DenoisingScoreMatching(
        weighting=weighting, times=times, eps=eps, reduce_mean=reduce_mean
    )


def likelihood(**more):
    plain = {
        "probes": ExactTrace(chunk=1, forward=False),
        "rtol": 1e-5,
        "atol": 1e-5,
        "eps": 1e-3,
        "method": "dopri5",
        "cutoff": PlainCutoff(),
        "clock": NoiseClock(scale=0.5),
        "target_error": None,
        "max_sets": 20,
        "strict": True,
        "differentiable": False,
    }
    return Likelihood(**{**plain, **more})


def flow(**more):
    plain = {
        "rtol": 1e-5,
        "atol": 1e-5,
        "method": "dopri5",
        "probes": None,
        "clock": NoiseClock(scale=0.5),
        "eps": 1e-3,
        "final_denoise": False,
        "temperature": 1.0,
    }
    return ProbabilityFlow(**{**plain, **more})


def bound(times, draws=4, replicates=2, eps=1e-3):
    return VariationalBound(draws=draws, times=times, eps=eps, replicates=replicates)


def weightings():
    return {
        "noise": NoiseWeighting(),
        "likelihood": LikelihoodWeighting(),
        "edm": EDMWeighting(sigma_data=0.5),
    }


def densities(sde):
    """The distributions of training times that suit a process."""
    found = {
        "uniform": UniformTimes(),
        "importance": ImportanceTimes(),
        "log_normal": LogNormalTimes(mean=-1.2, std=1.2),
        "level": LevelTimes(levels=10),
        "low_uniform": LowDiscrepancy(times=UniformTimes()),
        "low_importance": LowDiscrepancy(times=ImportanceTimes()),
        "low_log_normal": LowDiscrepancy(times=LogNormalTimes(mean=-1.2, std=1.2)),
        "folded_importance": FoldedTimes(times=ImportanceTimes()),
        "folded_uniform": FoldedTimes(times=UniformTimes()),
    }
    if isinstance(sde, DiscreteVP):
        found |= {"chain": ChainTimes(), "low_chain": LowDiscrepancy(times=ChainTimes())}
    return found


def grids():
    return {
        "uniform": UniformGrid(),
        "log_snr": LogSNRGrid(),
        "karras": KarrasGrid(rho=7.0),
        "karras3": KarrasGrid(rho=3.0),
        "power": PowerGrid(power=2.0),
        "cosine": CosineGrid(sigma_data=0.5),
        "explicit": ExplicitGrid(times=(1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 1e-3)),
    }


def grid_samplers(steps=8, eps=1e-3):
    """Every sampler with a fixed number of passes, and its choices, by name."""
    end = {"eps": eps, "final_denoise": False, "temperature": 1.0}
    g = grids()

    def of(kind, grid="log_snr", **more):
        plain = {"steps": steps, "grid": g[grid], "along_path": False}
        return kind(**{**plain, **end, **more})

    multi = {"single_steps": False, "lower_order_below": 0}
    pp = {**multi, "as_coded": False}
    sde2 = {**multi, "order": 2, "tau": 1.0, "as_coded": False}
    churned = {"churn": 4.0, "churn_low": 0.05, "churn_high": 20.0, "churn_noise": 1.003}
    calm = {"churn": 0.0, "churn_low": 0.0, "churn_high": math.inf, "churn_noise": 1.0}
    langevin = Langevin(snr=0.16, steps=1, rule=ShrunkNorm(pseudo_dimensions=256.0))
    predictors = {
        "reverse": ReverseDiffusionPredictor(),
        "ancestral": AncestralPredictor(variance=0.0),
        "ancestral_large": AncestralPredictor(variance=1.0),
        "euler": EulerMaruyamaPredictor(),
    }
    correctors = {
        "none": None,
        "langevin": langevin,
        "langevin2": Langevin(snr=0.2, steps=2, rule=ShrunkNorm(pseudo_dimensions=64.0)),
        "batch": Langevin(snr=0.16, steps=1, rule=BatchMeanNorm()),
        "annealed": AnnealedLangevin(snr=0.16, steps=1),
    }
    heun = of(Heun, "karras", **calm)
    loops = (RestartInterval(low=0.06, high=0.3, steps=2, repeats=2),)
    two = (RestartInterval(low=0.3, high=1.0, steps=2, repeats=1), *loops)
    found = {
        "ddim": of(DDIM, "uniform", eta=0.0),
        "ddim_eta": of(DDIM, "uniform", eta=0.5),
        "ddim_eta_path": of(DDIM, "uniform", eta=1.0, along_path=True),
        "euler": of(Euler, "uniform"),
        "euler_maruyama": of(EulerMaruyama, "uniform"),
        "euler_maruyama_path": of(EulerMaruyama, "uniform", along_path=True),
        "euler_maruyama_cold": of(EulerMaruyama, "uniform", temperature=0.8),
        "euler_maruyama_denoised": of(EulerMaruyama, "uniform", final_denoise=True),
        "dpm_solver1": of(DPMSolver, order=1),
        "dpm_solver2": of(DPMSolver, order=2),
        "dpm_solver3": of(DPMSolver, order=3),
        "dpm_solver2_denoised": of(DPMSolver, order=2, final_denoise=True, temperature=0.9),
        "dpm_solver_pp2": of(DPMSolverPP, order=2, **pp),
        "dpm_solver_pp3": of(DPMSolverPP, order=3, **pp),
        "dpm_solver_pp3_single": of(DPMSolverPP, order=3, **{**pp, "single_steps": True}),
        "dpm_solver_pp3_lower": of(DPMSolverPP, order=3, **{**pp, "lower_order_below": 15}),
        "dpm_solver_pp2_coded": of(DPMSolverPP, order=2, **{**pp, "as_coded": True}),
        "dpm_solver_pp_sde1": of(DPMSolverPPSDE, **{**sde2, "order": 1}),
        "dpm_solver_pp_sde2": of(DPMSolverPPSDE, **sde2),
        "dpm_solver_pp_sde2_coded": of(DPMSolverPPSDE, **{**sde2, "as_coded": True}),
        "dpm_solver_pp_sde3": of(DPMSolverPPSDE, **{**sde2, "order": 3}),
        "dpm_solver_pp_sde3_tau": of(DPMSolverPPSDE, **{**sde2, "order": 3, "tau": 0.5}),
        "dpm_solver_pp_sde2_path": of(DPMSolverPPSDE, along_path=True, **sde2),
        "dpm_solver_pp_sde2_cold": of(DPMSolverPPSDE, **sde2, temperature=0.7, final_denoise=True),
        "deis2": of(DEIS, "power", order=2, variable=Time(), **multi),
        "deis3": of(DEIS, "power", order=3, variable=Time(), **multi),
        "deis3_snr": of(DEIS, order=3, variable=HalfLogSNR(), **multi),
        "deis3_noise": of(DEIS, "karras", order=3, variable=NoiseVariable(), **multi),
        "deis3_single": of(DEIS, order=3, variable=Time(), **{**multi, "single_steps": True}),
        "ipndm1": of(IPNDM, "karras", order=1, **multi),
        "ipndm3": of(IPNDM, "karras", order=3, **multi),
        "ipndm4": of(IPNDM, "karras", order=4, **multi),
        "ipndm4_single": of(IPNDM, "karras", order=4, **{**multi, "single_steps": True}),
        "unipc1": of(UniPC, order=1, bh=2, **multi),
        "unipc2": of(UniPC, order=2, bh=2, **multi),
        "unipc2_bh1": of(UniPC, order=2, bh=1, **multi),
        "unipc3": of(UniPC, order=3, bh=2, **multi),
        "unipc3_lower": of(UniPC, order=3, bh=2, **{**multi, "lower_order_below": 15}),
        "unipc2_denoised": of(UniPC, order=2, bh=2, **multi, final_denoise=True),
        "seeds": of(SEEDS, tau=1.0),
        "seeds_tau": of(SEEDS, tau=0.5),
        "seeds_path": of(SEEDS, tau=1.0, along_path=True),
        "heun": heun,
        "heun_churn": of(Heun, "karras", **churned),
        "heun_churn_denoised": of(Heun, "karras", **churned, final_denoise=True, temperature=0.9),
        "restart": Restart(sampler=heun, intervals=loops, **end),
        "restart_two": Restart(sampler=heun, intervals=two, **end),
        "restart_denoised": Restart(
            sampler=of(UniPC, "karras", order=2, bh=2, **multi),
            intervals=loops,
            eps=eps,
            final_denoise=True,
            temperature=0.9,
        ),
        "annealed_langevin": of(
            AnnealedLangevinDynamics, steps=3, langevin=AnnealedLangevin(snr=0.316, steps=4)
        ),
        "annealed_langevin_denoised": of(
            AnnealedLangevinDynamics,
            steps=3,
            langevin=Langevin(snr=0.2, steps=2, rule=ShrunkNorm(pseudo_dimensions=256.0)),
            final_denoise=True,
        ),
        "torchsde_euler": TorchSDE(**torchsde(steps, "euler", Increments()), **end),
        "torchsde_srk": TorchSDE(**torchsde(steps, "srk", Increments()), **end),
        "torchsde_euler_path": TorchSDE(
            **torchsde(steps, "euler", BrownianMotion(depth=20)), **end
        ),
        "torchsde_srk_path": TorchSDE(
            **torchsde(steps, "srk", BrownianMotion(depth=20)),
            eps=eps,
            final_denoise=True,
            temperature=0.9,
        ),
    }
    for (p, predictor), (c, corrector) in itertools.product(
        predictors.items(), correctors.items()
    ):
        found[f"pc_{p}_{c}"] = of(
            PredictorCorrector, "uniform", predictor=predictor, corrector=corrector
        )
    found["pc_path"] = of(
        PredictorCorrector,
        "uniform",
        predictor=ReverseDiffusionPredictor(),
        corrector=langevin,
        along_path=True,
        temperature=0.9,
        final_denoise=True,
    )
    return found


def torchsde(steps, method, motion, adaptive=False, rtol=1e-2, atol=1e-2):
    return {
        "steps": steps,
        "method": method,
        "motion": motion,
        "adaptive": adaptive,
        "rtol": rtol,
        "atol": atol,
    }


def reference_samplers(steps, eps=1e-3):
    end = {"eps": eps, "temperature": 1.0, "final_denoise": False}
    langevin = Langevin(snr=0.16, steps=1, rule=BatchMeanNorm())
    pairs = {
        "reverse_langevin": (ReverseDiffusionPredictor(), langevin),
        "ancestral": (AncestralPredictor(variance=1.0), None),
        "ancestral_annealed": (
            AncestralPredictor(variance=0.0),
            AnnealedLangevin(snr=0.16, steps=1),
        ),
        "euler": (EulerMaruyamaPredictor(), None),
    }
    return {
        name: ReferencePredictorCorrector(steps=steps, predictor=p, corrector=c, **end)
        for name, (p, c) in pairs.items()
    }


def optimizer(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)


def training(**more):
    plain = {
        "steps": 3,
        "batch_size": 16,
        "accumulate": 1,
        "rate": CosineRate(warmup=2),
        "ema": 0.9,
        "snapshots": 0,
        "lengths": (0.05, 0.10),
        "clip": 1.0,
        "max_skipped": 0,
        "log_every": 1,
        "validate_every": 3,
        "inspect_every": None,
        "save_every": 10,
        "keep": 1,
        "keep_best": False,
        "precision": "float32",
        "compile": False,
        "augment": None,
    }
    return Training(**{**plain, **more})


# --- Processes and models ------------------------------------------------------------------------


@group
def sde():
    t = torch.tensor([1e-3, 0.01, 0.2, 0.55, 0.9, 1.0], dtype=torch.float64)
    x = points(6, 2)
    for name, process in sdes().items():
        for part in ("alpha", "sigma", "f", "g", "log_snr"):
            yield f"exact/{name}/{part}", getattr(process, part)(t)
            yield f"exact/{name}/{part}32", getattr(process, part)(t.float())
        yield f"exact/{name}/time", process.time(process.log_snr(t))
        yield f"exact/{name}/prior_std", torch.tensor(process.prior_std, dtype=torch.float64)
        yield f"exact/{name}/prior_log_prob", process.prior_log_prob(x)
        yield f"exact/{name}/perturb", process.perturb(x, t, x.flip(0))
        for i, part in enumerate(process.transition(t[:-1], t[1:])):
            yield f"exact/{name}/transition{i}", part
        for i, part in enumerate(process.posterior(x[1:], x[:-1], t[1:], t[:-1])):
            yield f"exact/{name}/posterior{i}", part
        if isinstance(process, DiscreteVP):
            yield f"exact/{name}/index", process.index(t)
            yield f"exact/{name}/time_of_index", process.time_of_index(torch.arange(0, 1000, 200))
            yield f"exact/{name}/betas", torch.from_numpy(process.betas()[::100].copy())
            yield f"exact/{name}/integrated_beta", process.integrated_beta(t)
        elif name != "ve":
            yield f"exact/{name}/beta", process.beta(t)
            yield f"exact/{name}/integrated_beta", process.integrated_beta(t)


@group
def times():
    u = torch.tensor([0.02, 0.21, 0.4, 0.63, 0.8, 0.97], dtype=torch.float64)
    for name, process in sdes().items():
        for key, density in densities(process).items():
            t = density.quantile(u, process, 1e-3)
            yield f"exact/{name}/{key}/quantile", t
            yield f"exact/{name}/{key}/weight", density.weight(t, process, 1e-3)
            if name == "vp":
                yield f"exact/{name}/{key}/spread", density.spread(u)
        for key, grid in grids().items():
            yield f"exact/{name}/grid/{key}", grid(8, process, 1e-3)
        for key, weighting in weightings().items():
            yield f"exact/{name}/weighting/{key}", weighting(process, u)


@group
def models():
    t = torch.tensor([1e-3, 0.3, 0.7, 1.0], dtype=torch.float64)
    for name, process in sdes().items():
        exact = {**gaussians(process), "mixture": mixture(process)}
        for key, model in exact.items():
            x = points(4, 2 if key == "mixture" else 3)
            for part in ("score", "noise", "denoise", "log_prob"):
                yield f"exact/{name}/{key}/{part}", getattr(model, part)(x, t)
            yield f"exact/{name}/{key}/sample", model.sample(3, 0.2, seed=1)
            yield f"exact/{name}/{key}/sample0", model.sample(3, 0.0, seed=1)
            if key != "mixture":
                yield f"exact/{name}/{key}/flow", model.flow(x, 0.9, 0.1)
        single = {**gaussians(process, torch.float32), "mixture": mixture(process, torch.float32)}
        for key, model in single.items():
            x = points(4, 2 if key == "mixture" else 3, dtype=torch.float32)
            yield f"exact/{name}/{key}/noise32", model.noise(x, t)
        for key, label in itertools.product(parametrisations(), labels()):
            if label == "chain_index" and not isinstance(process, DiscreteVP):
                continue
            model, x = learned(process, key, label), points(4, 2)
            yield f"exact/{name}/learned/{key}/{label}/noise", model.noise(x, t)
            if label in ("noise_level", "sigma"):
                yield f"exact/{name}/learned/{key}/{label}/denoise", model.denoise(x, t)
                yield f"exact/{name}/learned/{key}/{label}/score", model.score(x, t)
        for key, parametrisation in parametrisations(0.7).items():
            alpha, sigma = process.alpha(t), process.sigma(t)
            yield (
                f"exact/{name}/reading/{key}/noise",
                torch.stack(parametrisation.to_noise(alpha, sigma)),
            )
            yield (
                f"exact/{name}/reading/{key}/data",
                torch.stack(parametrisation.to_data(alpha, sigma)),
            )
            yield f"exact/{name}/reading/{key}/scale_in", parametrisation.scale_in(alpha, sigma)
        for key, label in labels().items():
            if key != "chain_index" or isinstance(process, DiscreteVP):
                yield f"exact/{name}/label/{key}", label(process, t)
    unscaled = score_model(
        mlp(), sdes()["vp"], NoiseParametrisation(sigma_data=None), NoiseLevel()
    )
    yield "exact/vp/learned/unscaled/noise", unscaled.noise(points(4, 2), t)
    base = learned(sdes()["vp"])
    for key, model in {
        "clipped": Clipped(base, low=-1.0, high=1.0),
        "threshold": DynamicThreshold(base, quantile=0.6, low=-0.5, high=0.7),
    }.items():
        yield f"exact/vp/guided/{key}/denoise", model.denoise(points(4, 2), t)
        yield f"exact/vp/guided/{key}/noise", model.noise(points(4, 2), t)


@group
def networks():
    c = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64)
    x, image = points(3, 2), points(3, 1, 8, 8)
    yield "exact/mlp", mlp()(x, c)
    yield "exact/mlp32", mlp(dtype=torch.float32)(x.float(), c.float())
    yield "exact/unet", unet()(image, c)[:, :, ::3, ::3]
    yield "exact/unet32", unet(dtype=torch.float32)(image.float(), c.float())[:, :, ::3, ::3]
    ncsnpp = Architecture(
        resampling=FIRResampling(kernel=(1, 3, 3, 1)), input_pyramid=InputResidual()
    )
    net = unet(architecture=ncsnpp)
    yield "exact/ncsnpp", net(image, c)[:, :, ::3, ::3]
    for label in ("noise_level", "scaled_time", "sigma"):
        yield f"exact/embedding/{label}", embedding(label)(c.abs().float())
    torch.manual_seed(0)
    drawn = MLP(
        (2,), width=8, depth=1, dropout=0.0, embedding=embedding("noise_level"), conditions=None
    )
    for name, value in sorted(drawn.state_dict().items()):
        yield f"exact/initial_mlp/{name}", value.flatten()[:12]
    torch.manual_seed(0)
    drawn = UNet(
        (1, 8, 8),
        width=8,
        multipliers=(1,),
        blocks=1,
        attention=(),
        dropout=0.0,
        embedding=embedding("noise_level"),
    )
    total = sum(v.double().abs().sum() for v in drawn.state_dict().values())
    yield "exact/initial_unet", total


# --- Samplers ------------------------------------------------------------------------------------


def drawn(name, sampler, model, suffix="", count=3, shape=(2,), **more):
    samples = sampler(model, (count, *shape), seed=3, **more)
    kind = "adaptive" if suffix else "exact"
    yield f"{kind}/{name}/x{suffix}", samples.x
    yield f"{kind}/{name}/nfe{f'@{PASSES}' if suffix else ''}", samples.nfe
    for part in ("log_prob", "standard_error"):
        value = getattr(samples, part)
        if value is not None:
            yield f"{kind}/{name}/{part}{suffix}", value


@group
def samplers():
    for name, process in sdes().items():
        pair = {"mixture": mixture(process), "learned": learned(process)}
        for key, sampler in grid_samplers().items():
            for kind, model in pair.items():
                yield from drawn(f"{name}/{key}/{kind}", sampler, model)
        if name in ("vp", "subvp", "ve"):
            for key, sampler in reference_samplers(24).items():
                for kind, model in pair.items():
                    yield from drawn(f"{name}/reference_{key}/{kind}", sampler, model)


@group
def samplers_more():
    short = DiscreteVP(betas=LinearBetas(beta_min=0.1, beta_max=7.0, steps=8))
    for key, sampler in reference_samplers(8, eps=1 / 8).items():
        yield from drawn(f"short/reference_{key}", sampler, mixture(short))
    end = {"eps": 1e-3, "final_denoise": False, "temperature": 1.0, "along_path": False}
    for name, process in sdes().items():
        for key, grid in grids().items():
            ddim = DDIM(steps=8, grid=grid, eta=0.0, **end)
            yield from drawn(f"{name}/ddim/{key}", ddim, mixture(process))
    vp, every = sdes()["vp"], grid_samplers()
    for key in ("ddim", "euler_maruyama", "unipc2", "heun_churn", "pc_reverse_langevin", "seeds"):
        single = learned(vp, dtype=torch.float32)
        yield from drawn(f"vp/{key}/single", every[key], single)
        yield from drawn(f"vp/{key}/image", every[key], imaging(vp), count=2, shape=(1, 8, 8))
        yield f"exact/vp/{key}/latent", every[key].latent(single, (3, 2), seed=3)
        seeds = every[key](mixture(vp), (2, 2), seed=3, seeds=[7, 1])
        yield f"exact/vp/{key}/seeds", seeds.x
        start = every[key](mixture(vp), latent=points(3, 2), seed=3)
        yield f"exact/vp/{key}/from_latent", start.x
    _, way = sample_trajectory(
        mixture(vp), every["ddim"], points(2, 2), points=4, seed=3, seeds=None, callback=None
    )
    yield "exact/trace/t", way.t
    yield "exact/trace/x", way.x
    yield "exact/trace/denoised", way.denoised
    yield "exact/slerp", slerp(points(3, 2), points(3, 2, seed=1), torch.linspace(0, 1, 3))


@group
def adaptive_samplers():
    end = {"eps": 1e-3, "final_denoise": False, "temperature": 1.0}
    own = {"first_step": 0.01, "safety": 0.9, "power": 0.9, "max_steps": 10_000}
    for name, process in sdes().items():
        pair = {"mixture": mixture(process), "learned": learned(process)}
        for kind, model in pair.items():
            go = functools.partial(GottaGoFast, **own)
            yield from drawn(
                f"{name}/go/{kind}", go(rtol=0.05, atol=0.0078125, **end), model, "@0.05"
            )
            yield from drawn(f"{name}/flow/{kind}", flow(), model, "@1e-05")
        sampler = flow(probes=ExactTrace(chunk=1, forward=False))
        yield from drawn(f"{name}/flow_exact", sampler, pair["mixture"], "@1e-05")
        x = points(3, 2, scale=0.7)
        found = flow().encode(pair["learned"], x)
        yield f"adaptive/{name}/encode/x@1e-05", found.x
        yield f"adaptive/{name}/encode/nfe@{PASSES}", found.nfe
    vp = sdes()["vp"]
    model = learned(vp)
    choices = {
        "go_cold": GottaGoFast(
            rtol=0.05, atol=0.0078125, eps=1e-3, final_denoise=True, temperature=0.8, **own
        ),
        "torchsde": TorchSDE(
            **torchsde(20, "euler", BrownianMotion(depth=20), True, 5e-2, 5e-2), **end
        ),
    }
    for key, sampler in choices.items():
        yield from drawn(f"vp/{key}", sampler, model, "@0.05")
    flows = {
        "time_clock": flow(clock=TimeClock()),
        "wide_clock": flow(clock=NoiseClock(scale=2.0)),
        "tsit5": flow(method="tsit5"),
        "bosh3": flow(method="bosh3"),
        "dopri8": flow(method="dopri8"),
        "probes": flow(probes=Hutchinson(count=2, distribution=Rademacher())),
        "sphere": flow(probes=Hutchinson(count=2, distribution=Sphere()), clock=TimeClock()),
        "denoised": flow(final_denoise=True, temperature=0.9),
    }
    for key, sampler in flows.items():
        yield from drawn(f"vp/flow_{key}", sampler, model, "@1e-05")
    yield from drawn(
        "vp/flow_single", flow(rtol=1e-4, atol=1e-4), learned(vp, dtype=torch.float32), "@0.0001"
    )
    image = flow(rtol=1e-4, atol=1e-4)
    yield from drawn("vp/flow_image", image, imaging(vp), "@0.0001", count=2, shape=(1, 8, 8))


# --- Losses --------------------------------------------------------------------------------------


def graded(name, loss, model, x, weight="network.linear_out.weight", **more):
    model.zero_grad()
    values = loss(model, x, **{"seed": 5, **more})
    values.mean().backward()
    yield f"exact/{name}/value", values
    yield f"exact/{name}/gradient", dict(model.named_parameters())[weight].grad


@group
def losses():
    x = points(5, 2, scale=0.7)
    every = [
        (weighting, density)
        for weighting in weightings()
        for density in densities(sdes()["chain"])
        if weighting != "likelihood" or "log_normal" not in density
    ]
    for name, process in sdes().items():
        suits = [pair for pair in every if pair[1] in densities(process)]
        kinds = [
            pair
            for pair in itertools.product(parametrisations(), labels())
            if pair[1] != "chain_index" or isinstance(process, DiscreteVP)
        ]
        # Every pair of one list and of the other, and not their product.
        for i in range(max(len(suits), len(kinds))):
            weighting, density = suits[i % len(suits)]
            parametrisation, label = kinds[i % len(kinds)]
            loss = loss_of(
                weightings()[weighting], densities(process)[density], reduce_mean=i % 2 == 0
            )
            model = learned(process, parametrisation, label)
            key = f"{name}/{weighting}/{density}/{parametrisation}/{label}/{i % 2}"
            yield from graded(key, loss, model, x)
        given = loss_of(NoiseWeighting(), UniformTimes())
        t = torch.tensor([0.01, 0.2, 0.4, 0.7, 0.95], dtype=torch.float64)
        yield from graded(
            f"{name}/given", given, learned(process), x, t=t, noise=points(5, 2, seed=9)
        )
        yield f"exact/{name}/mixture", given(mixture(process), x, seed=5, seeds=[4, 2, 9, 1, 0])
        single = learned(process, dtype=torch.float32)
        low = loss_of(NoiseWeighting(), LowDiscrepancy(times=UniformTimes()))
        yield from graded(f"{name}/single", low, single, x.float())
        parted = low(learned(process), x[1:3], seed=5, seeds=range(5), part=slice(1, 3))
        yield f"exact/{name}/part", parted
    image = points(3, 1, 8, 8, scale=0.5)
    for reduce_mean in (True, False):
        loss = loss_of(
            EDMWeighting(sigma_data=0.5), LogNormalTimes(mean=-1.2, std=1.2), 1e-5, reduce_mean
        )
        model = imaging(sdes()["vp"])
        weight = next(n for n, p in model.named_parameters() if p.ndim == 4 and len(p) == 1)
        yield from graded(f"image/{reduce_mean}", loss, model, image, weight)


# --- Likelihoods ---------------------------------------------------------------------------------


def measured(name, exact, model, x, suffix="@1e-05", **more):
    result = exact(model, x, seed=2, **more)
    for part in ("log_prob", "prior_log_prob", "log_det", "standard_error", "latent"):
        yield f"adaptive/{name}/{part}{suffix}", getattr(result, part)
    yield f"adaptive/{name}/nfe@{PASSES}", result.nfe


@group
def likelihoods():
    six = {"dimension": 6}
    for name, process in sdes().items():
        yield from measured(f"{name}/mixture", likelihood(), mixture(process), points(3, 2))
        yield from measured(f"{name}/learned", likelihood(), learned(process), points(3, 2))
        for key, cutoff in {
            "rescaled": RescaledCutoff(),
            "variational": VariationalCutoff(variance=1.0),
            "narrow": VariationalCutoff(variance=0.7),
        }.items():
            exact = likelihood(cutoff=cutoff)
            yield from measured(f"{name}/{key}", exact, learned(process), points(3, 2))
    vp = sdes()["vp"]
    choices = {
        "time_clock": {"clock": TimeClock()},
        "wide_clock": {"clock": NoiseClock(scale=2.0)},
        "tsit5": {"method": "tsit5"},
        "bosh3": {"method": "bosh3"},
        "dopri8": {"method": "dopri8"},
        "small_eps": {"eps": 1e-5},
        "rademacher": {"probes": Hutchinson(count=3, distribution=Rademacher())},
        "rademacher1": {"probes": Hutchinson(count=1, distribution=Rademacher())},
        "gaussian": {"probes": Hutchinson(count=3, distribution=Gaussian())},
        "sphere": {"probes": Hutchinson(count=3, distribution=Sphere())},
        "orthogonal": {"probes": Hutchinson(count=3, distribution=Orthogonal())},
        "colours": {"probes": ColourProbing(spacing=2, repeats=2)},
        "word": {"probes": "exact"},
        "number": {"probes": 2},
        "chunked": {"probes": ExactTrace(chunk=3, forward=False)},
        "forward": {"probes": ExactTrace(chunk=2, forward=True)},
        "target": {
            "probes": Hutchinson(count=2, distribution=Rademacher()),
            "target_error": 0.3,
            "max_sets": 50,
        },
    }
    for key, more in choices.items():
        found = measured(f"vp/{key}", likelihood(**more), learned(vp, **six), points(3, 6))
        # The forward mode runs the network once for each chunk; then it was counted once in all.
        yield from (pair for pair in found if "forward/nfe" not in pair[0])
    own = likelihood(probes=Hutchinson(count=2, distribution=Rademacher()))
    yield from measured("vp/seeds", own, learned(vp, **six), points(3, 6), seeds=[5, 0, 8])
    single = learned(vp, dtype=torch.float32)
    loose = {"rtol": 1e-4, "atol": 1e-4}
    x32 = points(3, 2, dtype=torch.float32)
    yield from measured("vp/single", likelihood(**loose), single, x32, "@0.0001")
    image = points(2, 1, 8, 8, scale=0.5)
    colours = likelihood(probes=ColourProbing(spacing=2, repeats=2), rtol=1e-3, atol=1e-3)
    yield from measured("vp/image", colours, imaging(vp), image, "@0.001")
    for key, probes in {
        "exact": ExactTrace(chunk=1, forward=False),
        "rademacher": Hutchinson(count=2, distribution=Rademacher()),
    }.items():
        exact, model, x = likelihood(probes=probes, differentiable=True), learned(vp), points(3, 2)
        x.requires_grad_()
        exact(model, x, seed=2).log_prob.sum().backward()
        yield f"adaptive/vp/differentiable/{key}/x@1e-05", x.grad
        yield (
            f"adaptive/vp/differentiable/{key}/weight@1e-05",
            (model.network.linear_out.weight.grad),
        )


@group
def traces():
    x = points(3, 6)
    for key, estimator in {
        "exact": ExactTrace(chunk=1, forward=False),
        "rademacher": Hutchinson(count=3, distribution=Rademacher()),
        "gaussian": Hutchinson(count=3, distribution=Gaussian()),
        "sphere": Hutchinson(count=3, distribution=Sphere()),
        "orthogonal": Hutchinson(count=3, distribution=Orthogonal()),
        "colours": ColourProbing(spacing=2, repeats=2),
    }.items():
        for draw in (0, 1):
            probes = estimator.probes(Streams.of(seed=4, batch=3), x, draw)
            field = functools.partial(
                learned(sdes()["vp"], dimension=6).noise, t=torch.tensor(0.4)
            )
            v, estimates = estimator(field, x, probes, create_graph=False)
            yield f"exact/{key}/{draw}/probes", probes
            yield f"exact/{key}/{draw}/estimates", estimates
            yield f"exact/{key}/{draw}/standard_error", estimator.standard_error(estimates)
        yield f"exact/{key}/field", v


@group
def bounds():
    for name, process in sdes().items():
        every = {
            "importance": ImportanceTimes(),
            "uniform": UniformTimes(),
            "low_importance": LowDiscrepancy(times=ImportanceTimes()),
            "folded_importance": FoldedTimes(times=ImportanceTimes()),
            "folded_uniform": FoldedTimes(times=UniformTimes()),
        }
        for key, density in every.items():
            for kind, model in {"mixture": mixture(process), "learned": learned(process)}.items():
                result = bound(density)(model, points(3, 2), seed=2)
                for part in (
                    *("log_prob", "prior_kl", "reconstruction", "diffusion"),
                    *("standard_error", "nfe"),
                ):
                    yield f"exact/{name}/{key}/{kind}/{part}", getattr(result, part)
        yield f"exact/{name}/prior_kl", prior_kl(process, points(3, 2))
        yield f"exact/{name}/prior_mismatch", prior_mismatch(process, *spectrum(points(9, 3)))
    single = learned(sdes()["vp"], dtype=torch.float32)
    one = bound(FoldedTimes(times=ImportanceTimes()), draws=8, replicates=1)
    yield "exact/vp/single", one(single, points(3, 2, dtype=torch.float32), seed=2).log_prob


# --- Data and training ---------------------------------------------------------------------------


def toys():
    return {
        "two_moons": two_moons(noise=0.1, count=100, seed=0),
        "checkerboard": checkerboard(cells=4, count=100, seed=0),
        "gaussian_ring": gaussian_ring(modes=8, radius=2.0, std=0.1, count=100, seed=0),
        "spirals": spirals(noise=0.1, arms=2, turns=1.5, count=100, seed=0),
    }


@group
def data():
    streams = Streams.of(seed=6, seeds=[3, 0, 7, 2])
    for name, one in toys().items():
        for split in ("train", "validation", "test"):
            yield f"exact/{name}/{split}", one.batch(split, streams, 0).x
            yield f"exact/{name}/{split}/count", torch.tensor(len(one.split(split)))
        yield f"exact/{name}/encode", one.codec.encode(one.test[:4])
        yield f"exact/{name}/decode", one.decode(one.batch("train", streams, 0).x)
        yield f"exact/{name}/log_prob", one.log_prob(one.test[:4])
        yield f"exact/{name}/sigma_data", torch.tensor(one.sigma_data, dtype=torch.float64)
    one = digits(fractions=(0.8, 0.1, 0.1), seed=0)
    for split, draw in itertools.product(("train", "validation", "test"), (0, 1)):
        yield f"exact/digits/{split}/{draw}", one.batch(split, streams, draw).x
    yield "exact/digits/encode", one.codec.encode(one.test[:2])
    yield "exact/digits/decode", one.decode(one.batch("train", streams, 0).x)
    yield "exact/digits/to_unit", one.to_unit(one.batch("train", streams, 0).x)[:1]
    yield "exact/digits/sigma_data", torch.tensor(one.sigma_data, dtype=torch.float64)
    x = one.batch("train", streams, 0).x
    for draw in (0, 1):
        moved, told = GeometricAugmentation(probability=0.7)(x, streams, draw)
        yield f"exact/augmented/{draw}/x", moved
        yield f"exact/augmented/{draw}/labels", told
    for key, offsets in {
        "uniform": UniformDequantisation(),
        "normal": TruncatedNormalDequantisation(std=0.128),
    }.items():
        u = offsets.sample(streams, (1, 2, 2), 1)
        yield f"exact/dequantisation/{key}/sample", u
        yield f"exact/dequantisation/{key}/log_prob", offsets.log_prob(u)


@group
def trainings():
    one = toys()["two_moons"]
    loss = loss_of(NoiseWeighting(), LowDiscrepancy(times=UniformTimes()), 1e-5)
    plans = {
        "cosine": training(),
        "constant": training(rate=ConstantRate(warmup=2), clip=None, accumulate=2),
    }
    for key, plan in plans.items():
        model = learned(sdes()["vp"], dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            average = train(
                model, one, loss, plan, optimizer, Path(folder), seed=4, progress=False
            )
        for kind, module in {"raw": model, "average": average}.items():
            for name, value in sorted(module.named_parameters()):
                yield f"exact/{key}/{kind}/{name}", value.flatten()[:16]
    model = learned(sdes()["ve"], "noise", dtype=torch.float32)
    update = Update(model, loss, training(snapshots=2), optimizer, None, 4)
    streams = Streams.of(seed=4, batch=16)
    for step in range(3):
        yield f"exact/update/{step}", update(one.batch("train", streams, step).x, {}, step, 16)
    yield "exact/update/weight", model.network.linear_out.weight
    for i, average in enumerate(update.averages):
        yield f"exact/update/average{i}", average.model.network.linear_out.weight


# --- Files ---------------------------------------------------------------------------------------


def save(path, found):
    """Writes numbers, all of one type in one array, beside a list of their names."""
    kinds, index = {}, []
    for name, value in found.items():
        kind = str(value.dtype).removeprefix("torch.")
        index.append([name, kind, list(value.shape)])
        kinds.setdefault(kind, []).append(value.reshape(-1).numpy())
    arrays = {kind: np.concatenate(values) for kind, values in kinds.items()}
    text = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(path, _index=text, **arrays)


def read(path):
    """Reads the numbers of a file by their names."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    found, places = {}, dict.fromkeys(arrays, 0)
    for name, kind, shape in json.loads(arrays["_index"].tobytes()):
        start = places[kind]
        places[kind] = end = start + math.prod(shape)
        found[name] = torch.from_numpy(arrays[kind][start:end].reshape(shape).copy())
    return found


def allowed(name):
    """Returns how far a number may be from the recorded one, relative to max(1, |value|)."""
    if name.startswith("adaptive/"):
        return 3 * float(name.rpartition("@")[2])
    return EXACT


def distance(value, old):
    """Returns the largest difference, and the largest one relative to max(1, |value|)."""
    if value.numel() == 0:
        return 0.0, 0.0
    a, b = value.double(), old.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    return float(gap.max()), float((gap / b.abs().nan_to_num(1.0).clamp(min=1)).max())


def difference(name, value, old):
    """Returns a sentence where a number is too far from the recorded one, and else None."""
    if value is None or old is None:
        return f"{name}: {'missing' if value is None else 'not recorded'}"
    if value.shape != old.shape or value.dtype != old.dtype:
        return (
            f"{name}: {tuple(value.shape)} {value.dtype}, recorded {tuple(old.shape)} {old.dtype}"
        )
    gap, relative = distance(value, old)
    if relative > allowed(name):
        return (
            f"{name}: differs by {gap:.3g} ({relative:.3g} relative, {allowed(name):.3g} allowed)"
            f"\n  now      {value.flatten()[:8].tolist()}\n  recorded {old.flatten()[:8].tolist()}"
        )
    return None


def compare(found, old):
    """Prints what differs; returns whether all of it is small enough."""
    counts, good = dict.fromkeys(("identical", "different", "missing", "new"), 0), True
    for name in {**old, **found}:
        if name not in found or name not in old:
            counts["missing" if name in old else "new"] += 1
            good = good and name in found
            print(f"{name}: {'missing' if name in old else 'new'}")
            continue
        bad = difference(name, found[name], old[name])
        good = good and bad is None
        if bad is None and distance(found[name], old[name])[0] == 0:
            counts["identical"] += 1
            continue
        counts["different"] += 1
        if bad is None:
            gap, relative = distance(found[name], old[name])
            bad = f"{name}: {gap:.3g} absolute, {relative:.3g} relative (allowed)"
        print(bad)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return good


def main(arguments):
    torch.set_num_threads(1)
    if len(arguments) != 2 or arguments[0] not in ("record", "compare"):
        sys.exit("python -m tests.recorded record FILE, or compare FILE")
    if arguments[0] == "record":
        save(arguments[1], numbers())
    elif not compare(numbers(), read(arguments[1])):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
