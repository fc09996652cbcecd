"""The bounds of levels and of chains over whole splits: units, parts, resuming, the program."""

import json
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from scoresde import VPSDE, DiscreteVP, GaussianModel, InputError, Likelihood, VariationalBound
from scoresde.codec import DiscretisedGaussian, Levels
from scoresde.configuration import cut_of, measured
from scoresde.data import Dataset, UniformDequantisation
from scoresde.likelihood import DiscreteBound, ForwardVariance, GenerativeClassifier
from scoresde.report import figures as plots
from scoresde.sde import as_time
from scoresde.shapes import expand
from scoresde.tasks import evaluate_likelihood
from scoresde.tasks.classification import classify_examples
from scoresde.tasks.evaluation import Draws
from scoresde.tasks.likelihood_report import Evaluated, report_likelihood
from scoresde.tasks.parts import Parts
from tests.test_discrete_bound import BITS, SHARES, LinearLogSNR, Softmax, chain_bound
from tests.test_run import ROOT, program, refused

SDE = LinearLogSNR(13.3, -5.0)


def dice(n=120, dim=16, centred=True):
    """Independent values on 17 levels with known shares."""
    draw = torch.Generator().manual_seed(3)
    values = torch.multinomial(SHARES, n * dim, True, generator=draw).reshape(n, dim)
    return Dataset.of("dice", [values.to(torch.uint8)] * 3, levels=17, centred=centred)


def table(n=60):
    """Real values of a large scale, with their exact log-density."""
    raw = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double()
    raw = 1e4 + raw * torch.tensor([50.0, 300.0])
    return Dataset.of("table", [raw] * 3)


def evaluate(model, bound, data, **options):
    options = {"batch_size": 50, "progress": False, **options}
    return evaluate_likelihood(model, bound, data, **options)


def test_bits_of_levels_are_those_of_the_levels():
    """Without a dequantisation, of which bits/dim would know the width of a step."""
    data, model = dice(), Softmax(SDE, SHARES)
    found = evaluate(model, DiscreteBound(Levels(17), 60, draws=40), data)
    known = -SHARES.log2()[data.test.long()].mean(1)
    excess = found.values - known
    truth = chain_bound(SDE, 60) - BITS
    assert found.unit == "bits/dim"
    assert abs(float(excess.mean()) - truth) < 4 * float(excess.std()) / len(excess) ** 0.5
    assert truth > 4 * float(excess.std()) / len(excess) ** 0.5


@pytest.mark.parametrize("kind", ["levels", "real", "dequantised", "continuous"])
def test_the_parts_of_a_value_add_up_to_it(kind):
    model, data = GaussianModel(torch.zeros(2), 1.0, VPSDE()), table()
    bound = DiscreteBound(None, 30, ForwardVariance())
    if kind in ("levels", "dequantised"):
        model, data = Softmax(SDE, SHARES.float()), dice(40)
        bound = DiscreteBound(Levels(17) if kind == "levels" else None, 30)
    if kind == "continuous":
        bound = VariationalBound(4)
    found = evaluate(model, bound, data)
    names = "diffusion" if kind == "continuous" else "consistency"
    assert list(found.parts) == ["reconstruction", names, "prior"]
    torch.testing.assert_close(sum(found.parts.values()), found.values, rtol=1e-9, atol=1e-9)
    if kind != "continuous":
        torch.testing.assert_close(
            found.steps.double().sum(1), found.parts["consistency"], rtol=1e-4, atol=1e-5
        )
        assert found.steps.shape == (len(found.values), 30)


def test_real_data_are_in_nats_of_their_own_units():
    data, model = table(), GaussianModel(torch.zeros(2), 1.0, VPSDE())
    exact = evaluate(model, Likelihood("exact"), data)
    found = evaluate(model, DiscreteBound(None, 200, ForwardVariance(), draws=100), data)
    assert found.unit == "nats"
    away = found.values - exact.values
    assert abs(float(away.mean())) < 4 * float(away.std()) / len(away) ** 0.5 + 0.05
    # The claimed errors are those of each example.
    assert 0.8 < float(found.errors.square().mean().sqrt() / away.std()) < 1.3
    assert float(exact.mean) > 10


def test_an_evaluation_is_resumed_with_its_parts(tmp_path):
    data, model = dice(30), Softmax(SDE, SHARES.float())
    bound, parts = DiscreteBound(Levels(17), 12), Parts(tmp_path).claim({"a": "b"})
    whole = evaluate(model, bound, data, batch_size=10, parts=parts)
    (tmp_path / "00000010-00000020.npz").unlink()
    before = model.calls
    again = evaluate(model, bound, data, batch_size=10, parts=parts)
    assert 3 * (model.calls - before) == before  # one batch of three
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.steps, whole.steps)
    for name, part in whole.parts.items():
        assert torch.equal(again.parts[name], part)


