"""Codecs: between raw and model units, what that does to a log-density, and what a run keeps."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    GaussianModel,
    InputError,
    Likelihood,
    RectifiedFlow,
    SubVPSDE,
)
from scoresde.codec import Affine, Codec, PerChannel, PerFeature, Whole
from scoresde.data import Dataset, Scaling, array, check_scales, digits, two_moons
from scoresde.metrics import bits_per_dim, nats
from scoresde.recipe import build, updated
from scoresde.sample import DDIM
from scoresde.streams import Streams
from scoresde.tasks import draw_samples, evaluate_likelihood
from scoresde.tasks.report import Trained, report_training


def table(n=4000, dtype=torch.float32):
    """Two columns, N(0, 1) and N(5e4, 2e4^2)."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z * torch.tensor([1.0, 2e4]) + torch.tensor([0.0, 5e4])).to(dtype)


def data_of(values, **options):
    return Dataset.of("data", [values] * 3, **options)


# --- Columns of their own ------------------------------------------------------------------------


def test_a_table_of_two_scales_comes_back_from_an_exact_model():
    """Standard normal in model units: so are samples and nats, in the units of the columns."""
    raw = table()
    data, n = data_of(raw), 4000
    model = GaussianModel(torch.zeros(2), 1.0, VPSDE())
    drawn = draw_samples(model, DDIM(50), data.codec, n, batch_size=n, seed=0, progress=False)
    x = data.decode(drawn.x)
    mean, std = raw.double().mean(0), raw.double().std(0, correction=0)
    # The standard error of a mean is std / sqrt(n), of a std std / sqrt(2 n); four of each.
    assert bool(((x.double().mean(0) - mean).abs() < 4 * std / math.sqrt(n)).all())
    assert bool(((x.double().std(0) - std).abs() < 4 * std / math.sqrt(2 * n)).all())
    result = evaluate_likelihood(
        model, Likelihood("exact", 1e-5, 1e-5), data, examples=500, progress=False
    )
    assert result.unit == "nats"
    normal = torch.distributions.Normal(mean, std)
    exact = -normal.log_prob(data.test[result.rows].double()).sum(1)
    # The cut-off leaves noise of 1e-3 in the data, whose density is off by its square.
    torch.testing.assert_close(result.values, exact, atol=1e-3, rtol=0)
    # The entropy, log(2 pi e) + log of both widths, up to the error of the mean of chi-square.
    entropy = math.log(2 * math.pi * math.e) + float(std.log().sum())
    assert result.mean == pytest.approx(entropy, abs=4 / math.sqrt(500))


def test_images_are_standardised_by_channels():
    generator = torch.Generator().manual_seed(0)
    size, middle = torch.tensor([1.0, 30.0, 0.01]), torch.tensor([0.0, 5.0, -2.0])
    values = torch.randn(200, 3, 4, 4, generator=generator)
    raw = values * size.reshape(3, 1, 1) + middle.reshape(3, 1, 1)
    x = data_of(raw).encode(raw)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert np.shape(data_of(raw).codec.width) == (3, 1, 1)
    assert np.shape(data_of(raw, standardise=PerFeature()).codec.width) == (3, 4, 4)
    assert isinstance(data_of(raw, standardise=Whole()).codec.width, float)
    assert np.shape(data_of(raw[:, :, 0]).codec.width) == (3, 1)


def test_one_column_and_one_channel_have_one_scale_as_before():
    for raw in (table()[:, 1:], table().reshape(-1, 1, 4, 5)):
        one = data_of(raw).codec
        width = float(raw.double().std(correction=0))
        assert (one.shift, one.width) == (float(raw.double().mean()), width)
        assert torch.equal(one.encode(raw), (raw - one.shift) * (1 / width))
        assert one == data_of(raw, standardise=Whole()).codec


def test_toy_densities_keep_their_one_scale():
    assert isinstance(two_moons(count=100).codec.width, float)


