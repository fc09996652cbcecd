"""The way of samples, and what lies between latents."""

import math

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianMixtureModel, InputError
from scoresde.sample import (
    DDIM,
    EulerMaruyama,
    GottaGoFast,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    sample_trajectory,
    slerp,
)


def mixture(sde):
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).double()
    return GaussianMixtureModel([0.3, 0.7], means, [0.3, 0.2], sde).double()


@pytest.mark.parametrize(
    "sampler",
    [
        EulerMaruyama(100),
        PredictorCorrector(7),
        Heun(33),
        DDIM(3),
        ProbabilityFlow(1e-4, 1e-4),
        GottaGoFast(0.2, 0.2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=repr)
def test_a_way_leads_from_the_latent_to_the_sample(sde, sampler):
    model = mixture(sde)
    latent = sampler.latent(model, (3, 2), seed=5)
    samples, way = sample_trajectory(model, sampler, latent, points=6, seed=5)
    plain = sampler(model, (3, 2), seed=5)
    assert torch.equal(samples.x, plain.x)
    assert torch.equal(samples.nfe, plain.nfe)
    assert torch.equal(way.x[0], latent)
    assert torch.equal(way.x[-1], samples.x)
    assert 2 <= len(way.t) <= 6
    assert bool((way.t.diff(dim=0) <= 0).all())
    for t, x, denoised in zip(way.t, way.x, way.denoised, strict=True):
        torch.testing.assert_close(denoised, model.denoise(x, t))


@pytest.mark.parametrize(("steps", "points"), [(100, 5), (1000, 11), (7, 4), (3, 9)])
def test_the_points_are_even_over_the_steps(steps, points):
    model, sampler = mixture(VPSDE()), DDIM(steps)
    _, way = sample_trajectory(
        model, sampler, sampler.latent(model, (1, 2), seed=0), points=points
    )
    place = [round(float(steps * (1 - t) / (1 - 1e-3))) for t in way.t[:, 0]]
    count = min(points, steps + 1)
    wanted = [i * steps / (count - 1) for i in range(count)]
    assert len(place) == count
    # No further off than the distance of those that are kept.
    assert max(abs(p - w) for p, w in zip(place, wanted, strict=True)) <= steps / (4 * points) + 1


def test_a_way_of_one_point_is_refused():
    with pytest.raises(InputError, match=r"points.*1"):
        sample_trajectory(mixture(VPSDE()), DDIM(3), torch.zeros(1, 2), points=1)


def test_an_arc_keeps_the_law_of_the_latents():
    a, b = torch.randn(2, 50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    between = slerp(a, b, torch.linspace(0, 1, 5))
    assert between.shape == (50, 5, 3, 32, 32)
    torch.testing.assert_close(between[:, 0], a)
    torch.testing.assert_close(between[:, -1], b)
    error = 4 / math.sqrt(2 * 50 * 3072)
    assert between.std(dim=(0, 2, 3, 4)) == pytest.approx([1.0] * 5, rel=error)


def test_an_arc_of_parallel_latents_is_the_line():
    a = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(
        slerp(a, 3 * a, torch.tensor([0.25, 0.5])), torch.stack([1.5 * a, 2 * a], 1)
    )


def test_latents_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match=r"\(2, 3\) and \(3, 3\)"):
        slerp(torch.zeros(2, 3), torch.zeros(3, 3), torch.tensor([0.5]))
