"""Restoring examples: the law of the draws in raw units, what is written, and what is refused."""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import VPSDE, GaussianModel, InputError
from scoresde.codec import Affine
from scoresde.inverse import DDNM, MMPS, Masking, Observation, PiGDM, hole, random_mask
from scoresde.metrics import psnr, ranks, spread_ratio, ssim
from scoresde.operators import Downsampling
from scoresde.sample import UniPC
from scoresde.tasks.parts import Parts
from scoresde.tasks.restoration import Restoration, restore, scores_of, simulate
from scoresde.times import LogSNRGrid
from tests.test_run import ROOT, TINY, program, refused

# Two features of a table in units of their own, the first of them observed.
WIDTH, SHIFT = torch.tensor([100.0, 0.01]), torch.tensor([2000.0, -3.0])
CODEC = Affine((2,), shift=SHIFT.tolist(), width=WIDTH.tolist(), dtype="float64")
C = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
FLOW = UniPC(40, LogSNRGrid())


def of_table(y, std, draws, method=MMPS, sampler=FLOW):
    model = GaussianModel(torch.zeros(2).double(), covariance=C, sde=VPSDE())
    seen = Observation(Masking(torch.tensor([True, False])), y, std, CODEC)
    return Restoration(model, method, sampler, seen, CODEC, len(y), draws, seed=0)


def parts_in(folder):
    return Parts(folder / "parts").claim({"what": "a test"})


def arrays(folder):
    with np.load(folder / "restored.npz") as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file.files}


def test_draws_have_the_posterior_of_raw_units(tmp_path):
    """y = 2100 with std 50 is 1 with std .5 in model units; four standard errors and 2 %."""
    y = torch.tensor([[2100.0, 0.0], [1900.0, 0.0]], dtype=torch.float64)
    n = 3000
    results = restore(of_table(y, 50.0, n), tmp_path, parts_in(tmp_path), progress=False)
    x = arrays(tmp_path)["x"].unflatten(0, (2, n))
    assert results["nfe"] == 40
    for i, sign in enumerate((1, -1)):
        mean = SHIFT + WIDTH * sign * torch.tensor([0.8, 0.64])
        std = WIDTH * torch.tensor([0.2, 0.488]).sqrt()
        off = (x[i].mean(0) - mean) / std
        assert float(off.abs().max()) < 4 / n**0.5 + 0.02
        assert float((x[i].std(0) / std - 1).abs().max()) < 4 / (2 * n) ** 0.5 + 0.02


@pytest.mark.parametrize("method", [MMPS, PiGDM, DDNM(10)], ids=["MMPS", "PiGDM", "DDNM"])
def test_what_was_seen_without_noise_stays_as_it_was(method, tmp_path):
    y = torch.tensor([[2100.0, 0.0]], dtype=torch.float64)
    sampler = UniPC(10, LogSNRGrid(), final_denoise=False)
    restore(of_table(y, 0.0, 5, method, sampler), tmp_path, parts_in(tmp_path), progress=False)
    x = arrays(tmp_path)["x"]
    torch.testing.assert_close(x[:, 0], torch.full((5,), 2100.0).double(), rtol=1e-12, atol=0)
    assert float(x[:, 1].std()) > 1e-4


def test_batches_and_an_interruption_change_nothing(tmp_path):
    y = torch.tensor([[2100.0, 0.0], [1950.0, 0.0]], dtype=torch.float64)
    one = of_table(y, 50.0, 3)
    for name, size in (("a", 6), ("b", 4)):
        (tmp_path / name).mkdir()
        parts = parts_in(tmp_path / name)
        restore(one, tmp_path / name, parts, batch_size=size, progress=False)
    first, second = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    torch.testing.assert_close(first["x"], second["x"], rtol=1e-12, atol=0)
    assert torch.equal(first["nfe"], second["nfe"])


def test_simulated_observations_are_of_the_middle_of_levels():
    raw = torch.tensor([[[[0, 4], [8, 16]]]], dtype=torch.uint8)
    codec = Affine.of_levels((1, 2, 2), 17)
    y = simulate(Downsampling(2), raw, codec, 0.0, seed=0)
    assert float(y) == 7.5
    noisy = simulate(Downsampling(2), raw.expand(4000, 1, 2, 2), codec, 2.0, seed=0)
    assert float(noisy.std()) == pytest.approx(2.0, rel=4 / 8000**0.5)