def test_a_constant_column_is_named_and_comes_back_exactly(caplog):
    constant = 0.1 + torch.zeros(4000, 1)
    raw = torch.cat((table(), constant), 1)
    with caplog.at_level(logging.WARNING):
        data = data_of(raw)
    assert ": 2 (of 3" in caplog.text
    assert torch.equal(data.encode(raw)[:, 2], torch.zeros(4000))
    noisy = data.encode(raw) + torch.randn(4000, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(data.decode(noisy)[:, 2:], constant)
    assert torch.equal(data.decode(noisy, rounded=False)[:, 2:], constant)
    # Its width counts as 1: the other two columns alone make the volume.
    other = data_of(table())
    assert float(data.log_det(raw, noisy)[0]) == pytest.approx(other.codec.log_volume)
    assert data.to_unit(data.encode(raw))[:, 2].tolist() == [0.0] * 4000
    assert data.codec.range == pytest.approx(other.codec.range)
    with pytest.raises(InputError, match=r"constant \["):
        data_of(torch.cat((constant, constant + 1), 1))


# --- Digits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [True, Whole(), PerFeature(), False], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_numbers_return_in_their_type(dtype, standardise):
    raw = table(dtype=dtype) if standardise else table(dtype=dtype) / 1e4
    data = data_of(raw, standardise=standardise)
    x = data.encode(raw)
    assert x.dtype == torch.float32
    back = data.decode(x)
    assert back.dtype == dtype
    assert data.decode(x.double()).dtype == dtype
    width = torch.as_tensor(data.codec.width, dtype=torch.float64)
    error = (back.double() - raw.double()).abs() / width  # in model units: float32 of up to 10
    assert float(error.max()) < 3e-6


@pytest.mark.parametrize(("levels", "dtype"), [(256, torch.uint8), (1000, torch.int16)])
def test_integers_return_in_their_type_and_dequantise(levels, dtype):
    raw = torch.arange(levels).repeat(3, 1).to(dtype)
    data = data_of(raw, levels=levels)
    streams = Streams.of(seed=0, batch=3)
    for x in (data.encode(raw), data.encode(raw, streams), data.encode(raw, streams, 1)):
        assert data.decode(x).dtype == dtype
        assert torch.equal(data.decode(x), raw)
    offsets = data.decode(data.encode(raw, streams).double(), rounded=False) - raw
    assert float(offsets.min()) > 0
    assert float(offsets.max()) < 1
    assert float(offsets.std()) == pytest.approx(1 / math.sqrt(12), rel=0.05)
    centres = data.decode(data.encode(raw, centre=True).double(), rounded=False) - raw
    torch.testing.assert_close(centres, torch.full_like(centres, 0.5), atol=1e-4, rtol=0)
    assert torch.equal(data.batch("test", streams, 1).x, data.encode(raw, streams, 1))


def test_a_large_offset_costs_no_digits():
    """5e4 + 1e-3 z needs ten digits; of z itself float32 keeps seven."""
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = 5e4 + 1e-3 * z
    x = data_of(raw).encode(raw)
    wanted = (raw - raw.mean(0)) / raw.std(0, correction=0)
    torch.testing.assert_close(x.double(), wanted, atol=1e-6, rtol=1e-6)
    assert float((data_of(raw).decode(x) - raw).abs().max()) < 1e-9


def test_a_file_of_float64_keeps_its_type(tmp_path):
    np.save(tmp_path / "table.npy", table(100, torch.float64).numpy())
    data = array(tmp_path / "table.npy")
    assert data.train.dtype == data.decode(data.encode(data.test)).dtype == torch.float64


# --- The log-determinant -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec",
    [
        Affine((2, 3), 1.0, 0.3),
        Affine((2, 3), [[1.0], [2.0]], [[0.3], [40.0]]),
        Affine((2, 3), torch.arange(6.0).reshape(2, 3), torch.arange(1.0, 7.0).reshape(2, 3)),
        Affine((2, 3), 0.0, [1.0, 2.0, 3.0]),
    ],
    ids=lambda codec: str(np.shape(codec.width)),
)
def test_the_log_determinant_is_that_of_the_jacobian(codec):
    raw = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda y: codec.encode(y[None])[0], raw[0])
    wanted = torch.linalg.slogdet(jacobian.reshape(6, 6))[1]
    found = codec.log_det(raw, codec.encode(raw))
    assert found.shape == (4,)
    torch.testing.assert_close(found, wanted.expand(4), atol=1e-6, rtol=1e-6)


