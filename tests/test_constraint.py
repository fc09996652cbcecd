"""Constraints: what takes the place of a state after every step, in samplers of every kind."""

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianModel, InputError, RectifiedFlow
from scoresde.sample import (
    DDIM,
    DEIS,
    IPNDM,
    SEEDS,
    AnnealedLangevinDynamics,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSDE,
    Euler,
    EulerMaruyama,
    GottaGoFast,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    ReferencePredictorCorrector,
    Restart,
    TorchSDE,
    UniPC,
)
from scoresde.times import LogSNRGrid

KINDS = {
    **{kind.__name__: kind for kind in (DDIM, DEIS, IPNDM, SEEDS, DPMSolver, DPMSolverPP)},
    **{kind.__name__: kind for kind in (DPMSolverPPSDE, Euler, EulerMaruyama, Heun, UniPC)},
    **{kind.__name__: kind for kind in (PredictorCorrector, ReferencePredictorCorrector)},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def served(kind):
    """A model that a sampler of few steps serves: the reference has none of VP."""
    return exact(VESDE(0.01, 10.0) if kind is ReferencePredictorCorrector else VPSDE())


def exact(sde=None, n=3):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).double()
    return GaussianModel(
        torch.linspace(-1, 1, n).double(),
        sde=VPSDE() if sde is None else sde,
        covariance=a @ a.T / 4 + 0.2 * torch.eye(n).double(),
    )


class Pin:
    """Holds the first feature at a value, and remembers how it was called."""

    def __init__(self, value=0.3):
        self.value = value
        self.calls = []

    def __call__(self, x, t, noise):
        self.calls.append((x.clone(), t, noise(x)))
        x = x.clone()
        x[:, 0] = self.value
        return x


@each_kind
def test_it_is_called_after_every_step_and_holds(kind):
    pin = Pin()
    x = kind(steps=6, constraint=pin, final_denoise=False)(served(kind), (4, 3), seed=0).x
    assert x[:, 0].tolist() == [0.3] * 4
    corrections = 5 if kind is UniPC else 0
    assert len(pin.calls) == 6 + corrections


@each_kind
def test_a_constraint_that_changes_nothing_changes_nothing(kind):
    plain = kind(steps=6, final_denoise=False)
    same = kind(steps=6, final_denoise=False, constraint=lambda x, t, noise: x)
    a, b = (sampler(served(kind), (4, 3), seed=0) for sampler in (plain, same))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.nfe, b.nfe)


@pytest.mark.parametrize("sampler", [ProbabilityFlow, GottaGoFast, Restart])
def test_adaptive_and_repeating_samplers_hold_it_too(sampler):
    pin = Pin()
    x = sampler(constraint=pin, final_denoise=False)(exact(), (4, 3), seed=0).x
    assert x[:, 0].tolist() == [0.3] * 4


def test_the_final_denoising_is_a_step_to_time_zero():
    pin = Pin()
    x = DDIM(4, constraint=pin, final_denoise=True)(exact(), (2, 3), seed=0).x
    assert x[:, 0].tolist() == [0.3] * 2
    assert float(pin.calls[-1][1]) == 0


def test_times_are_those_of_the_grid_and_noise_is_each_samples_own():
    pin, sampler = Pin(), DDIM(4)
    out = DDIM(4, constraint=pin)(exact(), (3, 3), seed=7)
    times = sampler.times(VPSDE(), sampler.check(exact()))
    assert [float(t) for _, t, _ in pin.calls] == times[1:].tolist()
    alone = Pin()
    single = DDIM(4, constraint=alone)(exact(), (1, 3), seed=7, seeds=[2])
    torch.testing.assert_close(single.x[0], out.x[2])
    for (_, _, together), (_, _, own) in zip(pin.calls, alone.calls, strict=True):
        assert torch.equal(together[2], own[0])
    draws = torch.stack([z for _, _, z in pin.calls])
    assert len(draws.flatten(1).unique(dim=0)) == 4  # fresh at every step


