"""Models that hold something for each example, where solvers select rows of a batch."""

import pytest
import torch

from scoresde import VPSDE, GaussianModel, Likelihood, ScoreFunction
from scoresde.guidance import Autoguidance, Clipped, DynamicThreshold
from scoresde.passes import count_pass
from scoresde.sample import GottaGoFast, ProbabilityFlow


class OwnMeans(ScoreFunction):
    """The exact model of a Gaussian with the std 0.2 around a mean of each example's own."""

    def __init__(self, means):
        super().__init__()
        self.register_buffer("means", means)
        self.sde = VPSDE()

    def take(self, rows):
        return OwnMeans(self.means[rows])

    def noise(self, x, t, **cond):
        count_pass(len(x))
        alpha, sigma = (
            part.reshape(-1, 1) if part.ndim else part
            for part in (self.sde.alpha(t), self.sde.sigma(t))
        )
        return sigma * (x - alpha * self.means) / ((0.2 * alpha) ** 2 + sigma**2)

    def denoise(self, x, t, **cond):
        raise NotImplementedError

    def score(self, x, t, **cond):
        raise NotImplementedError


class Doubled(OwnMeans):
    """The same, with the means as they were after any selection: wrong on purpose."""

    def take(self, rows):
        return self


MEANS = torch.tensor([[-4.0, 0.0], [0.1, 0.0], [3.0, 2.0], [0.0, 0.0], [9.0, 1.0], [0.0, 0.2]])
MEANS = MEANS.double()
WRAPPED = {
    "plain": lambda model: model,
    "clipped": lambda model: Clipped(model, -100.0, 100.0),
    "threshold": lambda model: DynamicThreshold(Clipped(model, -100.0, 100.0), 1.0, -90.0, 90.0),
    "guided": lambda model: Autoguidance(model, model, 2.0),
    "guided each": lambda model: Autoguidance(model, model, torch.arange(6).double()),
}


def alone(sampler, i):
    """Example i by the exact model of its own mean."""
    exact = GaussianModel(MEANS[i], 0.2, VPSDE())
    return sampler(exact, (1, 2), seed=0, seeds=[i]).x[0]


@pytest.mark.parametrize("wrap", list(WRAPPED.values()), ids=list(WRAPPED))
@pytest.mark.parametrize(
    "sampler",
    [ProbabilityFlow(1e-6, 1e-6), GottaGoFast(0.1, 0.01)],
    ids=lambda s: type(s).__name__,
)
def test_a_packed_batch_keeps_each_examples_own(wrap, sampler):
    x = sampler(wrap(OwnMeans(MEANS)), (6, 2), seed=0).x
    for i in range(6):
        torch.testing.assert_close(x[i], alone(sampler, i), rtol=0, atol=1e-4)


def test_a_likelihood_selects_them_too():
    model, x = OwnMeans(MEANS), MEANS + 0.1
    exactly = Likelihood("exact", rtol=1e-7, atol=1e-7)
    together = exactly(model, x).log_prob
    single = [
        exactly(GaussianModel(MEANS[i], 0.2, VPSDE()), x[i : i + 1]).log_prob for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(single), rtol=0, atol=1e-5)


def test_a_model_that_holds_nothing_is_itself():
    exact, rows = GaussianModel(torch.zeros(2), 1.0, VPSDE()), torch.tensor([1, 0])
    clipped = Clipped(exact)
    assert exact.take(rows) is exact
    assert clipped.take(rows) is clipped
    assert (exact.shape, clipped.shape, OwnMeans(MEANS).shape) == ((2,), (2,), None)


def test_the_batch_is_packed_at_all():
    """So that the tests above see a selection: without it the wrong means meet the rows."""
    with pytest.raises(RuntimeError):
        ProbabilityFlow(1e-6, 1e-6)(Doubled(MEANS), (6, 2), seed=0)