def test_one_scale_and_its_log_determinant_are_worth_the_same():
    log_prob = torch.linspace(-9, 3, 5, dtype=torch.float64)
    for unit in (bits_per_dim, nats):
        one = unit(log_prob, (2, 3), 0.25)
        for log_det in (6 * math.log(0.25), torch.full((5,), 6 * math.log(0.25))):
            torch.testing.assert_close(unit(log_prob, (2, 3), log_det=log_det), one)
        assert unit(log_prob.float(), (6,), log_det=torch.zeros(5).double()).dtype == torch.float32
        with pytest.raises(InputError, match="got neither"):
            unit(log_prob, (6,))
        with pytest.raises(InputError, match="got both"):
            unit(log_prob, (6,), 0.25, log_det=1.0)


@dataclass(frozen=True)
class Logarithm(Codec):
    """Positive numbers by their logarithms: the log-determinant is not the same for all."""

    shape: Sequence[int]

    def encode(self, raw, streams=None, draw=0):
        return raw.double().log().float()

    def decode(self, x, rounded=True):
        return x.exp()

    def log_det(self, raw, x):
        return -raw.double().log().flatten(1).sum(1)


@dataclass(frozen=True)
class Deterministic(Logarithm):
    """As an autoencoder without a density would."""

    def log_det(self, raw, x):
        return None


def log_normal(codec):
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).exp()
    return Dataset("log-normal", *[values] * 3, codec=codec)


def test_a_codec_of_ones_own_makes_likelihoods_of_raw_data():
    data, model = log_normal(Logarithm((2,))), GaussianModel(torch.zeros(2), 1.0, VPSDE())
    likelihood = Likelihood("exact", 1e-5, 1e-5)
    result = evaluate_likelihood(model, likelihood, data, batch_size=7, progress=False)
    exact = torch.distributions.LogNormal(0.0, 1.0).log_prob(data.test).sum(1)
    torch.testing.assert_close(result.values.float(), -exact, atol=1e-3, rtol=0)
    assert data.sigma_data == pytest.approx(float(data.train.log().square().mean().sqrt()))


def test_a_codec_without_a_density_has_no_likelihood():
    model = GaussianModel(torch.zeros(2), 1.0, VPSDE())
    with pytest.raises(InputError, match=r"codec.*Deterministic.*log_det"):
        evaluate_likelihood(model, Likelihood(), log_normal(Deterministic((2,))), progress=False)


def test_a_training_with_a_codec_without_a_density_is_reported_without_likelihood(tmp_path):
    data, model = log_normal(Deterministic((2,))), GaussianModel(torch.zeros(2), 1.0, VPSDE())
    (tmp_path / "metrics.jsonl").write_text("")
    trained = Trained("latents", model, data, seconds=1.0, seed=0)
    options = {"count": 8, "progress": False}
    results = report_training(trained, {"ddim": DDIM(4)}, Likelihood(), tmp_path, **options)
    assert results["nfe_ddim"] == 4
    assert "nats" not in results
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "likelihood.json").exists()


@pytest.mark.parametrize("how", ["whole", 1, None])
def test_standardise_is_a_choice_or_an_object(how):
    with pytest.raises(InputError, match=rf"standardise .*{how!r}"):
        data_of(table(), standardise=how)


def test_a_codec_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"codec .*\(3,\)"):
        log_normal(Logarithm((3,)))


# --- What is kept, and what was kept -------------------------------------------------------------


def test_a_codec_is_rebuilt_from_its_plain_values():
    for codec in (data_of(table(dtype=torch.float64)).codec, PerChannel()(torch.rand(9, 3, 2))):
        recipe = codec.describe()
        assert recipe["_target_"] == "scoresde.codec.Affine"
        assert build(recipe) == codec
        x = torch.randn(5, *codec.shape)
        assert torch.equal(build(recipe).decode(x), codec.decode(x))


