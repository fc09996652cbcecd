"""A trained network made faster computes what it did."""

import pytest
import torch

from scoresde import VPSDE, InputError, ScoreModel
from scoresde.nn import MLP, UNet
from scoresde.nn.speed import accelerated
from scoresde.sample import DDIM


def model(make=lambda network: network):
    torch.manual_seed(0)
    network = UNet((1, 8, 8), width=16, multipliers=(1,), blocks=1, attention=())
    for parameter in network.parameters():  # some of which start as zero
        torch.nn.init.normal_(parameter, std=0.05)
    return ScoreModel(make(network), VPSDE()).eval()


@pytest.mark.parametrize(("precision", "error"), [("bf16", 3e-2), ("fp16", 4e-3)])
def test_half_the_precision_is_near_the_whole(precision, error):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])
    whole = model().noise(x, t).detach()
    half = model(lambda network: accelerated(network, precision)).noise(x, t).detach()
    assert half.dtype == torch.float32
    assert 0 < float((half - whole).abs().max()) < error * float(whole.abs().max())


def test_the_states_around_it_keep_their_precision():
    seen = []
    half = model(lambda network: accelerated(network, "bf16"))
    out = DDIM(3)(half, (2, 1, 8, 8), seed=0, callback=lambda step: seen.append(step.x.dtype))
    assert {out.x.dtype, *seen} == {torch.float32}


def test_norms_and_embeddings_keep_their_precision():
    network = accelerated(
        UNet((1, 8, 8), width=16, multipliers=(1,), blocks=1, attention=()), "bf16"
    )
    kinds = {type(m).__name__: p.dtype for m in network.modules() for p in m.parameters(False)}
    assert kinds["GroupNorm"] == torch.float32
    assert kinds["Conv2d"] == torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "compiled"), [("float32", "MLP"), ("bf16", "HalfPrecision")]
)
def test_the_whole_of_what_is_computed_is_compiled(precision, compiled, monkeypatch):
    """The compiler itself runs in the tests of training."""
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: asked.append((type(self).__name__, mode))
    )
    accelerated(MLP(2, width=8, depth=1), precision, "reduce-overhead")
    assert asked == [(compiled, "reduce-overhead")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "precision=int8 is unknown; give one of float32, bf16, fp16"),
        ({"mode": "fastest"}, "compile=fastest is unknown"),
    ],
    ids=["precision", "mode"],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        accelerated(MLP(2, width=8, depth=1), **arguments)
