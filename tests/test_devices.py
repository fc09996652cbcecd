"""Everything that runs on a GPU, run on one that is not there (see :mod:`tests.fake_cuda`).

The values must be those of the CPU, and the results must be where the model is.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde.sample
from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    ChainIndex,
    DataParametrisation,
    DenoisingScoreMatching,
    DiscreteVP,
    EDMWeighting,
    GaussianMixtureModel,
    GaussianModel,
    LearnedSchedule,
    Likelihood,
    LikelihoodWeighting,
    NoiseLevel,
    NoiseParametrisation,
    Preconditioned,
    RectifiedFlow,
    ScaledTime,
    ScoreFunction,
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
    Trace,
)
from scoresde.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clipped,
    DynamicThreshold,
    Projected,
)
from scoresde.inverse import (
    DDNM,
    MMPS,
    CovarianceKernel,
    DPSStep,
    IsotropicKernel,
    Kernel,
    Masking,
    Observation,
    Replacement,
    SDEdit,
    Twisted,
)
from scoresde.likelihood.clock import NoiseClock, TimeClock
from scoresde.likelihood.cutoff import PlainCutoff, RescaledCutoff, VariationalCutoff
from scoresde.nn import MLP, UNet
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
    Sampler,
    TorchSDE,
    UniPC,
    sample_trajectory,
    slerp,
)
from scoresde.sde import LinearBetas
from scoresde.solvers import BrownianInterval, Path
from scoresde.streams import Streams
from scoresde.times import (
    ChainTimes,
    CosineGrid,
    ExplicitGrid,
    ImportanceTimes,
    KarrasGrid,
    LevelTimes,
    LogNormalTimes,
    LogSNRGrid,
    LowDiscrepancy,
    PowerGrid,
    Times,
    UniformTimes,
)
from scoresde.train import Training, Update, train
from tests.fake_cuda import CPU, CUDA, fake_cuda

CHAIN = DiscreteVP(LinearBetas(steps=25))
SDES: list[SDE] = [VPSDE(), SubVPSDE(), VESDE(0.01, 10.0), CHAIN, RectifiedFlow()]
by_name = partial(pytest.mark.parametrize, ids=lambda value: type(value).__name__)


def leaves(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for v in value for x in leaves(v)] if isinstance(value, list | tuple) else [value]


def check(compute: Callable[[torch.device], Any], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Checks that a computation yields the same on both devices, and yields it there."""
    torch.manual_seed(0)
    here = leaves(compute(CPU))
    torch.manual_seed(0)
    with fake_cuda() as device:
        there = leaves(compute(device))
        assert [str(x.device) for x in there if isinstance(x, Tensor)] == [
            str(CUDA) for x in here if isinstance(x, Tensor)
        ]
        there = [x.detach().cpu() if isinstance(x, Tensor) else x for x in there]
    for a, b in zip(there, here, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert a == b
    assert any(isinstance(x, Tensor) for x in here)


def stirred(network: nn.Module) -> nn.Module:
    """A network none of whose layers is zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return network.eval()


def perceptron(sde: SDE, **options: Any) -> ScoreModel:
    return ScoreModel(stirred(MLP(2, width=8, depth=1, **options)), sde)


def gaussian(sde: SDE) -> GaussianModel:
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    return GaussianModel(torch.tensor([0.5, -0.5]), sde=sde, covariance=covariance)


def mixture(sde: SDE) -> GaussianMixtureModel:
    return GaussianMixtureModel([1, 2], [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.5], sde)


MODELS: list[Callable[[SDE], ScoreFunction]] = [perceptron, gaussian, mixture]


def points(device: torch.device, count: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 2 * count, device=device).reshape(count, 2).sin()


# --- The pretended GPU itself --------------------------------------------------------------------


def refusals() -> list[Callable[[Tensor, Tensor], Any]]:
    """What CUDA refuses of a tensor of its own and one of the CPU, both of shape (3,)."""
    return [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: cpu * gpu,
        lambda gpu, cpu: cpu + gpu[0],  # a number, but of the GPU
        lambda gpu, cpu: gpu.add_(cpu),
        lambda gpu, cpu: cpu.add_(gpu),
        lambda gpu, cpu: cpu[0].add_(gpu[0]),
        lambda gpu, cpu: torch.stack((gpu, cpu)),
        lambda gpu, cpu: torch.stack((gpu[0], cpu[0])),
        lambda gpu, cpu: torch.cat((gpu, cpu)),
        lambda gpu, cpu: gpu @ cpu,
        lambda gpu, cpu: torch.where(cpu > 0, gpu, 0.0),
        lambda gpu, cpu: torch.where(cpu[0] > 0, gpu, 0.0),
        lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
        lambda gpu, cpu: gpu.masked_fill(cpu > 0, 0.0),
        lambda gpu, cpu: torch.addcmul(gpu, gpu, cpu),
        lambda gpu, cpu: torch.lerp(gpu, gpu, cpu),
        lambda gpu, cpu: gpu.index_add(0, cpu.long(), gpu),
        lambda gpu, cpu: gpu.gather(0, cpu.long()),
        lambda gpu, cpu: torch.searchsorted(cpu, gpu),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.index_put_((cpu.long(),), cpu),
        lambda gpu, cpu: nn.functional.linear(gpu, cpu[None]),
        lambda gpu, cpu: torch._foreach_add_([gpu], [cpu]),
        lambda gpu, cpu: torch.func.vmap(lambda x: x + cpu)(gpu[None]),
        lambda gpu, cpu: torch.func.grad(lambda x: (x * cpu).sum())(gpu),
        lambda gpu, cpu: torch.func.jvp(lambda x: x**2, (gpu,), (cpu,)),
        lambda gpu, cpu: gpu.requires_grad_().square().backward(cpu),
        lambda gpu, cpu: torch.randn(3, device=gpu.device, generator=torch.Generator()),
        lambda gpu, cpu: gpu.numpy(),
    ]


@pytest.mark.parametrize("number", range(len(refusals())))
def test_devices_that_differ_are_refused(number: int) -> None:
    refused = refusals()[number]
    refused_where_it_is_wrong = pytest.raises((RuntimeError, TypeError), match=r"devices?\b")
    with fake_cuda() as device, refused_where_it_is_wrong:
        refused(torch.ones(3, device=device), torch.ones(3))


def test_what_cuda_lets_pass() -> None:
    with fake_cuda() as device:
        x, one = torch.arange(1.0, 4.0, device=device), torch.tensor(1.0, dtype=torch.float64)
        index = torch.tensor([2, 0])
        on_it = [
            *(
                x + one,
                one - x,
                x * 2,
                x.clone().mul_(one),
                x[index],
                x[torch.tensor(1)],
                x[x > 1],
            ),
            *(torch.where(x > 1, x, one), x.masked_fill(x > 1, one), torch.addcmul(x, x, one)),
            *(x.new_zeros(2), torch.full_like(x, 2), torch.arange(3, device=x.device)),
            *(torch.tensor([1.0], device="cuda"), torch.as_tensor(index, device="cuda:0")),
            *(torch.randn(2, device=device, generator=torch.Generator(device)), x.cuda()),
            *(torch.zeros(2).to(x), torch.zeros(2).cuda(), torch.linalg.qr(x[:, None])[0]),
            *(
                torch.ones(3, device=device).index_put_((index,), one.float()),
                x.clone().fill_(one),
            ),
        ]
        assert {(y.device, y.is_cuda, y.is_cpu) for y in on_it} == {(CUDA, True, False)}
        assert (x + one).dtype == torch.float32
        leaving = [x.cpu(), x.to("cpu"), torch.zeros(3).copy_(x), x.to(torch.zeros(1))]
        assert {(y.device, type(y)) for y in leaving} == {(CPU, Tensor)}
        assert (float(x[0]), int(x[1]), x[2].item(), bool(x[0] > 0)) == (1.0, 2, 3.0, True)
        assert x.tolist() == [1.0, 2.0, 3.0]
        assert x.view(3, 1).mul_(2)[0].item() == x[0].item() == 2.0
        assert torch.ones(1).device == torch.get_default_device() == CPU
        with torch.device(device):
            assert torch.ones(1).device == CUDA
        with torch.autocast("cuda", torch.bfloat16):
            assert nn.Linear(3, 1).to(device)(x).dtype == torch.bfloat16
            assert nn.Linear(3, 1)(x.cpu()).dtype == torch.float32
    assert not torch.cuda.is_available()


class Forgetful(nn.Module):
    """A network with numbers that do not move with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.forgotten = torch.ones(2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x * self.weight + self.forgotten


def test_a_module_with_a_tensor_left_behind_is_caught() -> None:
    sampler = DDIM(steps=2)
    sampler(ScoreModel(Forgetful(), VPSDE()), (3, 2), seed=0)
    with fake_cuda() as device, pytest.raises(RuntimeError, match="same device"):
        sampler(ScoreModel(Forgetful(), VPSDE()).to(device), (3, 2), seed=0)


def test_times_left_behind_are_caught() -> None:
    t = torch.full((3,), 0.5)
    with fake_cuda() as device, pytest.raises(RuntimeError, match="same device"):
        VPSDE().alpha(t) * points(device)[:, 0]


# --- Models and processes ------------------------------------------------------------------------


@by_name("sde", SDES)
def test_processes(sde: SDE) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        t = torch.tensor([0.1, 0.5, 0.9], device=device)
        x = points(device)
        found = [function(t) for function in (sde.alpha, sde.sigma, sde.f, sde.g, sde.log_snr)]
        found += [SDE.f(sde, t), SDE.g(sde, t), sde.time(sde.log_snr(t))]
        found += [SDE.time(sde, sde.log_snr(t)), *sde.transition(0.5 * t, t)]
        for time in (t, torch.tensor(0.5, dtype=torch.float64)):
            mean, std = sde.posterior(x, x, time, 0.5 * time)
            found += [sde.perturb(x, time, x), mean + std * x]
        generator = torch.Generator(device).manual_seed(0)
        return [*found, sde.prior_log_prob(x), sde.prior_sample((3, 2), generator, device)]

    check(compute)


@by_name("sde", SDES)
@pytest.mark.parametrize("make", MODELS)
def test_views(make: Callable[[SDE], ScoreFunction], sde: SDE) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model, x = make(sde).to(device), points(device)
        assert model.device.type == device.type
        times = (torch.tensor(0.5, dtype=torch.float64), torch.full((3,), 0.4, device=device))
        views = (model.score, model.noise, model.denoise)
        found = [view(x, t) for view in views for t in (*times, 0.3)]
        if not isinstance(model, ScoreModel):
            found += [model.log_prob(x), model.log_prob(x, times[1]), model.sample(3, seed=0)]
            found += [model.sample(3, 0.5, seed=0)]
        if isinstance(model, GaussianModel):
            found.append(model.flow(x, 0.5, 0.1))
        return found

    check(compute)


def test_exact_models_of_numbers_on_the_device() -> None:
    def compute(device: torch.device) -> list[Tensor]:
        x = points(device)
        models = [
            GaussianModel(x[0], 0.5, VPSDE()),
            GaussianModel(x[0], torch.ones(2, device=device), VPSDE()),
            GaussianModel(x[0], sde=VPSDE(), covariance=torch.eye(2, device=device)),
            GaussianMixtureModel([1, 1, 1], x, [1, 2, 3], VPSDE()),
        ]
        return [model.score(x, 0.5) for model in models]

    check(compute)


@by_name(
    "parametrisation",
    [
        *(NoiseParametrisation(None), NoiseParametrisation(), DataParametrisation()),
        *(VParametrisation(), ScoreParametrisation(), Preconditioned(0.5)),
    ],
)
@by_name("label", [NoiseLevel(), ScaledTime(), ChainIndex()])
def test_parametrisations_and_labels(parametrisation: Any, label: Any) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        network = perceptron(CHAIN).network
        model = ScoreModel(network, CHAIN, parametrisation, label).to(device)
        x, t = points(device), torch.full((3,), 0.4, device=device)
        return [model.noise(x, t), model.denoise(x, t), model.score(x, torch.tensor(0.4))]

    check(compute)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unet(layout: torch.memory_format) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        network = UNet((2, 8, 8), width=8, blocks=1, conditions={"label": 3})
        network = stirred(network).to(device, memory_format=layout)
        model = ScoreModel(network, VPSDE())
        x = torch.linspace(-1, 1, 256, device=device).reshape(2, 2, 8, 8)
        cond = {"label": torch.eye(3, device=device)[:2]}
        model.denoise(x, torch.tensor(0.5), **cond).square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        samples = Heun(steps=2)(model, (2, 2, 8, 8), seed=0, **cond)
        return [*gradients, samples.x]

    check(compute, rtol=1e-3, atol=1e-3)


# --- Samplers ------------------------------------------------------------------------------------

FEW = {"steps": 4, "grid": LogSNRGrid()}
SAMPLERS: list[Sampler] = [
    AnnealedLangevinDynamics(steps=2, langevin=AnnealedLangevin(0.3, 2)),
    AnnealedLangevinDynamics(steps=2, langevin=Langevin(0.3, 2), final_denoise=True),
    DDIM(**FEW, temperature=0.8),
    DDIM(**FEW, eta=1.0, along_path=True),
    DEIS(**FEW),
    DEIS(**FEW, variable=HalfLogSNR()),
    IPNDM(**FEW),
    SEEDS(**FEW),
    SEEDS(**FEW, along_path=True, final_denoise=True),
    DPMSolver(**FEW, order=3),
    DPMSolverPP(**FEW, order=3),
    DPMSolverPPSDE(**FEW),
    DPMSolverPPSDE(**FEW, along_path=True),
    Euler(steps=4, grid=CosineGrid()),
    Euler(steps=3, grid=ExplicitGrid((1.0, 0.6, 0.3, 0.1)), eps=0.1),
    EulerMaruyama(steps=4, grid=PowerGrid()),
    EulerMaruyama(steps=4, along_path=True),
    GottaGoFast(rtol=0.5, atol=0.5),
    Heun(steps=4, grid=KarrasGrid(), churn=1.0),
    PredictorCorrector(steps=3),
    PredictorCorrector(steps=3, predictor=AncestralPredictor(), corrector=AnnealedLangevin()),
    PredictorCorrector(
        steps=3, predictor=EulerMaruyamaPredictor(), corrector=Langevin(rule=BatchMeanNorm())
    ),
    ProbabilityFlow(rtol=0.5, atol=0.5),
    ProbabilityFlow(rtol=0.5, atol=0.5, probes=2, clock=TimeClock()),
    ProbabilityFlow(rtol=0.5, atol=0.5, probes="exact", method="adaptive_heun"),
    ReferencePredictorCorrector(steps=25),
    Restart(Heun(steps=6, grid=KarrasGrid()), intervals=(RestartInterval(0.1, 1.0),)),
    TorchSDE(steps=3),
    TorchSDE(steps=3, method="srk", motion=Path(6)),
    TorchSDE(steps=3, method="heun", motion=BrownianInterval()),
    TorchSDE(steps=3, method="reversible_heun"),
    TorchSDE(steps=9, method="srk", motion=Path(9), adaptive=True, rtol=9.0, atol=9.0, eps=0.1),
    UniPC(**FEW),
]


def test_no_sampler_is_left_out() -> None:
    exported = [getattr(scoresde.sample, name) for name in scoresde.sample.__all__]
    kinds = {
        kind
        for kind in exported
        if isinstance(kind, type) and issubclass(kind, Sampler) and not inspect.isabstract(kind)
    }
    assert {type(sampler) for sampler in SAMPLERS} == kinds


@by_name("sde", SDES)
@pytest.mark.parametrize(
    "number", range(len(SAMPLERS)), ids=lambda i: f"{type(SAMPLERS[i]).__name__}-{i}"
)
def test_samplers(number: int, sde: SDE) -> None:
    if sde.zero_snr and (
        "Karras" in str(SAMPLERS[number]) or "Reference" in str(SAMPLERS[number])
    ):
        pytest.skip("it has no finite levels, or no published steps")
    make = MODELS[(number + SDES.index(sde)) % len(MODELS)]

    def compute(device: torch.device) -> list[Any]:
        model, seen = make(sde).to(device), []
        samples = SAMPLERS[number](model, (3, 2), seed=0, callback=lambda s: seen.append(s.x))
        again = SAMPLERS[number].latent(model, (3, 2), seed=0, seeds=[4, 2, 0])
        return [samples, len(seen), seen[-1], again]

    check(compute)


class Learned(nn.Module, SDE):
    """A schedule with weights, which the times of a grid on the host have to reach."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.width = nn.Parameter(torch.tensor(-8.0)), nn.Parameter(torch.tensor(12.0))

    def gamma_of(self, t: Tensor) -> Tensor:
        return self.low + self.width * t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.gamma_of(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.gamma_of(t)).sqrt()


@pytest.mark.parametrize(
    "sampler",
    [
        *(EulerMaruyama(3), PredictorCorrector(2), UniPC(3), DDIM(3, KarrasGrid())),
        *(ProbabilityFlow(0.1, 0.1, probes=1), TorchSDE(3), GottaGoFast(0.5, 0.5)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_learned_schedule(sampler: Sampler) -> None:
    def compute(device: torch.device) -> list[Any]:
        model, x = perceptron(Learned()).to(device), points(device)
        loss = DenoisingScoreMatching(EDMWeighting(), ImportanceTimes())(model, x, seed=0).sum()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        exact = Likelihood(1, rtol=0.1, atol=0.1)(model, x, seed=0)
        bound = VariationalBound(draws=2)(model, x, seed=0)
        return [loss, gradients, sampler(model, (3, 2), seed=0), exact, bound]

    check(compute, rtol=2e-3, atol=2e-3)


# --- Likelihoods and traces ----------------------------------------------------------------------

TRACES: list[Trace] = [
    ExactTrace(),
    ExactTrace(chunk=1),
    ExactTrace(chunk=2),
    ExactTrace(forward=True),
    Hutchinson(2, Rademacher()),
    Hutchinson(2, Gaussian()),
    Hutchinson(2, Sphere()),
    Hutchinson(2, Orthogonal()),
    ColourProbing(2, repeats=2),
]


@pytest.mark.parametrize("graph", [False, True])
@by_name("trace", TRACES)
def test_traces(trace: Trace, graph: bool) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model, x = perceptron(VPSDE()).to(device), points(device)
        streams = Streams.of(seed=0, batch=len(x), device=device)
        probes = trace.probes(streams, x)
        t = torch.tensor(0.5, dtype=torch.float64)
        v, estimates = trace(lambda y: model.score(y, t), x, probes, create_graph=graph)
        found = [probes, v, estimates, trace.standard_error(estimates)]
        if graph:
            found += torch.autograd.grad(estimates.sum(), [*model.parameters()], allow_unused=True)
        return found

    check(compute)


LIKELIHOODS: list[Likelihood] = [
    *(Likelihood(trace, rtol=0.1, atol=0.1) for trace in TRACES),
    *(
        Likelihood(2, rtol=0.1, atol=0.1, cutoff=cutoff, clock=clock)
        for cutoff, clock in [
            (PlainCutoff(), TimeClock()),
            (RescaledCutoff(), NoiseClock()),
            (VariationalCutoff(0.5), NoiseClock()),
        ]
    ),
    *(
        Likelihood("exact", rtol=0.1, atol=0.1, method=method)
        for method in ("dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun")
    ),
    Likelihood(1, rtol=0.5, atol=0.5, target_error=1e-3, max_sets=2),
]


@pytest.mark.filterwarnings("ignore:After 2 sets")
@pytest.mark.parametrize("number", range(len(LIKELIHOODS)))
def test_likelihoods(number: int) -> None:
    sde = CHAIN if number == len(TRACES) else [*SDES[:3], SDES[4]][number % 4]
    make = MODELS[(number + number // 3) % len(MODELS)]

    def compute(device: torch.device) -> Any:
        return LIKELIHOODS[number](make(sde).to(device), points(device), seed=0)

    check(compute, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("probes", ["exact", 1])
def test_a_likelihood_that_is_differentiated(probes: str | int) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model, x = perceptron(VPSDE()).to(device), points(device).requires_grad_()
        likelihood = Likelihood(probes, rtol=0.5, atol=0.5, differentiable=True)
        log_prob = likelihood(model, x, seed=0).log_prob
        log_prob.sum().backward()
        return [log_prob, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    check(compute, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", MODELS)
@by_name("sde", SDES)
def test_bounds(sde: SDE, make: Callable[[SDE], ScoreFunction]) -> None:
    bound = VariationalBound(draws=2)
    check(lambda device: bound(make(sde).to(device), points(device), seed=0), rtol=1e-3)


def test_examples_on_the_cpu_come_to_the_model() -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model, x = mixture(VPSDE()).to(device), points(CPU)
        likelihood = Likelihood("exact", rtol=0.1, atol=0.1)(model, x, seed=0, seeds=[3, 1, 2])
        bound = VariationalBound(draws=1)(model, x, seed=0)
        return [likelihood, bound, DDIM(steps=2)(model, latent=x, seed=0)]

    check(compute, rtol=1e-3)


# --- Losses and training -------------------------------------------------------------------------

TIMES = [
    *(UniformTimes(), ImportanceTimes(), LogNormalTimes(), LevelTimes(10)),
    *(ChainTimes(), LowDiscrepancy(), LowDiscrepancy(ImportanceTimes())),
]


@pytest.mark.parametrize("times", TIMES, ids=str)
@by_name("sde", SDES)
def test_losses(sde: SDE, times: Times) -> None:
    sde = CHAIN if isinstance(times, ChainTimes) else sde

    def compute(device: torch.device) -> list[Tensor]:
        model, x = perceptron(sde).to(device), points(device)
        losses = [DenoisingScoreMatching(times=times), DenoisingScoreMatching(EDMWeighting())]
        losses += [DenoisingScoreMatching(LikelihoodWeighting(), times, reduce_mean=False)]
        found = [loss(model, x, seed=0, seeds=range(3)) for loss in losses]
        found.append(losses[0](model, x, t=torch.tensor(0.5), noise=x))
        found.append(losses[0](model, x, t=torch.full((3,), 0.5, device=device), noise=x))
        torch.stack(found).sum().backward()
        return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]

    check(compute, rtol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_update(precision: str, how: dict[str, bool]) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model = perceptron(VPSDE()).to(device)
        training = Training(precision=precision, compile=False, accumulate=2, snapshots=1)
        optimiser = partial(torch.optim.Adam, lr=1e-2, **how)
        update = Update(model, DenoisingScoreMatching(), training, optimiser)
        numbers = [update(points(device, 4), {}, step, 4) for step in range(2)]
        averages = [list(average.model.parameters()) for average in update.averages]
        return leaves([numbers, list(model.parameters()), averages])

    few_digits = {"rtol": 0.05, "atol": 0.02} if precision != "float32" else {}
    check(compute, **few_digits)


@by_name("times", [UniformTimes(), LowDiscrepancy(ImportanceTimes()), LogNormalTimes()])
def test_an_update_of_a_learned_schedule(times: Times) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model = perceptron(LearnedSchedule()).to(device)
        training = Training(precision="float32", compile=False, accumulate=2)
        loss = DenoisingScoreMatching(LikelihoodWeighting(), times)
        update = Update(model, loss, training, partial(torch.optim.Adam, lr=1e-2))
        numbers = [update(points(device, 4), {}, step, 4) for step in range(2)]
        average = list(update.averages[0].model.parameters())
        return leaves([numbers, list(update.parts.values()), list(model.parameters()), average])

    check(compute, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "sampler", [UniPC(4), EulerMaruyama(4), Heun(3), ProbabilityFlow(1e-2, 1e-2)], ids=repr
)
def test_samples_of_a_learned_schedule(sampler: Sampler) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model = perceptron(LearnedSchedule()).to(device)
        return [sampler(model, shape=(3, *points(device).shape[1:]), seed=0).x]

    check(compute, rtol=1e-3, atol=1e-3)


def test_a_training(tmp_path: Any) -> None:
    def compute(device: torch.device) -> list[Any]:
        folder = tmp_path / device.type
        folder.mkdir()
        found: list[Any] = []
        for steps in (2, 3):  # and goes on from the checkpoint
            average = train(
                perceptron(VPSDE()).to(device),
                two_moons(count=100),
                DenoisingScoreMatching(),
                Training(steps, 8, precision="float32", compile=False, snapshots=1),
                partial(torch.optim.Adam, lr=1e-2),
                folder,
                progress=False,
            )
            found += list(average.parameters())
        return found

    check(compute)


# --- What is made of models, and around them -----------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("change", [Clipped, partial(DynamicThreshold, quantile=0.6)])
def test_guidance(change: Callable[..., ScoreFunction], make: Callable) -> None:
    def compute(device: torch.device) -> list[Tensor]:
        model, x = change(make(VPSDE()), low=-0.2, high=0.2).to(device), 3 * points(device)
        times = (torch.tensor(0.5, dtype=torch.float64), torch.full((3,), 0.4, device=device))
        found = [view(x, t) for view in (model.score, model.noise, model.denoise) for t in times]
        return [*found, DDIM(steps=3)(model, (3, 2), seed=0).x]

    check(compute)


@pytest.mark.parametrize("kind", ["free", "classifier", "auto", "projected"])
def test_guidance_by_two(kind: str) -> None:
    """With a scale, a time and a class of each example's own, two of them without guidance."""
    scale, label = torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0, -1, 1])
    mixture = GaussianMixtureModel([0.5, 0.5], torch.eye(2), [0.3, 0.6], VPSDE(), labels=[0, 1])

    def compute(device: torch.device) -> list[Any]:
        exact, net = copy.deepcopy(mixture).to(device), perceptron(VPSDE(), classes=2).to(device)
        free = ClassifierFreeGuidance(net, scale, (0.2, 5.0))
        model = {
            "free": lambda: free,
            "classifier": lambda: ClassifierGuidance(net, exact.class_log_prob, scale),
            "auto": lambda: Autoguidance(net, exact, scale, (0.2, 5.0)),
            "projected": lambda: Projected(free, 0.3, norm=0.5),
        }[kind]().to(device)
        cond = {"label": label.to(device)}
        times = (torch.tensor(0.5, dtype=torch.float64), torch.full((3,), 0.4, device=device))
        views = (model.score, model.noise, model.denoise, model.velocity)
        found: list[Any] = [view(points(device), t, **cond) for view in views for t in times]
        samplers = DDIM(steps=3), ProbabilityFlow(rtol=0.5, atol=0.5)
        found += [sampler(model, (3, 2), seed=0, **cond) for sampler in samplers]
        return [*found, Likelihood(1, rtol=0.1, atol=0.1)(model, points(device), seed=0, **cond)]

    check(compute, rtol=1e-3)