@pytest.mark.parametrize("levels", [None, 17])
def test_the_units_of_old_checkpoints_are_this_codec(levels):
    old = {"shape": [3], "shift": 8.5, "width": 7.3, "levels": levels, "low": 0.0, "high": 16.0}
    recipe = updated({"units": {"_target_": "scoresde.data.Units", **old}})["units"]
    codec, x = build(recipe), torch.randn(20, 3)
    wanted = x * 7.3 + 8.5
    if levels is not None:
        wanted = (x.double() * 7.3 + 8.5).floor().clamp(0, 16).byte()
    assert torch.equal(codec.decode(x), wanted)
    assert codec.range == ((0 - 8.5) / 7.3, ((levels or 16) - 8.5) / 7.3)


def test_old_names_work_with_a_warning():
    raw = table()
    with pytest.warns(FutureWarning, match=r"Dataset\(codec=\)"):
        data = Dataset("old", raw, raw, raw, scaling=Scaling(1.0, 2.0))
    assert torch.equal(data.encode(raw), (raw - 1.0) * 0.5)
    assert data.scaling == Scaling(1.0, 2.0)
    with pytest.warns(FutureWarning, match="codec"):
        assert data.units is data.codec
    with pytest.warns(FutureWarning, match=r"Affine\.scaling"):
        assert data.codec.scaling == Scaling(1.0, 2.0)
    pixels = data_of(torch.zeros(2, 1).byte(), levels=4)
    with pytest.warns(FutureWarning, match="encode_at"):
        assert pixels.encode(torch.zeros(1, 1).byte(), 0.25).tolist() == [[-0.875]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2,), 0.0, 0.0), r"width .*\b0\.0"),
        (((2,), 0.0, [0.0, 0.0]), r"width .*0\.0, 0\.0"),
        (((2,), 0.0, [1.0, -1.0]), r"width .*1\.0, -1\.0"),
        (((2,), math.nan), "shift .*nan"),
        (((2,), [1.0, 2.0, 3.0]), r"shift .*\(2,\).*1\.0, 2\.0, 3\.0"),
        (((2,), "word"), "shift .*word"),
        (((2,), 0.0, 1.0, None, 0.0, 1.0, "float16"), "dtype .*float16"),
    ],
)
def test_numbers_that_make_no_codec_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Affine(*arguments)


# --- Data that do not fit their process ----------------------------------------------------------


def said(values, process=None, **options):
    return check_scales(data_of(values, **options), process or VPSDE())


@pytest.mark.parametrize("process", [VPSDE(), SubVPSDE(), VESDE(), RectifiedFlow()], ids=str)
def test_nothing_is_said_of_data_that_fit(process):
    assert said(table(), process) == []
    assert check_scales(two_moons(count=1000), process) == []
    assert check_scales(digits(), process) == []


def test_columns_too_small_for_one_scale_are_named():
    (sentence,) = said(table(), standardise=Whole())
    assert sentence.startswith("Column 0 of standard deviation down to 3.")
    assert "least noise, 0.001" in sentence


@pytest.mark.parametrize("process", [VPSDE(), VESDE(), RectifiedFlow()], ids=str)
def test_data_larger_than_the_noise_are_named(process):
    values = 500 * torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1] /= 500
    sentences = said(values, process, standardise=False)
    assert sentences[0].startswith("Columns 0, 2 of size up to 5")
    assert "at t = 1" in sentences[0]


def test_columns_that_are_nearly_tied_are_named():
    z = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    tied = z.clone()
    tied[:, 4] = z[:, 1] - z[:, 3] + 1e-3 * z[:, 4]
    (sentence,) = said(tied)
    assert sentence.startswith("Columns 1, 3, 4 are nearly tied")
    exact = data_of(tied).encode(tied).double()
    least = float(torch.linalg.eigvalsh(torch.cov(exact.T)).clamp(min=0).sqrt()[0])
    assert f"standard deviation {least:.2g} " in sentence
    tied[:, 0] = tied[:, 2]
    assert "(and 1 more)" in said(tied)[0]


def test_a_constant_column_is_no_tie_and_is_not_named_twice():
    values = torch.cat((table(), torch.ones(4000, 1)), 1)
    assert said(values) == []
    assert said(values[:, [0, 2]], standardise=False)[0].startswith("Column 1 of standard")
