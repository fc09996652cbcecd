"""Autoencoders as codecs: the bound against probabilistic PCA, the codec's terms, the losses."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from scoresde import VPSDE, GaussianModel, InputError, Likelihood, fit, load
from scoresde.codec import (
    VAE,
    Affine,
    Autoencoder,
    DiagonalGaussian,
    DiscretisedGaussian,
    First,
    GaussianEmission,
    GaussianEncoder,
    LatentCodec,
    LatentEncoder,
    LatentLaw,
    LevelEmission,
)
from scoresde.loss import ELBO, DenoisingScoreMatching, ReconstructionError
from scoresde.nn import Dense, ImageDecoder, ImageEncoder
from scoresde.recipe import build
from scoresde.shapes import log_normal, sum_features
from scoresde.streams import Streams
from scoresde.train import Training
from scoresde.train.update import Update
from scoresde.train.validation import validation_loss

STD = 0.5
D, N = 6, 3  # dimensions of the examples, and of the latents
generator = torch.Generator().manual_seed(0)
W = torch.randn(D, N, generator=generator, dtype=torch.float64)
MU = torch.randn(D, generator=generator, dtype=torch.float64)
EVIDENCE = MultivariateNormal(MU, W @ W.T + STD**2 * torch.eye(D, dtype=torch.float64))
M = W.T @ W + STD**2 * torch.eye(N, dtype=torch.float64)
X = EVIDENCE.sample((5,))


class Full(LatentLaw):
    """Normal latents of any covariance."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance
        self.factor = torch.linalg.cholesky(covariance)

    def sample(self, noise):
        return self.mean + noise @ self.factor.T

    def log_prob(self, z):
        return MultivariateNormal(self.mean, self.covariance).log_prob(z)

    def kl(self):
        one = torch.eye(len(self.covariance), dtype=self.mean.dtype)
        prior = MultivariateNormal(torch.zeros_like(self.mean), one)
        own = MultivariateNormal(self.mean, self.covariance.expand(len(self.mean), -1, -1))
        return torch.distributions.kl_divergence(own, prior)[:, None]


class ExactEncoder(LatentEncoder):
    """The posterior of probabilistic PCA."""

    raw_shape, shape = (D,), (N,)

    def law(self, x):
        return Full((x - MU) @ W @ M.inverse(), STD**2 * M.inverse())


def affine(weight, bias):
    layer = Dense(weight.shape[1:], weight.shape[:1], depth=0).double()
    with torch.no_grad():
        layer.layers[0].weight.copy_(weight)
        layer.layers[0].bias.copy_(bias)
    return layer


def gaussian(std):
    """A likelihood whose scale is right to the last digit of float64."""
    emission = GaussianEmission(std).double()
    nn.init.constant_(emission.log_std, math.log(std))
    return emission


def diagonal(weight, std, mu=None):
    """The VAE of a linear decoder with the best independent latents."""
    n = weight.shape[1]
    mu = torch.zeros(len(weight), dtype=torch.float64) if mu is None else mu
    m = weight.T @ weight + std**2 * torch.eye(n, dtype=torch.float64)
    gain = m.inverse() @ weight.T
    log_std = (std**2 / m.diagonal()).log() / 2
    mean = torch.cat([gain, torch.zeros_like(gain)])
    encoder = GaussianEncoder(affine(mean, torch.cat([-gain @ mu, log_std])))
    return VAE(encoder, affine(weight, mu), gaussian(std))


def sigma_points(n, count):
    """Noise whose average makes the expectation of a quadratic function exact."""
    points = torch.cat([torch.eye(n), -torch.eye(n)]).double() * math.sqrt(n)
    return [point.expand(count, n) for point in points]


def exact_elbo(vae, x):
    n = vae.shape[0]
    return torch.stack([vae.elbo(x, noise).value for noise in sigma_points(n, len(x))]).mean(0)


def test_the_exact_posterior_closes_the_gap_at_every_latent():
    vae = VAE(ExactEncoder(), affine(W, MU), gaussian(STD))
    z = vae.encode(X, Streams.of(0, batch=len(X)))
    found = log_normal(z, 1.0) + vae.log_det(X, z)
    torch.testing.assert_close(found, EVIDENCE.log_prob(X), rtol=0, atol=1e-10)
    torch.testing.assert_close(exact_elbo(vae, X), EVIDENCE.log_prob(X), rtol=0, atol=1e-10)