@pytest.mark.parametrize("span", [0, -1.0, math.inf])
def test_decibels_need_a_positive_span(span):
    with pytest.raises(InputError, match=f"span must be positive and finite, got {span};"):
        psnr(torch.ones(1, 4), torch.zeros(1, 4), span)


def test_decibels_and_similarity_of_known_errors():
    truth = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    noise = noise / noise.flatten(1).square().mean(1).sqrt()[:, None, None, None]
    torch.testing.assert_close(
        psnr(truth + 0.01 * noise, truth, 1.0), torch.full((3,), 40.0).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        psnr(255 * truth + 2.55 * noise, 255 * truth, 255.0),
        torch.full((3,), 40.0).double(),
        rtol=1e-4,
        atol=0,
    )
    assert ssim(truth, truth, 1.0).tolist() == pytest.approx([1.0] * 3)
    assert float(ssim(truth + 0.3 * noise, truth, 1.0).max()) < 0.9


def test_ranks_and_spread_of_honest_draws_and_of_narrow_ones():
    """1000 truths among 9 draws of the same law; ranks uniform within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(1000, 10, 4, generator=generator)
    draws, truth = both[:, 1:], both[:, 0]
    share = torch.bincount(ranks(draws, truth).flatten(), minlength=10) / 4000
    assert float((share - 0.1).abs().max()) < 4 * (0.09 / 4000) ** 0.5
    assert spread_ratio(draws, truth) == pytest.approx(1, abs=4 / 8000**0.5)
    assert spread_ratio(0.5 * draws, truth) > 1.5
    whole = ranks((3 * draws).round(), (3 * truth).round())  # with ties
    share = torch.bincount(whole.flatten(), minlength=10) / 4000
    assert float((share - 0.1).abs().max()) < 4 * (0.09 / 4000) ** 0.5


def test_scores_see_draws_that_are_too_sure():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(200, 2, generator=generator).double() * WIDTH + SHIFT
    honest = torch.randn(200, 8, 2, generator=generator).double() * WIDTH + SHIFT
    sure = SHIFT + 0.2 * (honest - SHIFT)
    assert scores_of(honest, truth, CODEC)["ranks_p_value"] > 0.01
    assert scores_of(sure, truth, CODEC)["ranks_p_value"] < 1e-6
    assert scores_of(sure, truth, CODEC)["spread_ratio"] > 2
    # Two columns of other scales weigh the same: the error of the mean of eight is 1 + 1/8.
    found = scores_of(honest, truth, CODEC)
    assert found["rmse_mean"] == pytest.approx((1 + 1 / 8) ** 0.5, rel=4 / 800**0.5)
    assert "psnr_mean" not in found


def test_holes_and_random_masks():
    mask = hole((3, 6, 8), (2, 4), at=(1, 3)).mask
    assert int((~mask).sum()) == 3 * 8
    assert not bool(mask[:, 1:3, 3:7].any())
    some = random_mask((3, 10, 10), 0.3, seed=1).mask
    assert int(some[0].sum()) == 30
    assert torch.equal(some[0], some[2])
    for make, message in (
        (lambda: hole((1, 4, 4), 4), "size.*4"),
        (lambda: hole((1, 4, 4), 2, at=(3, 0)), "2 at"),
        (lambda: hole((4,), 2), "size"),
        (lambda: random_mask((1, 4, 4), 1.0), "share.*1.0"),
    ):
        with pytest.raises(InputError, match=message):
            make()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A training of a few updates: what is tested is where numbers go."""
    folder = tmp_path_factory.mktemp("digits")
    program(*TINY, "hydra.run.dir=run", cwd=folder)
    return folder


FAST = ("task=restore", "checkpoint=run", "restore.sampler.steps=3", "progress=false")


def test_a_hole_in_digits_is_filled(digits):
    program(
        *FAST,
        "operator=hole",
        "examples=3",
        "draws=2",
        "images=true",
        "hydra.run.dir=a",
        cwd=digits,
    )
    found = arrays(digits / "a")
    x, mask = found["x"].unflatten(0, (3, 2)), hole((1, 8, 8), 4).mask
    assert x.dtype == torch.uint8
    y = found["y"] - 0.5
    assert bool((x.double() == y[:, None])[..., mask].all())  # every level that was seen
    results = json.loads((digits / "a" / "result.json").read_text())
    assert (results["examples"], results["draws"], results["nfe"]) == (3, 2, 4)
    assert math.isfinite(results["psnr_mean"])
    pictures = {path.name for path in (digits / "a" / "images").iterdir()}
    assert pictures == {
        f"{i:08d}_{n}.png"
        for i in range(3)
        for n in ("draw0", "draw1", "mean", "spread", "observed")
    }
    assert (digits / "a" / "report.html").exists()