def test_pieces_of_an_earlier_release_have_no_parts(tmp_path):
    data, bound = table(), VariationalBound(4)
    model, parts = GaussianModel(torch.zeros(2), 1.0, VPSDE()), Parts(tmp_path)
    whole = evaluate(model, bound, data, parts=parts)
    path = tmp_path / "00000000-00000050.npz"
    with np.load(path) as file:
        old = {k: v for k, v in file.items() if not k.startswith("part_")}
    np.savez(path, **old)
    again = evaluate(model, bound, data, parts=parts)
    assert again.parts == {}
    assert torch.equal(again.values, whole.values)


def test_what_means_nothing_for_levels_is_refused():
    data, model = dice(8), Softmax(SDE, SHARES.float())
    bound = DiscreteBound(Levels(17), 5)
    for draws in (Draws(2), Draws(4, weighted=True), Draws(1, UniformDequantisation())):
        with pytest.raises(InputError, match=f"draws={draws.count}"):
            evaluate(model, bound, data, draws=draws)
    evaluate(model, DiscreteBound(None, 5), data, draws=Draws(2))  # the remedy
    with pytest.raises(InputError, match=r"256.*17"):
        evaluate(model, DiscreteBound(Levels(256), 5), data)
    with pytest.raises(InputError, match=r"17.*real"):
        evaluate(GaussianModel(torch.zeros(2), 1.0, VPSDE()), bound, table())


def test_a_report_tells_the_parts_apart(tmp_path):
    data, model = dice(20), Softmax(SDE, SHARES.float())
    found = evaluate(model, DiscreteBound(Levels(17), 40, draws=8), data)
    results = report_likelihood(
        Evaluated(data, found), None, tmp_path, title="dice", remarks=["A remark."]
    )
    page = (tmp_path / "report.html").read_text()
    for text in ("Parts of the bound", "reconstruction", "consistency", "prior", "A remark."):
        assert text in page
    assert "40 steps" in page
    summary = json.loads((tmp_path / "likelihood.json").read_text())
    parts = [summary[name] for name in ("reconstruction", "consistency", "prior")]
    assert sum(parts) == pytest.approx(summary["mean"])
    assert results["consistency_standard_error"] > 0
    with np.load(tmp_path / "likelihood.npz") as file:
        assert file["step_time"][[0, -1]].tolist() == [1 / 40, 1.0]
        assert file["step_mean"].sum() == pytest.approx(summary["consistency"], rel=1e-4)
        assert file["prior"].shape == (20,)


@pytest.mark.parametrize("terms", [torch.zeros(3, 5), torch.ones(1, 3), torch.rand(4, 1000)])
def test_steps_are_drawn(terms, tmp_path):
    path = plots.bound_steps(terms, tmp_path / "steps.png", "nats per step")
    assert path.stat().st_size > 1000


def plan_of(name):
    folder = ROOT / "conf/likelihood"
    own = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    return {k: v for k, v in own.items() if k != "defaults"}


@pytest.mark.parametrize("name", ["discrete", "levels"])
def test_the_data_and_the_process_fill_in_the_recipe(name):
    plan = measured(plan_of(name), dice(3))["decoder"]
    assert (plan["levels"], plan["low"], plan["high"]) == (17, -1.0, 1.0)
    plan = measured(plan_of(name), dice(3, centred=False))["decoder"]
    assert (plan["levels"], plan["low"], plan["high"]) == (17, 0.0, 1.0)
    assert measured(plan_of(name), table())["decoder"] is None


def test_a_chain_has_its_own_steps_and_levels_the_lower_variance():
    at_levels, real = (measured(plan_of("discrete"), data) for data in (dice(3), table()))
    assert cut_of(at_levels, VPSDE())["steps"] == 1000
    assert cut_of(at_levels, DiscreteVP())["steps"] is None
    assert cut_of({"steps": 50}, VPSDE()) == {"steps": 50}
    assert cut_of({"draws": 8}, VPSDE()) == {"draws": 8}
    assert at_levels["variance"]["_target_"].endswith("PosteriorVariance")
    assert real["variance"]["_target_"].endswith("ForwardVariance")