def test_independent_latents_lose_what_the_formula_says():
    gap = 0.5 * (M.diagonal().log().sum() - M.logdet())
    assert gap > 0.1
    found = EVIDENCE.log_prob(X) - exact_elbo(diagonal(W, STD, MU), X)
    torch.testing.assert_close(found, gap.expand(len(X)), rtol=0, atol=1e-10)


def test_the_bound_is_its_two_terms_summed_over_dimensions():
    vae = diagonal(W, STD, MU)
    noise = torch.randn(len(X), N, dtype=torch.float64)
    found, law = vae.elbo(X, noise), vae.encoder.law(X)
    z = law.sample(noise)
    torch.testing.assert_close(found.value, found.reconstruction - found.kl)
    torch.testing.assert_close(found.reconstruction, log_normal(X - vae.decode(z), STD))
    reference = torch.distributions.Normal(law.mean, law.log_std.exp())
    prior = torch.distributions.Normal(torch.zeros(N), torch.ones(N))
    kl = torch.distributions.kl_divergence(reference, prior).sum(1)
    torch.testing.assert_close(found.kl, kl)
    torch.testing.assert_close(law.log_prob(z), reference.log_prob(z).sum(1))


def test_latents_are_drawn_from_the_encoder_by_streams():
    vae = diagonal(W, STD, MU)
    many = X[:1].expand(20_000, D)
    z = vae.encode(many, Streams.of(0, batch=len(many)))
    law = vae.encoder.law(X[:1])
    error = law.log_std.exp()[0] / len(many) ** 0.5
    assert ((z.mean(0) - law.mean[0]).abs() < 4 * error).all()
    ratio = z.std(0) / law.log_std.exp()[0]
    assert ((ratio - 1).abs() < 4 / (2 * len(many)) ** 0.5).all()
    again = vae.encode(many[:3], Streams.of(0, seeds=[2, 0, 1]))
    torch.testing.assert_close(again, z[[2, 0, 1]])
    assert not torch.equal(vae.encode(many[:3], Streams.of(0, batch=3), draw=1), z[:3])
    torch.testing.assert_close(vae.encode(X), vae.encoder.law(X).mean)


def test_a_trained_linear_vae_is_within_a_hundredth_of_the_evidence():
    basis = torch.linalg.qr(W)[0] * torch.tensor([2.0, 1.0, 0.7], dtype=torch.float64)
    law = MultivariateNormal(MU, basis @ basis.T + STD**2 * torch.eye(D, dtype=torch.float64))
    torch.manual_seed(0)
    vae = VAE(
        GaussianEncoder(Dense([D], [2 * N], depth=0)),
        Dense([N], [D], depth=0),
        GaussianEmission(),
    )
    adam = functools.partial(torch.optim.Adam, lr=2e-2)
    options = {"optimizer": adam, "ema": 0.98, "loss": ELBO(warmup=50), "progress": False}
    model = fit(vae, law.sample((8000,)).float(), steps=400, batch_size=500, **options).double()
    held_out = law.sample((4000,))
    with torch.no_grad():
        gap = (law.log_prob(held_out) - exact_elbo(model, held_out)) / D
    error = float(gap.std() / len(gap) ** 0.5)
    assert -4 * error < float(gap.mean()) < 0.01


@pytest.mark.parametrize("columns", [D, N])
def test_an_orthogonal_codec_has_the_likelihood_of_the_pixel_model(columns):
    """With orthonormal columns of W and a prior N(0, C) of the latents,

    log p(x) = log N(W^T x; 0, C + s^2 I) + log N(residual; 0, s^2 I),
    and a square W leaves no residual.
    """
    torch.manual_seed(1)
    frame = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0][:, :columns]
    root, one = torch.randn(columns, columns).double(), torch.eye(columns, dtype=torch.float64)
    covariance, std = root @ root.T + 0.2 * one, 0.3
    inside = (covariance.inverse() + one / std**2).inverse()

    class Exact(LatentEncoder):
        raw_shape, shape = (D,), (columns,)

        def law(self, x):
            return Full(x @ frame @ inside / std**2, inside)

    vae = VAE(Exact(), affine(frame, torch.zeros(D).double()), gaussian(std))
    options = {"mean": torch.zeros(columns).double(), "sde": VPSDE()}
    prior = GaussianModel(covariance=covariance, **options)
    seen = GaussianModel(covariance=covariance + std**2 * one, **options)
    x = torch.randn(4, D, dtype=torch.float64)
    z = vae.encode(x, Streams.of(0, batch=4))
    found = prior.log_prob(z, 0.0) + vae.log_det(x, z)
    size = D - columns
    residual = (x - x @ frame @ frame.T).square().sum(1)
    rest = -0.5 * residual / std**2 - size * math.log(std * math.sqrt(2 * math.pi))
    wanted = seen.log_prob(x @ frame, 0.0) + rest
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    if size == 0:  # the pixels' own model, also along the flow
        turned = frame @ (covariance + std**2 * one) @ frame.T
        pixels = GaussianModel(mean=torch.zeros(D).double(), covariance=turned, sde=VPSDE())
        torch.testing.assert_close(found, pixels.log_prob(x, 0.0), rtol=0, atol=1e-6)
        exact = Likelihood(probes="exact", rtol=1e-9, atol=1e-9)
        both = exact(seen, x @ frame).log_prob, exact(pixels, x).log_prob
        torch.testing.assert_close(*both, rtol=0, atol=1e-6)


