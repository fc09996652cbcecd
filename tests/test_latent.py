"""Models of latents: the bound and the joint loss against closed forms, and the program."""

import copy
import functools
import math

import numpy as np
import pytest
import torch

from scoresde import (
    VPSDE,
    GaussianModel,
    InputError,
    Likelihood,
    ScoreModel,
    VariationalBound,
    fit,
    load,
)
from scoresde.codec import (
    VAE,
    Affine,
    Autoencoder,
    GaussianEmission,
    GaussianEncoder,
    LatentCodec,
    LevelEmission,
)
from scoresde.data import Dataset
from scoresde.errors import OtherRunError
from scoresde.likelihood import LatentBound, prior_kl
from scoresde.loss import ELBO, DenoisingScoreMatching, Draw, LatentELBO
from scoresde.loss.latent import cross_entropy
from scoresde.model import LatentModel
from scoresde.nn import MLP, Dense
from scoresde.recipe import describe
from scoresde.sample import ProbabilityFlow, UniPC
from scoresde.sde import as_time
from scoresde.streams import Streams
from scoresde.tasks.evaluation import Draws, evaluate_likelihood
from scoresde.tasks.sampling import Drawing
from scoresde.train import Checkpoint, Training, train
from tests.test_autoencoder import EVIDENCE, MU, STD, N, W, X, diagonal

C, M = 0.6, 0.4  # of the normal prior that a diffusion model knows exactly
SIZE = 3