@pytest.mark.parametrize("make", MODELS)
@by_name("rule", [DDNM(3, eta=0.5), Replacement(3, resamplings=2), DPSStep(3), SDEdit(0.5)])
def test_rules_for_observations(rule: Any, make: Callable[[SDE], ScoreFunction]) -> None:
    """An observation whose mask and measurements are on the CPU comes to the model."""
    mask, y = torch.tensor([True, False]), torch.tensor([0.3, 0.0])
    seen = Observation(Masking(mask), y, 0.5 if isinstance(rule, DPSStep) else 0.0)

    def compute(device: torch.device) -> Any:
        model = make(VPSDE()).to(device)
        if isinstance(rule, SDEdit):
            return replace(rule, sampler=DDIM(6, eta=1.0))(model, source=points(device), seed=0)
        return rule(model, (3, 2), observed=seen, seed=0)

    check(compute, rtol=1e-3)


@by_name("kernel", [CovarianceKernel(), IsotropicKernel()])
@by_name("sde", [VPSDE(), RectifiedFlow()])
def test_particles(kernel: Kernel, sde: SDE) -> None:
    seen = Observation(Masking(torch.tensor([True, False])), torch.tensor([0.3, 0.0]), 0.5)
    run = Twisted(particles=16, steps=4, groups=2, threshold=0.9, kernel=kernel)

    def compute(device: torch.device) -> list[Any]:
        free = ClassifierFreeGuidance(perceptron(sde, classes=2), 0.5).to(device)
        of_law = run(MMPS(gaussian(sde).to(device), seen), seed=0)
        # Networks have Jacobians of any sign, so the tilted law is asked for without them.
        plain = replace(run, kernel=IsotropicKernel())
        return [of_law, plain(free, seed=0, label=torch.tensor([0, 1]))]

    check(compute, rtol=1e-3)