def test_levels_have_probabilities_and_may_be_dequantised():
    emission = LevelEmission(5, std=0.3, low=-1.0, high=1.0)
    mean = torch.tensor([[0.1]]).expand(5, 1)
    centres = torch.tensor([[-0.8], [-0.4], [0.0], [0.4], [0.8]])
    found = emission.log_prob(centres, mean)
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0))
    anywhere = centres + 0.19 * torch.tensor([[1.0], [-1.0], [0.5], [-0.5], [1.0]])
    torch.testing.assert_close(emission.log_prob(anywhere, mean), found)
    torch.testing.assert_close(emission.seen(anywhere), centres)
    one = torch.ones(())
    first = First(mean, one, one, lambda: mean, torch.tensor(0.09))
    reference = DiscretisedGaussian(5).log_prob(centres, first)
    torch.testing.assert_close(found.double(), reference, rtol=1e-6, atol=0)


def test_the_learned_scale_has_its_gradient():
    emission = GaussianEmission(0.7, shape=(2, 1)).double()
    x, mean = torch.randn(3, 2, 4).double(), torch.randn(3, 2, 4).double()
    emission.log_prob(x, mean).sum().backward()
    squares = ((x - mean) ** 2).sum((0, 2))[:, None]
    torch.testing.assert_close(emission.log_std.grad, squares / 0.49 - 12)


def small_vae(levels=None):
    encoder = ImageEncoder((1, 4, 4), 4, [4, 4])
    decoder = ImageDecoder((1, 4, 4), 2, [4, 4])
    likelihood = LevelEmission(levels) if levels else GaussianEmission(0.5)
    return VAE(GaussianEncoder(encoder), decoder, likelihood)


def test_the_loss_is_the_negative_bound_with_its_weights():
    torch.manual_seed(0)
    vae, x = small_vae(), torch.randn(4, 1, 4, 4)
    found = vae.elbo(x, seed=3)
    terms = ELBO().terms(vae, x, seed=3)
    torch.testing.assert_close(terms.value, -found.value)
    torch.testing.assert_close(terms.parts, {"reconstruction": found.reconstruction.detach(),
                                             "kl": found.kl.detach()})  # fmt: skip
    both = {"reconstruction": found.reconstruction, "kl": found.kl}
    four = ELBO(beta=4.0)(vae, x, seed=3)
    torch.testing.assert_close(four, 4 * both["kl"] - both["reconstruction"])
    free = ELBO(free_bits=0.4)(vae, x, seed=3)
    kl = sum_features(found.kls.clamp(min=0.4))
    torch.testing.assert_close(free, kl - found.reconstruction)
    assert float((kl - found.kl).detach().min()) > 0
    # A part of a batch has the noise of its rows.
    part = ELBO()(vae, x[2:], seed=3, seeds=range(4), part=slice(2, 4))
    torch.testing.assert_close(part, -found.value[2:])