def test_pictures_and_a_mask_from_files_are_restored_from_another_folder(digits, tmp_path):
    """8-bit pictures of 17 levels, with a mask painted white where a pixel is seen."""
    (tmp_path / "in").mkdir()
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 17, (2, 8, 8))
    for name, picture in zip(("b.png", "a.png"), levels, strict=True):
        pixels = np.round(picture / 16 * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run = [text.replace("=run", f"={digits / 'run'}") for text in FAST]
    program(
        *run,
        "operator=masking",
        "operator.mask=mask.png",
        "source=in",
        "truth=in",
        "draws=1",
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    x = arrays(tmp_path / "out")["x"].numpy()
    assert (x[:, 0, 2:] == levels[::-1, 2:]).all()  # in the order of names


def test_missing_values_and_small_pictures_are_sources_too(digits):
    values = np.full((2, 8, 8), 5.5, np.float32)
    values[0, :3] = np.nan
    np.save(digits / "gaps.npy", values)
    program(*FAST, "operator=missing", "source=gaps.npy", "draws=1", "hydra.run.dir=b", cwd=digits)
    x = arrays(digits / "b")["x"]
    assert bool((x[1] == 5).all())
    assert bool((x[0, 0, 3:] == 5).all())
    np.save(digits / "small.npy", np.full((3, 1, 4, 4), 8.5, np.float32))
    program(
        *FAST,
        "operator=downsampling",
        "source=small.npy",
        "draws=2",
        "std=0.5",
        "hydra.run.dir=c",
        cwd=digits,
    )
    assert arrays(digits / "c")["x"].shape == (6, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "operator.*operator=hole"),
        (("operator=masking",), r"operator\.mask is required; set operator\.mask="),
        (("operator=hole", "operator.size=8"), "size.*8"),
        (("operator=hole", "source=nowhere.npy"), "nowhere.npy"),
        (("operator=hole", "truth=x.npy"), "truth.*source"),
        (("operator=hole", "std=-1"), "std.*-1"),
        (("operator=missing",), "NaN"),
        (("operator=downsampling", "operator.factor=3"), "factor.*3"),
        (("operator=grey",), "weights"),
        (("operator=hole", "method=ddnm", "std=0.5"), "std.*0.5"),
        (("operator=hole", "method=ddnm", "sampler=ddim"), "sampler.*DDNM"),
        (("operator=hole", "method=dps"), "std.*0"),
        (("operator=downsampling", "source=other.npy"), r"4, 4.*\(2, 1, 5, 5\)"),
        (("operator=masking", "operator.mask=other.npy"), r"mask.*\(8, 8\).*5"),
    ],
)
def test_what_cannot_be_restored_is_one_sentence(digits, arguments, message):
    np.save(digits / "other.npy", np.zeros((2, 1, 5, 5), np.float32))
    said = refused(*FAST, *arguments, "examples=2", "draws=1", cwd=digits)
    assert re.search(message, said)


def test_the_commands_of_the_page_run(digits):
    page = (ROOT / "docs/inverse.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    generator = np.random.default_rng(0)
    for name in ("photos", "originals"):
        (digits / name).mkdir()
        for i in range(2):
            pixels = generator.integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(digits / name / f"{i}.png")
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (8, 4))).save(digits / "mask.png")
    gaps = np.full((2, 8, 8), 5.5, np.float32)
    gaps[:, 0] = np.nan
    np.save(digits / "gaps.npy", gaps)
    assert len(lines) == 4
    for i, line in enumerate(lines):
        words = shlex.split(line.replace("checkpoint=RUN", "checkpoint=run"))[3:]
        quick = ["method.steps=3"] if "method=ddnm" in words else ["restore.sampler.steps=3"]
        few = [] if "draws=4" in words else ["draws=2"]
        quick += [*few, "examples=2", "progress=false", f"hydra.run.dir=page{i}"]
        program(*words, *quick, cwd=digits)
        assert (digits / f"page{i}" / "restored.png").exists()


def test_draws_without_a_spread_have_an_error():
    truth = torch.randn(12, 2, dtype=torch.float64)
    found = scores_of((truth + 3 * WIDTH)[:, None].expand(12, 4, 2), truth, CODEC)
    assert found["rmse_mean"] == pytest.approx(3)
    assert "spread_ratio" not in found
