"""Pairs of examples and sources: the law of what an operator makes, folders, flips, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import VPSDE, GaussianModel, InputError
from scoresde.codec import Affine
from scoresde.data import (
    JPEG,
    Dataset,
    DatasetExamples,
    Degradation,
    digits,
    folder_pairs,
    pairs,
)
from scoresde.inverse import DPS, MMPS, Observation
from scoresde.model import BridgeModel
from scoresde.nn import MLP
from scoresde.operators import Blur, Downsampling, NonLinear, hole
from scoresde.sample import UniPC
from scoresde.sde import InDI
from scoresde.streams import Streams
from scoresde.train.dropout import check_dropout


def levels(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, 1, 4, 6), generator=generator).to(torch.uint8)


def few(**options):
    return Dataset.of("few", [levels(seed=s) for s in range(3)], levels=16, **options)


def in_levels(x):
    """Model units back to the values from 0 to 16 that an integer k fills from k to k + 1."""
    return 8 * (x.double() + 1)


@pytest.mark.parametrize("operator", [Blur(std=0.8), hole((1, 4, 6), 2)], ids=["blur", "hole"])
def test_a_source_is_the_measurement_of_the_middle_of_levels(operator):
    data = pairs(few(), operator)
    batch = data.batch("test", Streams.of(3, seeds=[5, 0, 7]))
    right = operator(levels(seed=2)[[5, 0, 7]].double() + 0.5)
    torch.testing.assert_close(
        in_levels(batch.cond["source"]), right, rtol=0, atol=1e-5, check_dtype=False
    )
    assert batch.cond["source"].dtype == torch.float32
    rows = torch.tensor([5, 0, 7])
    assert torch.equal(data.conditions_of("test", rows)["source"], batch.cond["source"])


def test_a_smaller_measurement_comes_back_by_the_pseudo_inverse():
    source = pairs(few(), Downsampling(2)).conditions_of("test")["source"]
    blocks = (levels(seed=2).double() + 0.5).unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    torch.testing.assert_close(
        in_levels(source)[:, :, ::2, ::2], blocks, rtol=0, atol=1e-5, check_dtype=False
    )
    assert torch.equal(source[:, :, 1::2], source[:, :, ::2])


def test_noise_has_its_standard_deviation_and_is_fresh_in_every_epoch():
    clean, std = pairs(few(), Blur(std=0.8)), 0.7
    data = pairs(few(), Blur(std=0.8), std)
    base = clean.conditions_of("train")["source"]
    streams = Streams.of(0, batch=40)
    noises = [data.batch("train", streams, epoch).cond["source"] - base for epoch in range(40)]
    noise = 8 * torch.stack(noises).double()
    n = noise.numel()
    assert float(noise.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * n))
    assert float(noise.mean()) == pytest.approx(0, abs=4 * std / math.sqrt(n))
    product = float((noise[0] * noise[1]).mean())
    assert product == pytest.approx(0, abs=4 * std**2 / math.sqrt(n / 40))
    alone = data.batch("train", Streams.of(0, seeds=[7]), 3).cond["source"]
    assert torch.equal(alone[0] - base[7], noises[3][7])


def test_a_flip_mirrors_both():
    data = pairs(few(flip=True, dequantise=False), hole((1, 4, 6), 2, at=(1, 0)))
    mirrored = 0
    for row in range(40):
        batch = data.batch("train", Streams.of(0, seeds=[row]))
        raw = levels()[row : row + 1]
        flipped = bool((data.decode(batch.x) == raw.flip(-1)).all())
        mirrored += flipped
        x = raw.flip(-1) if flipped else raw
        seen = hole((1, 4, 6), 2, at=(1, 4 if flipped else 0)).mask
        right = torch.where(seen, x.double() + 0.5, 0.0)
        torch.testing.assert_close(
            in_levels(batch.cond["source"]), right, rtol=0, atol=1e-5, check_dtype=False
        )
    assert 8 < mirrored < 32


def test_real_values_and_examples_read_on_demand_have_sources_too():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) * 5 + 100
    half = NonLinear(lambda v: 0.5 * v)
    data = pairs(Dataset.of("table", [x] * 3), half)
    raw = data.decode(data.batch("test", Streams.of(0, batch=4)).cond["source"])
    torch.testing.assert_close(raw, 0.5 * x[:4])

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, i):
            return x[i]

    lazy = pairs(Dataset.of("items", [DatasetExamples(Items())] * 3, standardise=False), half)
    torch.testing.assert_close(lazy.conditions_of("train", slice(2))["source"], 0.5 * x[:2])


def test_jpeg_blurs_detail_and_keeps_what_is_flat():
    x = levels(4).float() + 0.5
    coarse, fine = (JPEG(quality, levels=16)(x) for quality in (5, 95))
    assert float((fine - x).abs().mean()) < 0.3 < float((coarse - x).abs().mean())
    flat = JPEG(30)(torch.full((2, 3, 8, 8), 128.5))
    torch.testing.assert_close(flat, torch.full_like(flat, 128.5))
    source = pairs(few(), JPEG(5, levels=16)).conditions_of("test", slice(1))["source"]
    torch.testing.assert_close(
        in_levels(source).float(), JPEG(5, levels=16)(levels(seed=2)[:1] + 0.5)
    )


def test_jpeg_has_no_posterior():
    exact = GaussianModel(torch.zeros(1, 8, 8), 1.0, VPSDE())
    codec = Affine.of_levels((1, 8, 8), 17)
    observed = Observation(JPEG(levels=17), torch.full((1, 8, 8), 8.0), 1.0, codec)
    for method in (MMPS, DPS):
        with pytest.raises(InputError, match=r"operator .*posterior.*JPEG"):
            UniPC(2)(method(exact, observed), shape=(2, 1, 8, 8), seed=0)


def save(folder, images):
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    sharp = {
        f"{i % 3}/{i}.png": generator.integers(0, 256, (6, 6, 3), np.uint8) for i in range(20)
    }
    save(tmp_path / "sharp", sharp)
    save(tmp_path / "soft", {name: image // 2 for name, image in sharp.items()})
    return tmp_path


def test_two_folders_are_paired_by_name(folders):
    data = folder_pairs(folders / "sharp", folders / "soft", size=6, fractions=[0.5, 0.25, 0.25])
    assert data.shape == (3, 6, 6)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [10, 5, 5]
    for split in ("train", "test"):
        raw = data.split(split)[:]
        source = data.codec.decode(data.conditions_of(split)["source"])
        assert torch.equal(source, raw // 2)
    batch = data.batch("train", Streams.of(0, batch=4))
    assert batch.cond["source"].shape == batch.x.shape == (4, 3, 6, 6)
    again = folder_pairs(folders / "sharp", folders / "soft", size=6, fractions=[0.5, 0.25, 0.25])
    assert torch.equal(again.train[:], data.train[:])
    save(folders / "soft", {"0/0.png": np.zeros((6, 6, 3), np.uint8)})
    changed = folder_pairs(folders / "sharp", folders / "soft", size=6, fractions=None)
    assert int((changed.conditions_of("test")["source"] < -0.99).flatten(1).all(1).sum()) == 1


def test_an_image_without_a_source_is_named(folders):
    (folders / "soft/1/4.png").unlink()
    with pytest.raises(InputError, match=r"data\.source.*1/4\.png.*1 of 20"):
        folder_pairs(folders / "sharp", folders / "soft", size=6)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: pairs(few(), "blur"), "operator.*blur"),
        (lambda: pairs("digits", Blur(std=1.0)), "clean.*str"),
        (lambda: pairs(few(), Blur(std=1.0), -1.0), "std.*-1"),
        (lambda: pairs(few(), NonLinear(lambda x: x[..., :2])), r"operator.*\(1, 4, 2\)"),
        (lambda: JPEG(0), "quality.*0"),
        (lambda: JPEG(levels=1), "levels.*1"),
        (lambda: pairs(few(), JPEG()), r"levels.*16.*256.*levels=16"),
        (lambda: JPEG()(torch.zeros(2, 4, 8, 8)), r"\(4, 8, 8\)"),
        (
            lambda: dataclasses.replace(
                few(conditions={"source": [torch.zeros(40, 1)] * 3}),
                degradation=Degradation(Blur(std=1.0)),
            ),
            "source",
        ),
    ],
)
def test_misuse_is_a_sentence(act, words):
    with pytest.raises(InputError, match=words):
        act()


def test_a_source_is_not_left_out():
    network = MLP((1, 8, 8), width=8, depth=1, conditions={"source": 64})
    with pytest.raises(InputError, match=r"condition_dropout.*0\.1"):
        check_dropout(BridgeModel(network, InDI()), pairs(digits(), Blur(std=1.0)), 0.1)
