"""The design of noise levels: its published numbers, and the law of the chain that it makes."""

import math
from dataclasses import replace

import pytest
import torch

from scoresde import VESDE, GaussianModel, InputError
from scoresde.data import Dataset, two_moons
from scoresde.loss import NoiseDesign
from scoresde.loss.design import largest_distance, level_ratio
from scoresde.times import LevelTimes


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_published_numbers():
    """CIFAR-10: 50 to 0.01 in 3072 dimensions."""
    x = torch.zeros(3, 3, 32, 32)
    x[0], x[1] = 25 / math.sqrt(3072), -25 / math.sqrt(3072)
    design = NoiseDesign.of(x)
    assert design.sigma_max == pytest.approx(50, abs=1e-5)
    assert (design.sigma_min, design.steps, design.ema) == (0.01, 5, 0.999)
    assert abs(design.levels - 219) <= 1
    published = NoiseDesign(50.0, 0.01, 232)
    assert abs(published.step_size - 6.19e-6) < 0.02e-6
    assert level_ratio(3072) == pytest.approx(1.0398, abs=5e-5)


def test_the_step_is_the_best_one():
    """Against all steps, by the formula of the paper with its own symbols."""
    for steps, levels in ((1, 20), (5, 232), (100, 10)):
        design = NoiseDesign(50.0, 0.01, levels, steps)
        s = design.sigma_min

        def g(eps, steps=steps, s=s, r=design.ratio):
            p = (1 - eps / s**2) ** (2 * steps)
            k = 2 * eps / (s**2 - s**2 * (1 - eps / s**2) ** 2)
            return p * (r**2 - k) + k

        best = min(abs(g(s**2 * u) - 1) for u in torch.linspace(1e-5, 0.999, 20_000).tolist())
        assert abs(g(design.step_size) - 1) <= best + 1e-12
        assert design.variance_ratio == pytest.approx(g(design.step_size))


def test_the_ratio_solves_its_equation():
    phi = torch.special.ndtr
    for d in (5, 64, 784, 100_000):
        r, root = torch.tensor(level_ratio(d), dtype=torch.float64), math.sqrt(2 * d)
        share = phi(root * (r - 1) + 3 * r) - phi(root * (r - 1) - 3 * r)
        assert float(share) == pytest.approx(0.5, abs=1e-9)
    assert level_ratio(4) == math.inf
    assert NoiseDesign.of(normal(100, 2)).ratio == pytest.approx(1.4, rel=0.02)


def test_the_largest_distance_is_exact_over_blocks():
    x = normal(2500, 3).double()
    x[3], x[2400] = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 1.0]]).double()
    expected = max(float((x - x[i]).norm(dim=1).max()) for i in (3, 2400))
    assert largest_distance(x) == pytest.approx(expected, rel=1e-12)
    assert largest_distance(x + 1e6) == pytest.approx(expected, rel=1e-8)


def test_a_data_set_is_taken_in_model_units():
    raw = 1e4 + 300 * normal(400, 2)
    data = Dataset.of("far", [raw] * 3)
    x = data.encode(raw, centre=True)
    assert NoiseDesign.of(data).sigma_max == pytest.approx(largest_distance(x), rel=1e-6)
    moons = two_moons(count=6000)
    some, more = (NoiseDesign.of(moons, examples=n).sigma_max for n in (50, 4000))
    assert some < more < 1.4 * some


def test_its_parts_have_its_levels():
    design = NoiseDesign(20.0, 0.05, 12, 7)
    assert design.sde() == VESDE(0.05, 20.0)
    assert design.loss().times == LevelTimes(12)
    sampler = design.langevin()
    times = sampler.grid(sampler.steps, design.sde(), sampler.eps)
    sigmas = design.sde().sigma(times)
    assert len(sigmas) == 12
    assert torch.allclose(sigmas[:-1] / sigmas[1:], torch.tensor(design.ratio).double())
    exact = GaussianModel(mean=torch.zeros(3), std=1.0, sde=design.sde())
    assert int(sampler(exact, shape=(2, 3), seed=0).nfe[0]) == 12 * 7 + 1  # and the denoising


def test_the_chain_has_the_variance_of_its_recursion():
    """Around one example: v <- q^(2T) v + (1 - q^(2T)) k sigma_i^2, level by level."""
    design = NoiseDesign(5.0, 0.01, 40, 3)
    point = GaussianModel(mean=torch.zeros(1), std=1e-4, sde=design.sde())
    chain = replace(design.langevin(), final_denoise=False)
    x = chain(point, shape=(20_000, 1), seed=0).x
    v, q = design.sigma_max**2, 1 - design.step_size / design.sigma_min**2
    k, forgotten = 2 / (1 + q), q ** (2 * design.steps)
    for i in range(design.levels):
        sigma = design.sigma_max / design.ratio**i
        v = forgotten * v + (1 - forgotten) * k * sigma**2
    error = math.sqrt(2 / len(x))  # relative, of a variance
    assert float(x.square().mean()) == pytest.approx(v, rel=4 * error)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: NoiseDesign.of([[1.0]]), "data"),
        (lambda: NoiseDesign.of(torch.zeros(5, 2)), "equal"),
        (lambda: NoiseDesign.of(normal(50, 2), largest_ratio="x"), "largest_ratio"),
        (lambda: NoiseDesign.of(normal(50, 2), examples=1), "examples"),
        (lambda: NoiseDesign.of(1e4 + normal(50, 2)), "model units"),
        (lambda: NoiseDesign.of(normal(50, 2), sigma_min=100.0), "sigma_min"),
        (lambda: NoiseDesign.of(normal(50, 2), sigma_min="small"), "sigma_min"),
        (lambda: NoiseDesign.of(normal(50, 2), largest_ratio=1.0), "largest_ratio"),
        (lambda: NoiseDesign.of(normal(50, 2), examples=0), "examples"),
        (lambda: NoiseDesign.of(torch.zeros(5, 2, dtype=torch.uint8)), r"\bx\b.*uint8"),
        (lambda: NoiseDesign.of(torch.full((5, 2), math.nan)), "finite"),
        (lambda: NoiseDesign(1.0, 0.1, 1), "levels"),
        (lambda: NoiseDesign(0.1, 1.0, 5), "sigma_min"),
        (lambda: NoiseDesign(1.0, 0.1, 5, 0), "steps"),
    ],
)
def test_what_cannot_be_designed_is_refused(make, name):
    with pytest.raises(InputError, match=name):
        make()