# --- The program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on integers and one on real values of a large scale, without much training."""
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(0)
    np.savez(folder / "dice.npz", x=draw.integers(0, 5, (60, 3)).astype("uint8"))
    np.save(folder / "table.npy", (1e4 + 50 * draw.standard_normal((60, 3))).astype("float32"))
    each = {"dice": ("dice.npz", "5"), "table": ("table.npy", "null")}
    for name, (file, levels) in each.items():
        program(
            *("+experiment=moons_vp", "data=array", f"data.path={folder / file}"),
            *(f"data.levels={levels}", "examples=4", "likelihood.probes=1"),
            *("train.steps=3", "count=4", "samplers=null", "baselines=false", "progress=false"),
            *("likelihood.rtol=0.1", "likelihood.atol=0.1", f"hydra.run.dir={name}"),
            cwd=folder,
        )
    return folder


TASK = ("task=likelihood", "progress=false", "likelihood.draws=6")


@pytest.mark.parametrize(("run", "unit"), [("dice", "bits/dim"), ("table", "nats")])
def test_the_program_evaluates_a_chain(run, unit, runs, tmp_path):
    told = program(
        *(*TASK, f"checkpoint={runs / run}", "likelihood=discrete", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    summary = json.loads((tmp_path / "out/likelihood.json").read_text())
    assert summary["unit"] == unit
    assert summary["nfe"] == 6 + 4
    parts = [summary[name] for name in ("reconstruction", "consistency", "prior")]
    assert sum(parts) == pytest.approx(summary["mean"])
    said = json.loads((tmp_path / "out/result.json").read_text())["likelihood"]
    assert ("levels=5" in said) == (run == "dice")
    assert "steps=1000" in said
    page = (tmp_path / "out/report.html").read_text()
    assert ("dequantised integers" in page) == (run == "dice")
    assert ("dequantised integers" in told.stdout + told.stderr) == (run == "dice")
    assert list((tmp_path / "out").glob("steps_*.png"))


def test_the_program_bounds_levels_in_continuous_time(runs, tmp_path):
    program(
        *(*TASK, f"checkpoint={runs / 'dice'}", "likelihood=levels", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    summary = json.loads((tmp_path / "out/likelihood.json").read_text())
    parts = [summary[name] for name in ("reconstruction", "diffusion", "prior")]
    assert sum(parts) == pytest.approx(summary["mean"])
    assert math.isfinite(summary["mean"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["draws=4"], "draws=4"),
        (["weighted=true"], "weighted"),
        (["dequantisation=uniform"], "dequantisation"),
        (["likelihood.decoder.levels=7"], "7"),
        (["likelihood.decoder.low=0"], "centres"),
        (["likelihood.steps=1"], "steps"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_program_refuses_what_does_not_suit_levels(given, named, runs, tmp_path):
    run = f"checkpoint={runs / 'dice'}"
    assert named in refused(*TASK, run, "likelihood=discrete", *given, cwd=tmp_path)


def test_a_decoder_can_be_left_out(runs, tmp_path):
    """Then integers are dequantised, as many times as they shall be."""
    program(
        *(*TASK, f"checkpoint={runs / 'dice'}", "likelihood=discrete", "draws=2"),
        *("likelihood.decoder=null", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "out/likelihood.json").read_text())["nfe"] == 2 * (6 + 4)


def test_an_integer_decoder_may_see_the_denoised_data():
    data, model = dice(20), Softmax(SDE, SHARES.float())
    found = evaluate(model, DiscreteBound(DiscretisedGaussian(17), 20), data)
    assert found.nfe.tolist() == [20 + 4] * 20


class TwoDice(Softmax):
    """Two classes, the second with the shares in reverse."""

    def takes(self, name):
        return name == "label"

    def denoise(self, x, t, label=None):
        first, second = super().denoise(x, t), -super().denoise(-x, t)
        return torch.where(label[:, None] == 0, first, second)

    def noise(self, x, t, label=None):
        alpha, sigma = (expand(c(as_time(t)), x) for c in (self.sde.alpha, self.sde.sigma))
        return (x - alpha * self.denoise(x, t, label=label)) / sigma


def test_classes_can_be_told_by_a_bound_of_levels():
    data, model = dice(60), TwoDice(SDE, SHARES.float())
    labelled = Dataset.of("dice", [data.test] * 3, levels=17, labels=[torch.zeros(60).long()] * 3)
    classifier = GenerativeClassifier(VariationalBound(32, decoder=Levels(17)), 2)
    found = classify_examples(model, classifier, labelled, batch_size=30, progress=False)
    levels = data.test.long()
    known = torch.stack([SHARES.log()[levels].sum(1), SHARES.flip(0).log()[levels].sum(1)], 1)
    sure = (known[:, 0] - known[:, 1]).abs() > 4 * float(found.columns["margin_error"].mean())
    assert int(sure.sum()) > 8
    assert torch.equal(found.label[sure], known.argmax(1)[sure])
    bits = -known[:, 0] / (16 * math.log(2))
    assert float((found.given_class - bits).mean().abs()) < 0.2