def test_conditions() -> None:
    def compute(device: torch.device) -> list[Any]:
        model = perceptron(VPSDE(), conditions={"label": 3}).to(device)
        x, cond = points(device), {"label": torch.eye(3, device=device)}
        likelihood = Likelihood(1, rtol=0.1, atol=0.1)
        samples = ProbabilityFlow(rtol=0.5, atol=0.5)(model, (3, 2), seed=0, **cond)
        return [samples, likelihood(model, x, seed=0, **cond)]

    check(compute, rtol=1e-3)


@by_name("sampler", [DDIM(steps=5), ProbabilityFlow(rtol=0.5, atol=0.5)])
def test_trajectories(sampler: Sampler) -> None:
    def compute(device: torch.device) -> list[Any]:
        model = perceptron(VPSDE()).to(device)
        latent = sampler.latent(model, (3, 2), seed=0)
        samples, way = sample_trajectory(model, sampler, latent, points=3, seed=0)
        way = [part.to(device) for part in (way.t, way.x, way.denoised)]  # from the CPU
        return [samples, way, slerp(latent, latent.flip(0), torch.linspace(0, 1, 3))]

    check(compute)


def test_augmentation_and_dequantisation() -> None:
    def compute(device: torch.device) -> list[Tensor]:
        streams = Streams.of(seed=0, batch=4, device=device)
        images = torch.linspace(-1, 1, 4 * 3 * 48, device=device).reshape(4, 3, 6, 8)
        found = list(GeometricAugmentation(0.9)(images, streams, draw=1))
        for kind in (UniformDequantisation(), TruncatedNormalDequantisation(0.2)):
            u = kind.sample(streams, (3, 6, 8))
            found += [u, kind.log_prob(u)]
        return found

    check(compute)