def encoded(mean, std):
    """A VAE whose latents have one normal law, whatever the example."""
    vae = VAE(
        GaussianEncoder(Dense([SIZE], [2 * SIZE], depth=0)),
        Dense([SIZE], [SIZE], depth=0),
        GaussianEmission(),
    ).double()
    layer = vae.encoder.network.layers[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias[:SIZE], layer.bias[SIZE:] = mean, math.log(std)
    return vae


def joint_points(n):
    """Pairs of noise, of the latents and of the diffusion: exact for quadratic functions."""
    points = torch.cat([torch.eye(2 * n), -torch.eye(2 * n)]).double() * math.sqrt(2 * n)
    return points[:, :n], points[:, n:]


def expected_cross_entropy(prior, vae, eps, nodes=64):
    """The expectation of the loss's cross entropy over latents, noise and times, by quadrature."""
    sde, (own, noise) = prior.sde, joint_points(SIZE)
    ends = sde.log_snr(torch.tensor([1.0, eps], dtype=torch.float64))
    places, weights = np.polynomial.legendre.leggauss(nodes)
    half = float(ends[1] - ends[0]) / 2
    lambdas = ends[0] + half * (torch.from_numpy(places) + 1)
    t = sde.time(lambdas)
    density = (sde.sigma(t) / sde.g(t)) ** 2 * half * torch.from_numpy(weights) / (1 - eps)
    z = vae.encoder.law(torch.zeros(1, SIZE).double()).sample(own)
    total = torch.zeros(()).double()
    for time, weight in zip(t, density, strict=True):
        value = cross_entropy(prior, z, Draw(time, noise, 1.0), eps)
        constant = cross_entropy(prior, z, Draw(time, noise, 0.0), eps)
        total = total + weight * (value - constant).mean()
    return (total + constant.mean()).detach(), z


@pytest.mark.parametrize(("mean", "std"), [(0.4, math.sqrt(C - 0.05)), (2.0, 0.5)])
def test_the_cross_entropy_is_that_of_normal_laws_with_the_priors_divergence(mean, std):
    eps = 1e-5
    sde = VPSDE(beta_min=0.1, beta_max=15.9)  # whose log-SNR ends at -8
    prior = GaussianModel(
        mean=torch.full((SIZE,), M, dtype=torch.float64), std=math.sqrt(C), sde=sde
    )
    found, z = expected_cross_entropy(prior, encoded(mean, std), eps)
    variance = std**2 + (mean - M) ** 2
    wanted = SIZE * 0.5 * (math.log(2 * math.pi * C) + variance / C)
    # The model starts at N(0, I) and not at p_1, which it never quite reaches.
    alpha, sigma = (float(c(as_time(1.0))) for c in (sde.alpha, sde.sigma))
    first = alpha**2 * C + sigma**2  # the variance of p_1
    around = alpha**2 * variance + sigma**2, alpha**2 * (std**2 + mean**2) + sigma**2
    wanted += SIZE * 0.5 * (around[1] - around[0] / first - math.log(first))
    ratio = float(torch.exp(-sde.log_snr(as_time(eps)))) / C
    # The last step takes the error at the cut-off for D; that of the exact model is known too.
    time, (_, noise) = as_time(eps), joint_points(SIZE)
    last = prior.noise(sde.perturb(z, time, noise), time) - noise
    exact = (found + 0.5 * (last.square().sum(1).mean() - SIZE)).detach()
    assert float(exact) == pytest.approx(wanted, abs=1e-8)
    assert float(found) == pytest.approx(wanted, abs=2 * SIZE * ratio * max(1, variance / C))
    without = exact - prior_kl(sde, z).mean().detach()
    assert abs(float(without) - wanted) > 5e-5


def test_the_joint_loss_is_the_bound_of_its_parts():
    torch.manual_seed(0)
    vae, prior = encoded(0.3, 0.5), GaussianModel(torch.zeros(SIZE).double(), 1.0, VPSDE())
    x, model = torch.randn(4, SIZE).double(), LatentModel(vae, prior)
    terms = LatentELBO().terms(model, x, seed=0)
    p = terms.parts
    total = p["cross_entropy"] - p["entropy"] - p["reconstruction"]
    torch.testing.assert_close(terms.value.detach(), total)
    # On average the cross entropy with N(0, I) is the one in the ELBO of the same VAE.
    many = x[:1].expand(4000, SIZE)
    values = LatentELBO().terms(model, many, seed=1)
    plain = vae.elbo(many, seed=2)
    difference = (-values.value - plain.value).detach()
    error = float(difference.std() / len(many) ** 0.5)
    assert abs(float(difference.mean())) < 4 * error
    assert LatentELBO(beta=2.0, warmup=4).at(2).beta == 1.0
    assert LatentELBO(beta=2.0, warmup=4).fixed() == LatentELBO()
    value = LatentELBO(beta=0.5)(model, x, seed=0).detach()
    torch.testing.assert_close(value, 0.5 * (p["cross_entropy"] - p["entropy"])
                               - p["reconstruction"])  # fmt: skip


def test_both_parts_are_trained_together():
    torch.manual_seed(0)
    x = torch.randn(2000, 2) * 0.3 + torch.tensor([2.0, -2.0]) * torch.randint(0, 2, (2000, 1))
    vae = VAE(
        GaussianEncoder(Dense([2], [4], width=32)), Dense([2], [2], width=32), GaussianEmission()
    )
    model = LatentModel(vae, ScoreModel(MLP(2, width=32, depth=2), VPSDE()))
    loss = LatentELBO(warmup=50)
    start = loss.fixed()(model, x, seed=0).mean().detach()
    before = [p.clone() for p in model.parameters()]
    trained = fit(model, x, steps=80, batch_size=128, loss=loss, ema=0.9, progress=False)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    assert float(loss.fixed()(trained, x, seed=0).mean().detach()) < float(start) - 1


def test_the_latent_bound_is_the_elbo_for_a_normal_prior():
    vae = diagonal(W, STD, MU)
    prior = GaussianModel(mean=torch.zeros(N).double(), std=1.0, sde=VPSDE())
    model, exact = LatentModel(vae, prior), Likelihood(probes="exact", rtol=1e-5, atol=1e-5)
    found = LatentBound(exact, draws=50)(model, X, seed=0)
    gap = 0.5 * float((W.T @ W + STD**2 * torch.eye(N)).diagonal().log().sum()
                      - (W.T @ W + STD**2 * torch.eye(N)).logdet())  # fmt: skip
    wanted = EVIDENCE.log_prob(X) - gap
    assert ((found.log_prob - wanted).abs() < 4 * found.standard_error).all()
    assert found.estimates.shape == (5, 50)
    torch.testing.assert_close(found.log_prob, found.prior + found.log_det)
    # The error is that of the draws, and the weights tighten the bound towards the evidence.
    weighted = LatentBound(exact, draws=50, weighted=True)(model, X, seed=0)
    assert (weighted.log_prob > found.log_prob).all()
    away = (weighted.log_prob - EVIDENCE.log_prob(X)).abs()
    assert (away < 4 * weighted.standard_error + 0.05).all()


def test_an_invertible_codec_has_the_exact_likelihood():
    prior = GaussianModel(mean=torch.zeros(2).double(), std=0.7, sde=VPSDE())
    model = LatentModel(Affine((2,), shift=1.0, width=2.0, dtype="float64"), prior)
    raw = torch.tensor([[1.0, 2.0], [0.5, 0.0]]).double()
    found = LatentBound(Likelihood(probes="exact", rtol=1e-8, atol=1e-8))(model, raw, seed=0)
    wanted = torch.distributions.Normal(1.0, 1.4).log_prob(raw).sum(1)
    torch.testing.assert_close(found.log_prob, wanted, rtol=0, atol=1e-3)
    assert (found.standard_error == 0).all()


def test_the_error_of_a_single_draw_is_the_priors():
    vae = diagonal(W, STD, MU)
    prior = GaussianModel(mean=torch.zeros(N).double(), std=1.0, sde=VPSDE())
    found = LatentBound(VariationalBound())(LatentModel(vae, prior), X, seed=0)
    assert (found.standard_error > 0).all()
    assert (found.nfe == 18).all()
    alone = LatentBound(VariationalBound())(LatentModel(vae, prior), X[2:3], seed=0, seeds=[2])
    torch.testing.assert_close(alone.log_prob, found.log_prob[2:3])


def test_weights_with_a_noisy_prior_would_overclaim_and_are_refused():
    torch.manual_seed(0)
    noise = torch.randn(200_000, 16, dtype=torch.float64)
    lift = float((noise.logsumexp(1) - math.log(16)).mean())
    assert lift == pytest.approx(0.45, abs=0.01)
    for noisy in (VariationalBound(), Likelihood(probes=2)):
        with pytest.raises(InputError, match="likelihood"):
            LatentBound(noisy, draws=16, weighted=True)
    LatentBound(Likelihood(probes="exact"), draws=16, weighted=True)
    LatentBound(VariationalBound(), draws=16)


def test_a_codec_without_a_density_has_no_likelihood():
    codec = Autoencoder(Dense([4], [2]), Dense([2], [4]))
    model = LatentModel(codec, GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE()))
    with pytest.raises(InputError, match="Autoencoder"):
        LatentBound()(model, torch.zeros(2, 4))


