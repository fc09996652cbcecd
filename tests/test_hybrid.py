"""The hybrid loss and learned variances: laws, exact zeros, and the gap that they close."""

import math

import pytest
import torch
from torch import nn

from scoresde import (
    VPSDE,
    DiscreteVP,
    GaussianModel,
    InputError,
    NoiseParametrisation,
    ScoreModel,
)
from scoresde.codec import DiscretisedGaussian, GaussianDecoder
from scoresde.likelihood import (
    DiscreteBound,
    ForwardVariance,
    LearnedRange,
    PosteriorVariance,
)
from scoresde.likelihood.discrete import consistency_term, reconstruction_term
from scoresde.loss import BoundLoss, HybridLoss
from scoresde.model import ChainIndex
from scoresde.nn import MLP, Architecture, OutputSkip, UNet
from scoresde.sample import AncestralPredictor, ChainPredictor, PredictorCorrector
from scoresde.sde import LinearBetas
from scoresde.times import ChainTimes, LowDiscrepancy, UniformTimes

T, C = 100, 0.25
CHAIN = DiscreteVP(LinearBetas(steps=T))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network_of(shape=(2,), **options):
    torch.manual_seed(0)
    net = MLP(shape, width=16, depth=1, output_heads=2, **options)
    nn.init.normal_(net.linear_out.weight, std=0.3)  # it starts as zero
    return net


def model_of(sde=CHAIN):
    return ScoreModel(network_of(), sde).double()


class Exact(nn.Module):
    """The exact noise of N(0, C I), and a head that is a function of the level, or given."""

    def __init__(self, sde=CHAIN, head=None):
        super().__init__()
        self.sde = sde
        self.head = head or MLP(1, width=32, depth=1)

    def forward(self, x, c):
        t = self.sde.time_of_index(c)
        variance = self.sde.alpha(t) ** 2 * C + self.sde.sigma(t) ** 2
        mean = (self.sde.sigma(t) / variance).to(x)[:, None] * x
        head = self.head((c / T)[:, None].to(x), c.to(x) / T)
        return torch.cat((mean, head.expand_as(x)), 1)


def exact(head=None):
    return ScoreModel(Exact(head=head), CHAIN, NoiseParametrisation(None), ChainIndex())


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x, c):
        return self.value.expand(len(x), 1)


class Variances:
    """The numbers of every step i >= 1 of a chain on N(0, C), in closed form."""

    def __init__(self, sde):
        betas = torch.from_numpy(sde.betas())
        bars = (1 - betas).cumprod(0)
        bar, before, self.beta = bars[1:], bars[:-1], betas[1:]
        total = bars * C + 1 - bars
        self.posterior = self.beta * (1 - before) / (1 - bar)
        self.true = total[:-1] - (1 - self.beta) * total[:-1] ** 2 / total[1:]
        gain = before * self.beta**2 / (1 - bar) ** 2
        self.error = gain * (C - bar * C**2 / total[1:])

    def term(self, v):
        """The expected divergence of each step with the variances v, in nats a dimension."""
        ratio = self.posterior / v
        return 0.5 * (ratio - 1 - torch.log(ratio) + self.error / v)


STEPS = Variances(CHAIN)


# --- Networks with a second head -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 7, 9)])
def test_networks_return_twice_the_channels(shape):
    nets = [MLP(shape, width=8, output_heads=2)]
    if len(shape) > 1:
        nets.append(UNet(shape, 8, blocks=1, architecture=Architecture(output_heads=2)))
    for net in nets:
        x = torch.randn(4, *shape)
        assert net(x, torch.zeros(4)).shape == (4, 2 * shape[0], *shape[1:])
        found = ScoreModel(net, CHAIN).predict(x, torch.tensor(0.5))
        assert found.noise.shape == found.data.shape == found.head.shape == x.shape


def test_the_first_half_is_the_mean_and_one_pass_says_all():
    model, x, t = model_of(), normal(5, 2), torch.full((5,), 0.3, dtype=torch.float64)
    found = model.predict(x, t)
    torch.testing.assert_close(found.noise, model.noise(x, t), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.data, model.denoise(x, t), rtol=1e-14, atol=0)
    alone = ScoreModel(lambda y, c: model.network(y, c)[:, :2], CHAIN)
    torch.testing.assert_close(alone.noise(x, t), found.noise, rtol=1e-14, atol=0)
    scaled = model.parametrisation.scale_in(CHAIN.alpha(t), CHAIN.sigma(t))[:, None] * x
    label = model.noise_label(CHAIN, t)
    assert torch.equal(model.network(scaled, label)[:, 2:], found.head)


