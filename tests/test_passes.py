"""Network evaluations are counted for the example that each row belongs to."""

import pytest
import torch
from torch import nn

from scoresde import (
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    ScoreFunction,
    ScoreModel,
    VariationalBound,
)
from scoresde.divergence import ColourProbing, Hutchinson
from scoresde.guidance import Clipped
from scoresde.model import Conditioned
from scoresde.nn import MLP
from scoresde.passes import count_pass, count_products, counted, counting, owned_by
from scoresde.sample import (
    DDIM,
    EulerMaruyama,
    GottaGoFast,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    TorchSDE,
    UniPC,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class Counted(nn.Module):
    """A network that counts the rows it sees, as the truth."""

    def __init__(self):
        super().__init__()
        self.inner = MLP(2, width=8, depth=1).double()
        self.rows = 0

    def forward(self, x, c, **cond):
        self.rows += len(x)
        return self.inner(x, c)


class Blend(ScoreFunction):
    """Half of each of two models, the second asked about a doubled batch as a guide would be."""

    def __init__(self, a, b, doubled=False):
        super().__init__()
        self.a, self.b, self.doubled = a, b, doubled

    @property
    def sde(self):
        return self.a.sde

    def noise(self, x, t, **cond):
        if self.doubled:
            rows = torch.arange(len(x)).repeat(2)
            with owned_by(rows):
                first, second = self.a.noise(x[rows], t[rows] if t.ndim else t).chunk(2)
            return 0.5 * (first + second)
        return 0.5 * (self.a.noise(x, t, **cond) + self.b.noise(x, t, **cond))

    def denoise(self, x, t, **cond):
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return (x - sigma * self.noise(x, t, **cond)) / alpha

    def score(self, x, t, **cond):
        return -self.noise(x, t, **cond) / self.sde.sigma(t)


def model():
    torch.manual_seed(0)
    return ScoreModel(Counted(), VPSDE())


def test_rows_count_for_their_owners_and_nobodys_for_none():
    with counting(3) as passes:
        count_pass(3)
        with owned_by(torch.tensor([2, 0, -1])):
            count_pass(3)
            with owned_by(torch.tensor([0, 0, 1, 2])):
                count_pass(4)
                count_products(4, times=5)
        count_products(3)
    assert passes.network.tolist() == [1 + 1 + 1, 1, 1 + 1 + 2]
    assert passes.products.tolist() == [5 + 1, 1, 10 + 1]


def test_a_batch_repeated_as_a_whole_has_the_same_owners():
    with counting(3) as passes:
        count_pass(6)
        with owned_by(torch.tensor([1, 2])):
            count_pass(4)
    assert passes.network.tolist() == [2, 4, 4]


def test_rows_that_are_not_wanted_count_for_nobody():
    """Also of repetitions of a batch, and of rows that have other owners."""
    wanted = torch.tensor([True, False, True, False, True, True])
    with counting(3) as passes:
        with counted(wanted):
            count_pass(6)
        with owned_by(torch.tensor([1, 2])), counted(wanted[:4]):
            count_pass(4)
            count_products(4)
        count_pass(3)
    assert passes.network.tolist() == [1 + 1, 1 + 2 + 1, 2 + 1]
    assert passes.products.tolist() == [0, 2, 0]


def test_rows_of_unknown_owners_are_refused():
    with counting(3), pytest.raises(InputError, match=r"rows.*\b3\b.*\b5\b"):
        count_pass(5)


def test_outside_of_a_count_nothing_is_counted():
    count_pass(5)
    count_products(7)
    with counting(2) as outer:
        with counting(2) as inner:
            count_pass(2)
        count_pass(2)
    assert (outer.network.tolist(), inner.network.tolist()) == ([1, 1], [1, 1])


FIXED = [
    (EulerMaruyama(7), 7),
    (DDIM(7), 7),
    (Heun(7), 14),
    (UniPC(7), 7),
    (UniPC(7, final_denoise=True), 8),
    (PredictorCorrector(7), 14),
    (TorchSDE(7), 7),
]


@pytest.mark.parametrize(("sampler", "passes"), FIXED, ids=repr)
def test_one_network_is_counted_as_often_as_it_runs(sampler, passes):
    one = model()
    out = sampler(one, (3, 2), seed=0)
    assert out.nfe.tolist() == [passes] * 3
    assert one.network.rows == 3 * passes
    assert out.vjps.tolist() == [0] * 3


@pytest.mark.parametrize(("sampler", "passes"), FIXED, ids=repr)
def test_a_model_of_two_counts_both(sampler, passes):
    assert sampler(Blend(model(), model()), (3, 2), seed=0).nfe.tolist() == [2 * passes] * 3
    doubled = Blend(model(), None, doubled=True)
    assert sampler(doubled, (3, 2), seed=0).nfe.tolist() == [2 * passes] * 3


@pytest.mark.parametrize("sampler", [ProbabilityFlow(1e-4, 1e-4), GottaGoFast(0.5, 0.2)], ids=repr)
def test_in_an_adaptive_solve_rows_at_rest_count_for_nobody(sampler):
    """So a count does not depend on the batch, whose rows end at different times."""
    mixture = GaussianMixtureModel([0.5, 0.5], 3 * normal(2, 2), [0.05, 0.9], VPSDE())
    together = sampler(mixture, (40, 2), seed=0).nfe
    alone = [int(sampler(mixture, (1, 2), seed=0, seeds=[i]).nfe) for i in range(6)]
    assert together[:6].tolist() == alone
    assert len(set(together.tolist())) > 1


def test_the_density_while_sampling_counts_its_products_apart():
    one = model()
    out = ProbabilityFlow(1e-3, 1e-3, probes=3)(one, (4, 2), seed=0)
    assert out.vjps.tolist() == (3 * out.nfe).tolist()


@pytest.mark.parametrize(("probes", "each"), [(3, 3), ("exact", 2), (ColourProbing(1), 1)])
def test_a_likelihood_counts_a_product_for_every_probe(probes, each):
    result = Likelihood(probes, rtol=1e-3, atol=1e-3)(model(), normal(4, 2), seed=0)
    assert result.vjps.tolist() == (each * result.nfe).tolist()


def test_more_sets_of_probes_count_for_the_examples_that_need_them():
    """Each example as alone, also where a part of the batch goes on."""
    mixture = GaussianMixtureModel([0.5, 0.5], 2 * normal(2, 4), [0.2, 0.9], VPSDE())
    x, target = mixture.sample(8, seed=0), Likelihood(Hutchinson(2), target_error=0.5)
    together = target(mixture, x, seed=0).nfe
    alone = [int(target(mixture, x[i : i + 1], seed=0, seeds=[i]).nfe) for i in range(8)]
    assert together.tolist() == alone
    assert len(set(alone)) > 1


def test_a_differentiable_likelihood_counts_its_second_pass():
    one, x = model(), normal(3, 2)
    plain = Likelihood("exact", rtol=1e-3, atol=1e-3)(one, x).nfe
    one.network.rows = 0
    twice = Likelihood("exact", rtol=1e-3, atol=1e-3, differentiable=True)(one, x)
    assert bool((twice.nfe > plain).all())
    assert int(twice.nfe.sum()) <= one.network.rows


def test_the_bound_and_the_exact_models_count():
    exact = GaussianModel(torch.zeros(2), 1.0, VPSDE())
    result = VariationalBound(draws=5, replicates=2)(exact, torch.zeros(3, 2), seed=0)
    assert result.nfe.tolist() == [12] * 3
    with counting(3) as passes:
        field, x, t = Conditioned(Clipped(exact)), torch.zeros(3, 2), torch.tensor(0.5)
        for view in (field.score, field.noise, field.denoise, field.velocity, field.reverse_drift):
            view(x, t)
        exact.log_prob(x, t)
    assert passes.network.tolist() == [5] * 3