# --- A frozen codec: the data set's own ----------------------------------------------------------


@pytest.fixture(scope="module")
def squares():
    torch.manual_seed(0)
    x = torch.randint(0, 4, (64, 1, 2, 2), dtype=torch.uint8)
    labels = (x.flatten(1).float().mean(1) > 1.5).long()
    splits, parts = [x, x[:16], x[16:32]], [labels, labels[:16], labels[16:32]]
    return Dataset.of("squares", splits, levels=4, labels=parts)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(
        GaussianEncoder(Dense([1, 2, 2], [4], width=16)),
        Dense([2], [1, 2, 2], width=16),
        LevelEmission(4, std=0.3),
    )


@pytest.fixture(scope="module")
def latent_run(squares, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    data = squares.with_codec(vae)
    model = ScoreModel(MLP(2, width=16, depth=1, classes=2), VPSDE())
    fit(model, data, steps=20, folder=folder, progress=False)
    return folder, data


def test_a_data_set_is_seen_through_its_codec(squares, vae):
    data = squares.with_codec(vae)
    assert (data.shape, data.raw_shape, data.levels) == ((2,), (1, 2, 2), 4)
    batch = data.batch("train", Streams.of(0, batch=64))
    assert batch.x.shape == (64, 2)
    assert not torch.equal(batch.x, data.batch("train", Streams.of(0, batch=64), draw=1).x)
    assert data.sigma_data == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(batch.cond["label"], squares.labels[0])
    plain = data.with_codec(squares.codec)
    assert plain.shape == (1, 2, 2)


def test_a_checkpoint_carries_the_codec_with_its_weights(latent_run):
    folder, data = latent_run
    run = load(folder)
    assert isinstance(run.codec, LatentCodec)
    assert repr(run.codec) == repr(data.codec)
    out = UniPC(steps=5)(run.model, shape=(4, 2), seed=0, label=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(run.codec.decode(out.x), data.decode(out.x))
    assert run.codec.decode(out.x).dtype == torch.uint8


def test_a_training_is_resumed_behind_the_same_codec_alone(squares, vae, tmp_path):
    data, other = squares.with_codec(vae), squares.with_codec(copy.deepcopy(vae).requires_grad_())
    torch.nn.init.normal_(other.codec.autoencoder.decoder.layers[0].weight)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)

    def run(data, steps, folder=tmp_path):
        torch.manual_seed(0)
        model, options = ScoreModel(MLP(2, width=8, depth=1), VPSDE()), {"progress": False}
        training = Training(steps=steps, batch_size=16)
        options["recipe"] = {"model": describe(model), "units": data.codec.describe()}
        return train(model, data, DenoisingScoreMatching(), training, adam, folder, **options)

    whole = run(data, 4, made(tmp_path / "whole"))
    run(data, 2)
    with pytest.raises(OtherRunError, match="weights"):
        run(other, 4)
    resumed = run(data, 4)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def made(folder):
    folder.mkdir()
    return folder


def test_a_codec_larger_than_its_weights_is_refused(latent_run):
    folder, _ = latent_run
    checkpoint = Checkpoint.load(folder)
    network = checkpoint.recipe["units"]["autoencoder"]["decoder"]
    network["width"] = 10_000
    with pytest.raises(InputError, match=r"damaged.* \d+"):
        checkpoint.build("units", LatentCodec)


def test_the_likelihood_is_the_latent_bound(latent_run):
    folder, data = latent_run
    run, bound = load(folder), VariationalBound(draws=4)
    options = {"batch_size": 5, "seed": 3, "progress": False}
    found = evaluate_likelihood(run.model, bound, data, "test", **options)
    assert found.unit == "bits/dim"
    streams = Streams.of(3, batch=16)
    raw, label = data.test, data.labels[2]
    x = data.codec.encode(raw, streams)
    prior = bound(run.model, x, seed=3, label=label).log_prob.double()
    wanted = -(prior + data.codec.log_det(raw, x)) / (4 * math.log(2))
    torch.testing.assert_close(found.values, wanted)
    several = evaluate_likelihood(
        run.model, bound, data, "test", draws=Draws(24), examples=4, **options
    )
    many = [
        evaluate_likelihood(run.model, bound, data, "test", examples=4, **{**options, "seed": s})
        for s in range(24)
    ]
    values = torch.stack([one.values for one in many])
    error = (values.var(0) / 24 + several.errors**2).sqrt()
    assert ((values.mean(0) - several.values).abs() < 4.5 * error).all()
    with pytest.raises(InputError, match="likelihood"):
        evaluate_likelihood(run.model, bound, data, draws=Draws(4, weighted=True), **options)
    exact = Likelihood(probes="exact")
    tight = evaluate_likelihood(
        run.model, exact, data, examples=4, draws=Draws(8, weighted=True), **options
    )
    loose = evaluate_likelihood(run.model, exact, data, examples=4, draws=Draws(8), **options)
    assert (tight.values < loose.values).all()


def test_a_sample_has_no_log_density_of_raw_units(latent_run):
    folder, data = latent_run
    run = load(folder)
    sampler = ProbabilityFlow(probes=2, rtol=1e-2)
    drawing = Drawing(run.model, sampler, data.codec, 0, cond={"label": torch.tensor([1])})
    assert "log_prob" not in drawing.batch(range(3))


def test_a_data_set_behind_a_plain_autoencoder_has_no_likelihood(squares):
    torch.manual_seed(0)
    codec = Autoencoder(Dense([1, 2, 2], [2]), Dense([2], [1, 2, 2]))
    data = squares.with_codec(codec)
    x = data.batch("train", Streams.of(0, batch=64)).x
    torch.testing.assert_close(x.std(0, unbiased=False), torch.ones(2))
    prior = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
    with pytest.raises(InputError, match=r"LatentCodec.*None"):
        evaluate_likelihood(prior, VariationalBound(), data, progress=False)


def test_an_autoencoder_is_not_trained_on_other_levels_nor_decodes_other_latents(squares):
    vae = VAE(
        GaussianEncoder(Dense([*squares.shape], [4])),
        Dense([2], [*squares.shape]),
        LevelEmission(squares.levels + 1),
    )
    with pytest.raises(InputError, match=rf"likelihood.*levels={squares.levels}"):
        fit(vae, squares, steps=1, loss=ELBO(), progress=False)
    with pytest.raises(InputError, match=r"\(2,\).*\(3,\)"):
        LatentCodec.plain(Autoencoder(vae.encoder, vae.decoder)).decode(torch.zeros(1, 3))
