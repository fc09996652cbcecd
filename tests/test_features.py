"""Fourier features of the input, and the levels that a recipe takes from the data."""

import math

import pytest
import torch

from scoresde import InputError
from scoresde.configuration import measured
from scoresde.data import Dataset, digits, two_moons
from scoresde.nn import MLP, Architecture, FourierFeatures, UNet
from scoresde.recipe import build, describe


def test_the_frequencies_of_256_levels_are_the_published_ones():
    found = FourierFeatures(256).frequencies
    assert found == pytest.approx([2 * math.pi * 2**6, 2 * math.pi * 2**7])


def test_they_tell_where_in_its_step_a_value_lies():
    """At the centres of all levels the shorter wave is the same, and the longer alternates."""
    x = ((2 * torch.arange(17, dtype=torch.float64) + 1) / 17 - 1).reshape(17, 1)
    sin_long, sin_short, cos_long, cos_short = FourierFeatures(17)(x)[:, 1:].unbind(1)
    torch.testing.assert_close(cos_short, torch.ones_like(cos_short))
    torch.testing.assert_close(sin_short, torch.zeros_like(cos_short))
    torch.testing.assert_close(cos_long**2 + sin_long**2, torch.ones_like(cos_long))
    signs = torch.stack((sin_long, cos_long), 1)
    torch.testing.assert_close(signs[1:], -signs[:-1])
    quarter = FourierFeatures(17)(x + 0.25 * 2 / 17)[:, 2]
    torch.testing.assert_close(quarter, torch.ones_like(quarter))


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0)])
def test_a_range_and_a_scale_only_move_them(ends):
    low, high = ends
    x = torch.linspace(low, high, 7, dtype=torch.float64).reshape(7, 1)
    whole = FourierFeatures(17)((2 / (high - low)) * x)[:, 1:]
    torch.testing.assert_close(FourierFeatures(17, low, high)(x)[:, 1:], whole)
    divided = FourierFeatures(17, low, high, sigma_data=0.4)(x / 0.4)[:, 1:]
    torch.testing.assert_close(divided, whole)


@pytest.mark.parametrize(
    "network",
    [
        UNet(
            (1, 6, 10), width=8, blocks=1, architecture=Architecture(features=FourierFeatures(17))
        ),
        MLP((2, 3), width=8, features=FourierFeatures(17)),
        MLP(3, width=8, features=FourierFeatures(17)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_networks_see_them(network):
    """Without the input itself the network has their period, of two steps."""
    draw = torch.Generator().manual_seed(0)
    for weight in network.parameters():  # it starts as zero
        torch.nn.init.normal_(weight, std=0.1, generator=draw)
    first = network.conv_in if isinstance(network, UNet) else network.linear_in
    own = network.shape[0] if isinstance(network, UNet) else math.prod(network.shape)
    with torch.no_grad():
        first.weight[:, :own] = 0
        x = torch.randn(2, *network.shape, generator=draw)
        one, period, part = (network(x + d, torch.zeros(2)) for d in (0, 4 / 17, 0.05))
    assert one.shape == x.shape
    torch.testing.assert_close(period, one, rtol=0, atol=2e-5)
    assert float((part - one).abs().max()) > 5e-3
    again = build(describe(network))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FourierFeatures(1), "levels.*1"),
        (lambda: FourierFeatures(17, 1.0, -1.0), r"low.*1\.0 and -1\.0"),
        (lambda: FourierFeatures(17, sigma_data=0.0), r"sigma_data.*0\.0"),
        (lambda: Architecture(features=17), "features .* 17"),
        (lambda: MLP(2, features=17), "features .* 17"),
    ],
)
def test_wrong_settings(make, name):
    with pytest.raises(InputError, match=name):
        make()


PLAN = {
    "loss": {"decoder": {"levels": "auto", "low": "auto", "high": "auto"}},
    "network": {"features": {"levels": "auto", "sigma_data": "auto"}, "shape": None},
    "data": {"levels": "auto"},
}


def test_levels_are_those_of_the_data():
    data = digits()
    found = measured(PLAN, data)
    assert found["loss"]["decoder"] == {"levels": 17, "low": -1.0, "high": 1.0}
    assert found["network"]["features"] == {
        "levels": 17,
        "sigma_data": round(data.sigma_data, 4),
    }
    assert found["data"] == {"levels": "auto"}
    raw = [data.split(split) for split in ("train", "validation", "test")]
    half = Dataset.of("digits", raw, levels=17, centred=False)
    assert measured(PLAN, half)["loss"]["decoder"] == {"levels": 17, "low": 0.0, "high": 1.0}


def test_real_data_have_no_decoder_and_no_features():
    found = measured(PLAN, two_moons(count=100))
    assert found["loss"] == {"decoder": None}
    assert found["network"] == {"features": None, "shape": [2]}