def test_unipc_constrains_its_corrected_state_with_the_noise_of_the_same_step():
    pin = Pin()
    UniPC(5, LogSNRGrid(), constraint=pin)(exact(), (2, 3), seed=0)
    times = [float(t) for _, t, _ in pin.calls]
    assert times == sorted(times, reverse=True)
    again = [i for i in range(1, len(times)) if times[i] == times[i - 1]]
    assert len(again) == 4
    for i in again:
        assert torch.equal(pin.calls[i][2], pin.calls[i - 1][2])


@pytest.mark.parametrize("sampler", [ProbabilityFlow(1e-5, 1e-5), GottaGoFast(0.3, 0.1)], ids=repr)
def test_in_an_adaptive_solve_a_sample_depends_on_its_batch_in_nothing(sampler):
    def noisy(x, t, noise):
        x = x.clone()
        x[:, 0] = 0.2 + 0.01 * noise(x)[:, 0]
        return x

    kind = type(sampler)
    held = kind(sampler.rtol, sampler.atol, constraint=noisy)
    together = held(exact(), (6, 3), seed=1)
    alone = held(exact(), (1, 3), seed=1, seeds=[4])
    torch.testing.assert_close(alone.x[0], together.x[4], rtol=0, atol=1e-9)
    assert int(alone.nfe) == int(together.nfe[4])


def test_an_adaptive_solve_evaluates_the_field_anew_where_the_state_was_changed():
    """One pass more for every accepted step but the last, and none of an old state."""
    plain = ProbabilityFlow(1e-5, 1e-5)(exact(), (1, 3), seed=0)
    accepted = []
    ProbabilityFlow(1e-5, 1e-5)(
        exact(), (1, 3), seed=0, callback=lambda s: accepted.append(float(s.t))
    )
    steps = len(set(accepted)) - 1
    same = ProbabilityFlow(1e-5, 1e-5, constraint=lambda x, t, noise: x)(exact(), (1, 3), seed=0)
    torch.testing.assert_close(same.x, plain.x, rtol=0, atol=1e-12)
    assert int(same.nfe - plain.nfe) == steps - 1


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.01, 20.0), RectifiedFlow()], ids=repr)
def test_a_feature_replaced_by_its_own_noised_law_leaves_the_others_theirs(sde):
    """With independent features: the pinned one ends at its value, the others with their law.

    Within four standard errors of 4000 samples and 2 % of discretisation.
    """
    n, mean, std = 4000, torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 1.2]).double()
    model = GaussianModel(mean, std, sde)

    def replaced(x, t, noise):
        known = torch.full_like(x, 0.8)
        noised = sde.perturb(known, t, noise(x))
        return torch.cat([noised[:, :1], x[:, 1:]], 1)

    sampler = EulerMaruyama(250, LogSNRGrid(), constraint=replaced, final_denoise=True)
    x = sampler(model, (n, 2), seed=0).x
    left = float(sde.sigma(torch.tensor(0.0)))  # at t = 0, of VE
    assert float((x[:, 0] - 0.8).abs().max()) <= 5 * left + 1e-12
    assert abs(float(x[:, 1].mean()) + 1.0) < 1.2 * 4 / n**0.5 + 0.02
    assert float(x[:, 1].std()) == pytest.approx(1.2, rel=4 / (2 * n) ** 0.5 + 0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(4, constraint=3), "constraint.*3"),
        (lambda: TorchSDE(4, constraint=Pin()), "constraint"),
        (lambda: ProbabilityFlow(probes=2, constraint=Pin()), "probes.*constraint"),
        (
            lambda: ProbabilityFlow(method="dopri8", constraint=Pin())(exact(), (2, 3), seed=0),
            "dopri5",
        ),
        (
            lambda: DDIM(4, constraint=lambda x, t, noise: x[:1])(exact(), (2, 3), seed=0),
            r"constraint.*\(2, 3\).*\(1, 3\)",
        ),
        (lambda: DDIM(4, constraint=lambda x, t, noise: None)(exact(), (2, 3)), "NoneType"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_annealed_langevin_dynamics_take_it():
    x = AnnealedLangevinDynamics(4, constraint=Pin(), final_denoise=False)(
        exact(), (2, 3), seed=0
    ).x
    assert x[:, 0].tolist() == [0.3] * 2