def test_a_network_of_one_head_has_none():
    assert (
        ScoreModel(MLP(2, width=8), CHAIN).predict(torch.ones(3, 2), torch.tensor(0.5)).head
        is None
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MLP(2, output_heads=2, outputs=5), "output_heads must be 1 .* got 2"),
        (
            lambda: Architecture(output_heads=2, output_pyramid=OutputSkip()),
            r"output_heads must be 1 .* got 2",
        ),
        (lambda: Architecture(output_heads=0), "output_heads.*0"),
        (lambda: HybridLoss(scale=-1.0), r"scale .*-1\.0"),
        (
            lambda: HybridLoss(variance=PosteriorVariance()),
            "variance .*LearnedRange.*PosteriorVariance",
        ),
        (lambda: HybridLoss(decoder=3), r"decoder .*\b3\b"),
        (lambda: HybridLoss().check(ScoreModel(network_of(), VPSDE())), "sde .*DiscreteVP.*VPSDE"),
        (lambda: HybridLoss(times=UniformTimes()).check(model_of()), "t .*ChainTimes"),
        (
            lambda: HybridLoss()(ScoreModel(MLP(2, width=8), CHAIN), torch.zeros(3, 2)),
            "network .*output_heads=2",
        ),
        (
            lambda: HybridLoss()(model_of(), normal(3, 2), t=torch.tensor(0.505)),
            r"\(i \+ 1\) / 100 .*0\.505",
        ),
        (
            lambda: LearnedRange()(
                GaussianModel(mean=[0.0], std=1.0, sde=CHAIN),
                torch.zeros(1, 1),
                torch.tensor(0.5),
                torch.tensor(0.4),
            ),
            "model .*ScoreModel .*GaussianModel",
        ),
        (lambda: ChainPredictor(0.5), "variance must be .* got 0.5.*AncestralPredictor"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


# --- The learned range ---------------------------------------------------------------------------


def test_the_range_ends_at_the_two_fixed_variances():
    x, t = normal(4, 2), torch.tensor([0.02, 0.2, 0.5, 1.0], dtype=torch.float64)
    s = t - 1 / T
    for value, kind in ((-1.0, PosteriorVariance()), (1.0, ForwardVariance())):
        model = exact(Constant(value))
        data, v = LearnedRange().step(model, x, t, s)
        torch.testing.assert_close(v, kind(model, x, t, s).expand_as(x), rtol=1e-12, atol=0)
        torch.testing.assert_close(data, model.denoise(x, t))
    ends = [kind(model, x, t, s) for kind in (PosteriorVariance(), ForwardVariance())]
    middle = LearnedRange()(exact(Constant(0.0)), x, t, s)
    torch.testing.assert_close(middle, (ends[0] * ends[1]).sqrt().expand_as(x))


@pytest.mark.parametrize(
    ("value", "kind"), [(-1.0, PosteriorVariance()), (1.0, ForwardVariance())]
)
def test_the_discrete_bound_takes_it(value, kind):
    x = 0.5 * normal(3, 2)
    one = DiscreteBound(None, variance=LearnedRange())(exact(Constant(value)), x, seed=0)
    two = DiscreteBound(None, variance=kind)(exact(Constant(value)), x, seed=0)
    torch.testing.assert_close(one.terms, two.terms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.log_prob, two.log_prob)


# --- The loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, DiscretisedGaussian(17)], ids=["real", "levels"])
def test_the_loss_is_the_sum_of_its_terms_written_out(decoder):
    model, noise = model_of(), normal(6, 2, seed=1)
    x = (torch.randint(0, 17, (6, 2)).double() + 0.5) / 8.5 - 1
    index = torch.tensor([0, 1, 2, 50, 98, 99])
    t = CHAIN.time_of_index(index)
    state, s = CHAIN.perturb(x, t, noise), t - 1 / T
    simple = (model.noise(state, t) - noise).square().mean(1)
    terms = []
    for i in range(len(x)):
        row = slice(i, i + 1)
        if index[i] == 0:
            known = decoder or GaussianDecoder()
            args = model, x[row], state[row], t[i], known, LearnedRange()
            terms.append(reconstruction_term(*args))
        else:
            terms.append(consistency_term(model, x[row], state[row], t[i], s[i], LearnedRange()))
    vb = T * torch.cat(terms) / (2 * math.log(2))
    found = HybridLoss(0.01, decoder).terms(model, x, t, noise)
    torch.testing.assert_close(found.parts["simple"], simple, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.parts["vb"], vb, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.value, simple + 0.01 * vb, rtol=1e-9, atol=0)
    alone = BoundLoss(decoder, LearnedRange())(model, x, t, noise)
    torch.testing.assert_close(alone, vb, rtol=1e-9, atol=0)


def test_no_gradient_of_the_bound_reaches_the_mean():
    """The weights of the first head, with and without the second term, in exact arithmetic."""
    model, x = model_of(), normal(64, 2)
    found = []
    for scale in (0.0, 1000.0):
        model.zero_grad()
        HybridLoss(scale)(model, x, seed=0).sum().backward()
        found.append(model.network.linear_out.weight.grad.clone())
    assert torch.equal(found[0][:2], found[1][:2])
    assert float(found[0][2:].abs().max()) == 0 < float(found[1][2:].abs().max())
    # Of the bound alone: exactly zero where the mean is held, and not where it is not.
    t = CHAIN.time_of_index(torch.arange(64))
    output = torch.zeros(64, 4, dtype=torch.float64, requires_grad=True)
    fixed = ScoreModel(lambda y, c: output + 0 * y.repeat(1, 2), CHAIN)
    noise = normal(64, 2, seed=1)
    (HybridLoss(1.0)(fixed, x, t, noise) - HybridLoss(0.0)(fixed, x, t, noise)).sum().backward()
    assert float(output.grad[:, :2].abs().max()) == 0
    assert bool((output.grad[1:, 2:] != 0).all())
    assert bool((output.grad[0] == 0).all())  # the step to the data has no learned variance


def test_gradients_are_finite_at_every_step():
    model, x = model_of(), normal(T, 2)
    value = HybridLoss(1.0)(model, x, CHAIN.time_of_index(torch.arange(T)), normal(T, 2, seed=1))
    value.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_mean_over_steps_is_the_bound():
    """T times one drawn step, in bits a dimension, estimates the sum of all steps."""
    model, count = exact(Constant(0.0)), 1000
    x, noise = math.sqrt(C) * normal(T * count, 2), normal(T * count, 2, seed=1)
    t = CHAIN.time_of_index(torch.arange(T)).repeat(count)
    vb = HybridLoss().terms(model, x, t, noise).parts["vb"].reshape(count, T)
    v = torch.sqrt(STEPS.posterior * STEPS.beta)
    bar, variance = float(CHAIN.alpha(0.01)) ** 2, float(CHAIN.sigma(0.01)) ** 2
    error = C - bar * C**2 / (bar * C + variance)
    first = 0.5 * (math.log(2 * math.pi * variance) + error / variance)
    expected = (first + float(STEPS.term(v).sum())) / math.log(2)
    spread = float((vb.var(0) / count).sum().sqrt()) / T
    assert abs(float(vb.mean()) - expected) < 4 * spread
    assert spread < 0.05


def test_learned_variances_close_the_gap():
    """T = 100 on N(0, 0.25) with the exact mean: the head learns the true reverse variances.

    The gaps are those of the bound from the entropy, in closed form, in nats a dimension.
    """
    torch.manual_seed(0)
    model = exact()
    loss, steps = HybridLoss(scale=1.0, times=LowDiscrepancy(ChainTimes())), 600
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = math.sqrt(C) * torch.randn(256, 16, generator=generator)
        optimiser.zero_grad()
        loss(model, x, seed=step).mean().backward()
        optimiser.step()
        schedule.step()
    t = CHAIN.time_of_index(torch.arange(1, T))
    with torch.no_grad():
        v = LearnedRange()(model, torch.zeros(T - 1, 1), t, t - 1 / T)[:, 0].double()
    least = STEPS.term(STEPS.true).sum()
    gaps = {
        name: float(STEPS.term(value).sum() - least)
        for name, value in {"forward": STEPS.beta, "posterior": STEPS.posterior, "v": v}.items()
    }
    assert gaps["forward"] < gaps["posterior"]
    assert 0 <= gaps["v"] <= 0.02 * gaps["forward"]  # 0.00007 of 0.01096 measured


# --- Sampling ------------------------------------------------------------------------------------


def test_the_chain_with_the_true_variances_samples_the_data():
    """With the exact reverse variance the law of the chain is that of the data's first state."""
    share = torch.log(STEPS.true / STEPS.posterior) / torch.log(STEPS.beta / STEPS.posterior)

    class Table(nn.Module):
        def forward(self, x, c):
            row = ((c * T).round().long() - 1).clamp(min=0)
            return (2 * share[row] - 1)[:, None]

    model = exact(Table())
    chain = PredictorCorrector(steps=T - 1, predictor=ChainPredictor(), corrector=None)
    out = chain(model, latent=normal(20_000, 1), seed=0)
    assert int(out.nfe[0]) == T - 1
    bar = float(CHAIN.alpha(0.01)) ** 2
    # Standard normal latents instead of N(0, bar c + 1 - bar): 6e-6 at the other end.
    expected = bar * C + 1 - bar
    assert abs(float(out.x.var()) / expected - 1) < 4 * math.sqrt(2 / 20_000)
    small = PredictorCorrector(
        steps=T - 1, predictor=ChainPredictor(PosteriorVariance()), corrector=None
    )(model, latent=normal(20_000, 1), seed=0)
    assert abs(float(small.x.var()) / expected - 1) > 4 * math.sqrt(2 / 20_000)


def test_fixed_variances_sample_as_the_ancestral_predictor_does():
    model, latent = exact(Constant(0.0)), normal(16, 1)
    for mine, theirs in (
        (ChainPredictor(PosteriorVariance()), AncestralPredictor(0.0)),
        (ChainPredictor(ForwardVariance()), AncestralPredictor(1.0)),
        (ChainPredictor(), AncestralPredictor(0.5)),
    ):
        one, two = (
            PredictorCorrector(steps=T - 1, predictor=p, corrector=None)(
                model, latent=latent, seed=0
            )
            for p in (mine, theirs)
        )
        torch.testing.assert_close(one.x, two.x, rtol=1e-8, atol=1e-10)