def test_the_warm_up_is_of_the_updates_and_not_of_validation():
    loss = ELBO(beta=2.0, free_bits=0.1, warmup=10)
    assert [loss.at(step).beta for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert loss.fixed() == ELBO()
    assert DenoisingScoreMatching().at(3) == DenoisingScoreMatching().fixed()
    torch.manual_seed(0)
    vae, x = small_vae(), torch.randn(8, 1, 4, 4)
    training = Training(steps=20, batch_size=8, clip=None)
    update = Update(vae, loss, training, lambda p: torch.optim.SGD(p, lr=0.0))
    values = [float(update(x, {}, step, 8)[0]) for step in (0, 5)]
    for step, value in zip((0, 5), values, strict=True):
        seeds = range(8 * step, 8 * step + 8)
        wanted = loss.at(step)(vae, x, seed=0, seeds=seeds).mean()
        assert value == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_validation_measures_the_bound_itself(images):
    vae = small_vae(levels=images.levels)
    one, other = (
        validation_loss(vae, images, loss, seed=0)
        for loss in (ELBO(beta=7.0, free_bits=1.0, warmup=5), ELBO())
    )
    assert one == other


@pytest.fixture
def images():
    from scoresde.data import Dataset

    torch.manual_seed(0)
    x = torch.randint(0, 4, (40, 1, 4, 4), dtype=torch.uint8)
    return Dataset.of("squares", [x, x[:8], x[8:16]], levels=4)


def test_a_vae_is_trained_and_loaded_as_any_model(images, tmp_path):
    torch.manual_seed(0)
    vae = small_vae(levels=4)
    fit(vae, images, steps=30, batch_size=20, loss=ELBO(), folder=tmp_path, progress=False)
    run = load(tmp_path)
    x = images.batch("test", Streams.of(0, batch=8)).x
    before, after = (model.elbo(x, seed=0).value.mean() for model in (small_vae(4), run.model))
    assert float(after.detach()) > float(before.detach()) + 1
    with pytest.raises(InputError, match="VAE"):
        ELBO()(Autoencoder(Dense([4], [2]), Dense([2], [4])), torch.zeros(2, 4))


def test_a_plain_autoencoder_has_its_error_and_no_density():
    torch.manual_seed(0)
    codec, x = Autoencoder(Dense([6], [2]), Dense([2], [6])), torch.randn(3, 6)
    z = codec.encode(x, Streams.of(0, batch=3))
    assert codec.log_det(x, z) is None
    assert not codec.stochastic
    found = ReconstructionError()(codec, x)
    torch.testing.assert_close(found, ((codec.decode(z) - x) ** 2).mean(1))
    float(found.mean().detach())
    x = torch.randn(400, 2) @ torch.randn(2, 6)
    before = ReconstructionError()(codec, x).mean().detach()
    options = {"loss": ReconstructionError(), "ema": 0.9, "progress": False}
    trained = fit(codec, x, steps=60, batch_size=100, **options)
    assert float(ReconstructionError()(trained, x).mean().detach()) < 0.3 * float(before)


# --- The codec of a data set ---------------------------------------------------------------------


def test_a_measured_scale_is_part_of_the_codec(images):
    torch.manual_seed(0)
    vae = small_vae(levels=4)
    codec = LatentCodec.measured(images.codec, vae, images.train)
    assert codec.shape == (2, 2, 2)
    assert codec.raw_shape == (1, 4, 4)
    assert codec.levels == 4
    streams = Streams.of(0, batch=len(images.train))
    z = codec.encode(images.train, streams)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(2))
    assert not torch.equal(codec.encode(images.train), z)
    assert codec.decode(z).dtype == torch.uint8
    assert codec.decode(z).shape == (40, 1, 4, 4)
    assert codec.to_unit(z).shape == (40, 1, 4, 4)


def test_rescaling_the_latents_moves_no_likelihood(images):
    """A normal model of latents of one unit, and its image in another."""
    torch.manual_seed(0)
    vae = small_vae(levels=4).double()
    raw, streams = images.train[:6], Streams.of(0, batch=6)
    found = []
    for shift, width in ((0.0, 1.0), (0.3, 0.18215), ([[[1.0]], [[-2.0]]], [[[5.0]], [[1e-3]]])):
        codec = LatentCodec(images.codec, vae, shift, width)
        x = codec.encode(raw, streams)
        m, w = (torch.as_tensor(v, dtype=torch.float64).expand(2, 2, 2) for v in (shift, width))
        model = torch.distributions.Normal((0.1 - m) / w, 1.2 / w)
        found.append(model.log_prob(x).flatten(1).sum(1) + codec.log_det(raw, x))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)
    z = vae.encode(images.codec.encode(raw), streams)
    wanted = torch.distributions.Normal(0.1, 1.2).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(found[0], wanted + vae.log_det(images.codec.encode(raw), z))


