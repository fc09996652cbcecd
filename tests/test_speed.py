"""A trained network made faster computes what it did."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from scoresde import VPSDE, InputError, Likelihood, ScoreModel
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.inverse import MMPS, Masking, Observation
from scoresde.nn import MLP, UNet, speed
from scoresde.nn.speed import accelerated
from scoresde.sample import DDIM
from scoresde.times import LogSNRGrid
from tests.test_run import ROOT, TINY


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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own look at its input
def test_a_compiled_network_serves_traces_and_posteriors():
    """Both go back through one pass several times; guidance runs on batches of two sizes."""
    if not speed.can_compile(torch.device("cpu")):
        pytest.skip("there is no compiler here")
    torch.manual_seed(0)
    network = MLP(4, width=8, depth=1, classes=3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain = ScoreModel(copy.deepcopy(network), VPSDE())
    fast = ScoreModel(accelerated(network, mode="default"), VPSDE())
    x, label = torch.randn(3, 4), torch.tensor([0, 1, 2])
    mask, y = torch.tensor([True, True, False, False]), torch.tensor([0.5, -0.5, 0.0, 0.0])
    seen = Observation(Masking(mask), y, 0.3)
    for probes in (1, 2, "exact"):  # one probe alone would have the buffers given away
        exact = Likelihood(probes, rtol=0.1, atol=0.1)
        values = [exact(m.eval(), x, seed=0, label=label).log_prob for m in (plain, fast)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    for around in (lambda m: MMPS(m, seen), lambda m: ClassifierFreeGuidance(m, 2.0)):
        sampler = DDIM(3, LogSNRGrid())
        drawn = [sampler(around(m), (3, 4), seed=0, label=label).x for m in (plain, fast)]
        torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "compiled"), [("float32", "MLP"), ("bf16", "HalfPrecision")]
)
def test_the_whole_of_what_is_computed_is_compiled(precision, compiled, monkeypatch):
    """The compiler itself runs in the tests of training."""
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: asked.append((type(self).__name__, mode))
    )
    monkeypatch.setattr(speed, "can_compile", lambda device: True)
    accelerated(MLP(2, width=8, depth=1), precision, "reduce-overhead")
    assert asked == [(compiled, "reduce-overhead")]


@pytest.fixture
def broken(monkeypatch):
    """A compiler that fails when a function is called, as torch's does."""

    def fail(*arguments):
        raise RuntimeError("no compiler\nand 130 further lines")

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: fail)
    speed._obstacle.cache_clear()
    yield
    speed._obstacle.cache_clear()


@pytest.mark.usefixtures("broken")
def test_where_nothing_can_be_compiled_one_line_says_so(caplog):
    network = MLP(2, width=8, depth=1)
    assert accelerated(network, mode="default")(torch.zeros(2, 2), torch.zeros(2)).shape == (2, 2)
    (record,) = caplog.records
    said = record.getMessage()
    assert "not compiled" in said
    assert "torch.compile" in said
    assert "(no compiler)" in said
    with pytest.raises(InputError, match="shape"):  # an error of the network stays its own
        network(torch.zeros(2, 3), torch.zeros(2))


def test_a_training_without_a_compiler_goes_on(tmp_path):
    """In a process of its own, whose compilers are out of reach."""
    nowhere = {"PATH": "/nonexistent", "CC": "/nonexistent", "CXX": "/nonexistent"}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "scoresde.run", "+experiment=moons_vp", *TINY),
            *("train.compile=true", "data.count=400", "hydra.run.dir=run"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), **nowhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert "Traceback" not in said
    assert said.count("The network is not compiled") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "precision .*float32, bf16, fp16.* int8"),
        ({"mode": "fastest"}, "compile .*fastest"),
    ],
    ids=["precision", "mode"],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        accelerated(MLP(2, width=8, depth=1), **arguments)