def test_real_data_add_the_determinant_of_their_units():
    vae = diagonal(W, STD, MU)
    units = Affine((D,), shift=1.0, width=2.0, dtype="float64")
    codec = LatentCodec(units, vae)
    raw = 2 * X.float().double() + 1
    z = codec.encode(raw, Streams.of(0, batch=len(X)))
    wanted = vae.log_det(X.float(), z) - D * math.log(2.0)
    torch.testing.assert_close(codec.log_det(raw, z), wanted, rtol=0, atol=1e-5)


def test_a_codec_is_described_with_its_weights_and_built_again(images):
    torch.manual_seed(0)
    codec = LatentCodec.measured(images.codec, small_vae(levels=4), images.train)
    again = build(codec.describe())
    streams = Streams.of(0, batch=4)
    x = codec.encode(images.train[:4], streams)
    assert torch.equal(again.encode(images.train[:4], streams), x)
    assert torch.equal(again.log_det(images.train[:4], x), codec.log_det(images.train[:4], x))
    assert repr(again) == repr(codec)
    torch.manual_seed(1)
    assert repr(LatentCodec(images.codec, small_vae(levels=4), codec.shift, codec.width)) != repr(
        codec
    )
    alone = small_vae()
    again = build(alone.describe())
    z = torch.randn(2, 2, 2, 2)
    torch.testing.assert_close(again.decode(z), alone.eval().decode(z).detach())


def test_moments_are_kept_for_the_latents_of_every_batch(images):
    torch.manual_seed(0)
    rows = torch.tensor([3, 0, 17])
    for codec in (small_vae(levels=4), Autoencoder(Dense([1, 4, 4], [2]), Dense([2], [1, 4, 4]))):
        data = images.with_codec(codec)
        for draw in (0, 1):
            streams = Streams(5, rows)
            found = data.batch("train", streams, draw).x
            wanted = data.codec.encode(images.train[rows], streams, draw)
            torch.testing.assert_close(found, wanted)
        flipped = dataclasses.replace(data, flip=True)
        streams = Streams(5, rows)
        found = flipped.batch("train", streams, draw=1).x
        both = [data.codec.encode(raw, streams, 1) for raw in
                (images.train[rows], images.train[rows].flip(-1))]  # fmt: skip
        near = [torch.isclose(found, one, atol=1e-5).flatten(1).all(1) for one in both]
        assert (near[0] ^ near[1]).all()


def test_training_goes_on_without_changing_a_codec(images):
    vae = small_vae(levels=4)
    codec = LatentCodec(images.codec, vae)
    before = codec.encode(images.train[:2])
    nn.init.zeros_(vae.encoder.network.head.conv.weight)
    assert torch.equal(codec.encode(images.train[:2]), before)
    assert not any(p.requires_grad for p in codec.autoencoder.parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda c: LatentCodec(c, small_vae()), "levels=4"),
        (lambda c: LatentCodec(Affine((1, 4, 4)), small_vae(levels=4)), "levels=None"),
        (lambda c: LatentCodec(Affine.of_levels((1, 8, 8), 4), small_vae(4)), "(1, 8, 8)"),
        (lambda c: LatentCodec(c, small_vae(4), width=0.0), "0.0"),
        (lambda c: LatentCodec(c, small_vae(4), width=[1.0, 2.0, 3.0]), "[1.0, 2.0, 3.0]"),
        (lambda c: LatentCodec(c, small_vae(4), weights={}), "weights"),
        (lambda c: VAE(nn.Linear(2, 2), nn.Linear(2, 2), GaussianEmission()), "Linear"),
        (lambda c: GaussianEncoder(nn.Linear(2, 2)), "raw_shape"),
        (lambda c: GaussianEmission(0.0), "0.0"),
        (lambda c: ELBO(beta=-1.0), "-1.0"),
        (lambda c: ELBO(warmup=math.inf), "inf"),
        (lambda c: small_vae(4).elbo(torch.zeros(2, 1, 8, 8)), "(1, 8, 8)"),
        (lambda c: DenoisingScoreMatching()(small_vae(4), torch.zeros(2, 1, 4, 4)), "VAE"),
    ],
)
def test_what_does_not_fit_is_a_sentence(make, said, images):
    with pytest.raises(InputError) as caught:
        make(images.codec)
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_width_of_the_diagonal_law_beyond_the_range_is_bounded():
    network = affine(torch.zeros(2, 1).double(), torch.tensor([0.0, -500.0]).double())
    law = GaussianEncoder(network).law(torch.zeros(1, 1).double())
    assert isinstance(law, DiagonalGaussian)
    assert float(law.log_std.detach()) == -15.0
