"""What stands for "none" of a condition: learned, asked for by NaN or -1, dropped."""

import functools
import json
import math
import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import VPSDE, DenoisingScoreMatching, InputError, Likelihood, ScoreModel, fit, load
from scoresde.data import (
    Dataset,
    MoonHeights,
    check_conditions,
    digits,
    moon_heights,
    two_moons,
)
from scoresde.metrics import nats
from scoresde.nn import MLP, UNet
from scoresde.nn.embedding import learned_none, takes
from scoresde.sample import UniPC
from scoresde.shapes import none_like
from scoresde.streams import Streams
from scoresde.tasks.classes import by_class, class_title
from scoresde.times import LogSNRGrid
from scoresde.train import (
    Checkpoint,
    Replicated,
    Training,
    train,
    validation_loss,
    validation_losses,
)
from scoresde.train.dropout import drop_conditions
from scoresde.train.update import Update
from tests.test_run import TINY, program, refused


def trained(network, seed=0):
    """The network with weights that are all different from zero, what is "none" included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return network


def told():
    return MLP(2, width=8, depth=1, classes=3, conditions={"context": 2, "augment": 2})


X, C = torch.ones(4, 2), torch.zeros(4)

# --- What it means -------------------------------------------------------------------------------


def test_a_row_of_nan_is_what_is_not_given():
    network, context = trained(told()), torch.tensor([[1.0, 2.0]]).repeat(4, 1)
    some = context.clone()
    some[1::2] = torch.nan
    given, absent, mixed = (
        network(X, C, **cond).detach() for cond in ({"context": context}, {}, {"context": some})
    )
    torch.testing.assert_close(mixed[1::2], absent[1::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[::2], given[::2], rtol=0, atol=1e-6)
    assert float((absent - given).abs().max()) > 1e-3


def test_none_is_not_zeros():
    network = trained(told())
    gap = (network(X, C) - network(X, C, context=torch.zeros(4, 2))).detach()
    assert float(gap.abs().max()) > 1e-3
    label = network(X, C, label=none_like(torch.zeros(4, dtype=torch.int64)))
    torch.testing.assert_close(label, network(X, C))


def test_gradients_pass_nan_by():
    """The matrix learns of what is given alone, the vector of what is not."""
    network, context = trained(told()), torch.full((4, 2), torch.nan)
    layer = network.conditioning.conditions["context"]
    network(X, C, context=context).sum().backward()
    assert float(layer.weight.grad.abs().max()) == 0
    assert float(layer.none.grad.abs().max()) > 0
    network.zero_grad()
    network(X, C, context=torch.ones(4, 2)).sum().backward()
    assert float(layer.weight.grad.abs().max()) > 0
    assert float(layer.none.grad.abs().max()) == 0


def test_weights_of_an_older_release_load_and_mean_the_same():
    """There, a condition that is not given counted as zeros."""
    network = trained(told())
    old = OrderedDict((k, v) for k, v in network.state_dict().items() if not k.endswith("none"))
    assert len(old) == len(network.state_dict()) - 1
    loaded = told()
    loaded.load_state_dict(old)
    assert torch.equal(loaded(X, C), loaded(X, C, context=torch.zeros(4, 2)))
    context = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(X, C, context=context), network(X, C, context=context))
    assert len(old) == len(network.state_dict()) - 1  # the user's own is left as it was


def test_a_checkpoint_of_an_older_release_loads(tmp_path):
    from scoresde.recipe import describe

    model = ScoreModel(trained(told()), VPSDE())
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("none")}
    Checkpoint({"model": describe(model)}, old, old, 1, 0).save(tmp_path / "checkpoint.pt")
    loaded = Checkpoint.load(tmp_path).build_model()
    assert not learned_none(loaded.network, "context")
    assert not bool(loaded.network.conditioning.conditions["context"].none.any())


def test_what_has_been_augmented_has_no_none():
    names = [name for name, _ in told().named_parameters() if name.endswith("none")]
    assert names == ["conditioning.conditions.context.none"]


# --- Images --------------------------------------------------------------------------------------


def shown(**options):
    torch.manual_seed(0)
    return UNet((1, 6, 6), width=8, blocks=1, multipliers=(1, 2), **options)


def image(seed=0, shape=(4, 3, 6, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PICTURES, TIMES = image(9, (4, 1, 6, 6)), torch.zeros(4)


@pytest.mark.parametrize("shape", [(3, 6, 6), [3, 6, 6]])
def test_a_network_begins_as_one_without_the_image(shape):
    plain, network = shown(), shown(conditions={"image": shape})
    weights = network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert float(weights["images.layers.image.weight"].abs().max()) == 0
    assert takes(network, "image")
    assert not takes(plain, "image")
    sentences = check_conditions(ScoreModel(network, VPSDE()), Dataset.of("plain", [PICTURES] * 3))
    assert [s.split()[0] for s in sentences] == ["image"]


def test_an_image_is_seen_where_it_is():
    """A change of one corner changes the output there the most, and "none" is not black."""
    network, seen = trained(shown(conditions={"image": (3, 6, 6), "context": 2})), image()
    base = network(PICTURES, TIMES, image=seen)
    other = seen.clone()
    other[2] = torch.nan
    some = network(PICTURES, TIMES, image=other)
    torch.testing.assert_close(some[[0, 1, 3]], base[[0, 1, 3]])
    torch.testing.assert_close(some[2], network(PICTURES, TIMES)[2])
    black = network(PICTURES, TIMES, image=torch.zeros_like(seen))
    assert float((black[2] - some[2]).detach().abs().max()) > 1e-2


def test_a_convolution_of_both_is_the_sum_of_two():
    """Against one layer on the channels of the input and of the image together."""
    network = trained(shown(conditions={"image": (3, 6, 6)}))
    found = []
    network.down[0].blocks[0].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    seen = image()
    network(PICTURES, TIMES, image=seen)
    joined = network.images.layers["image"]
    weight = torch.cat((network.conv_in.weight, joined.weight[:, :-1]), 1)
    bias = network.conv_in.bias + joined.bias
    both = torch.cat((PICTURES, seen), 1)
    torch.testing.assert_close(found[0], nn.functional.conv2d(both, weight, bias, padding=1))


def test_volumes_and_sizes_that_are_padded_take_images_too():
    network = UNet((1, 5, 3, 6), width=8, blocks=1, conditions={"image": (2, 5, 3, 6)})
    seen = image(shape=(2, 2, 5, 3, 6))
    assert network(image(shape=(2, 1, 5, 3, 6)), torch.zeros(2), image=seen).shape[1:] == (
        *(1, 5, 3, 6),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shown(conditions={"image": (3, 6, 5)}), r"conditions.image .*6, 6.*\(3, 6, 5\)"),
        (lambda: shown(conditions={"label": (3, 6, 6)}), r"conditions.label .*\(3, 6, 6\)"),
        (lambda: shown(conditions={"image": (0, 6, 6)}), r"conditions.image.*0"),
        (lambda: shown(conditions={"image": "big"}), r"conditions.image.*big"),
        (lambda: MLP(2, conditions={"image": (3, 6, 6)}), r"conditions.image .*\(3, 6, 6\).*108"),
        (
            lambda: shown(conditions={"image": (3, 6, 6)})(PICTURES, TIMES, image=PICTURES),
            r"image .*\(4, 3, 6, 6\).*\(4, 1, 6, 6\)",
        ),
    ],
)
def test_images_of_another_size_are_refused(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert re.search(message, str(error.value))


# --- Whether it was learned ----------------------------------------------------------------------


def test_an_untrained_none_is_found_out():
    network = trained(shown(classes=3, conditions={"context": 2, "image": (3, 6, 6)}))
    names = ("label", "context", "image")
    assert all(learned_none(network, name) for name in names)
    with torch.no_grad():
        network.conditioning.classes.weight[-1] = 0
        network.conditioning.conditions["context"].none.zero_()
        network.images.layers["image"].weight[:, -1] = 0
    assert not any(learned_none(network, name) for name in names)
    assert not any(learned_none(nn.Sequential(network), name) for name in names)
    # Nothing has been learned at all: nothing can be said.
    assert all(learned_none(shown(classes=3, conditions={"context": 2}), n) for n in names)
    assert learned_none(nn.Linear(2, 2), "label")
    assert learned_none(lambda x, c, label=None: x, "label")


# --- Data that say none --------------------------------------------------------------------------


def rows(*values):
    return Dataset.of(
        "d", [torch.randn(3, 2)] * 3, conditions={"context": [torch.tensor(values)] * 3}
    )


def test_data_may_say_none_of_whole_rows_alone():
    nan = math.nan
    assert bool(rows([1.0, 2.0], [nan, nan], [0.0, 0.0]).conditions["context"][0][1].isnan().all())
    for bad in ([nan, 2.0], [math.inf, 0.0]):
        with pytest.raises(InputError, match=r"context .*1 .*(nan|inf)"):
            rows([1.0, 2.0], bad, [0.0, 0.0])
    item = {"x": torch.zeros(2), "context": torch.tensor([nan, 1.0])}
    with pytest.raises(InputError, match="context"):
        Dataset.of("items", [Items(item)] * 3)


class Items(torch.utils.data.Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.item


# --- Leaving conditions out ----------------------------------------------------------------------

MANY = 20_000
FULL = {"label": torch.zeros(MANY, dtype=torch.int64), "context": torch.zeros(MANY, 2)}


def gone(cond):
    """Which of the label and the context say none, bool ``(B,)`` each."""
    context = cond["context"].isnan()
    assert torch.equal(context.all(1), context.any(1))
    return cond["label"] == -1, context.all(1)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_conditions_are_dropped_at_the_stated_rates(p):
    """Each at p, both at q + (1 - q) q^2, within four standard errors."""

    def check(found, rate):
        assert abs(float(found.double().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / MANY)

    label, context = gone(drop_conditions(FULL, p, Streams.of(0, batch=MANY)))
    q = 1 - math.sqrt(1 - p)
    check(label, p)
    check(context, p)
    check(label & context, q + (1 - q) * q**2)
    alone = drop_conditions({"label": FULL["label"]}, p, Streams.of(1, batch=MANY))
    check(alone["label"] == -1, p)


def test_what_was_done_to_an_example_is_never_dropped():
    cond = {**FULL, "augment": torch.zeros(MANY, 3)}
    dropped = drop_conditions(cond, 0.9, Streams.of(0, batch=MANY))
    assert torch.equal(dropped["augment"], cond["augment"])
    assert torch.equal(
        dropped["label"], drop_conditions(FULL, 0.9, Streams.of(0, batch=MANY))["label"]
    )
    assert drop_conditions(cond, 0.0, Streams.of(0, batch=MANY)) is cond


class Watching(DenoisingScoreMatching):
    """Keeps the conditions of every pass."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seen", [])

    def terms(self, model, x, **options):
        self.seen.append({k: options[k] for k in ("label", "context") if k in options})
        return super().terms(model, x, **options)


def moons(count=200):
    data = two_moons(count=count)
    context = [data.split(split).float() ** 2 for split in ("train", "validation", "test")]
    return replace(data, conditions={**data.conditions, "context": context})


def model():
    torch.manual_seed(0)
    return ScoreModel(MLP(2, width=8, depth=1, classes=2, conditions={"context": 2}), VPSDE())


def training(folder, rate=0.4, loss=None, steps=6, **options):
    folder.mkdir(exist_ok=True)
    plan = Training(
        steps=steps, batch_size=30, condition_dropout=rate, validate_every=3, **options
    )
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    return train(model(), moons(), loss or Watching(), plan, adam, folder, progress=False)


@pytest.mark.parametrize("passes", [1, 2, 7])
def test_what_is_dropped_does_not_depend_on_how_a_batch_is_split(passes, tmp_path):
    def dropped(accumulate, name):
        loss = Watching()
        training(tmp_path / name, loss=loss, steps=2, accumulate=accumulate)
        # The validation comes last, in one pass, and drops nothing.
        *parts, held_out = loss.seen
        assert not any(bool(c.any()) for c in gone(held_out))
        return [torch.cat([part[key] for part in parts]) for key in ("label", "context")]

    whole, split = dropped(1, "whole"), dropped(passes, "split")
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert 0 < int((whole[0] == -1).sum()) < 60


def test_each_of_two_ranks_drops_its_part_of_the_same_set(monkeypatch):
    """The law of an update alone; tests/test_distributed.py has two true processes."""
    from scoresde.train import ProcessGroup

    batch = {name: values[:31] for name, values in FULL.items()}

    def dropped(rank, size):
        group = ProcessGroup(rank, size)
        monkeypatch.setattr(ProcessGroup, "here", staticmethod(lambda: ProcessGroup()))
        loss = Watching()
        plan = Training(condition_dropout=0.5)
        update = Update(model(), loss, plan, torch.optim.Adam, Replicated(), seed=3)
        monkeypatch.setattr(ProcessGroup, "here", staticmethod(lambda: group))
        monkeypatch.setattr(ProcessGroup, "total", lambda self, values: values)
        part = group.part(31)
        mine = {name: values[part] for name, values in batch.items()}
        update(torch.zeros(31, 2)[part], mine, 5, 31)
        return loss.seen[0]

    whole, halves = dropped(0, 1), [dropped(rank, 2) for rank in (0, 1)]
    for name in whole:
        both = torch.cat([half[name] for half in halves])
        torch.testing.assert_close(both, whole[name], rtol=0, atol=0, equal_nan=True)


def test_a_training_that_drops_resumes_bit_for_bit(tmp_path):
    class StopError(Exception):
        pass

    class Failing(Watching):
        def terms(self, model, x, **options):
            if len(self.seen) == 5:
                raise StopError
            return super().terms(model, x, **options)

    whole = training(tmp_path / "whole", save_every=2)
    with pytest.raises(StopError):
        training(tmp_path / "parts", loss=Failing(), save_every=2)
    parts = training(tmp_path / "parts", save_every=2)
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_rate_of_zero_changes_nothing_and_another_does(tmp_path):
    """Against the weights of the same training at commit 89f261d, which dropped nothing."""
    loss = DenoisingScoreMatching()
    none, some = (training(tmp_path / f"{p}", rate=p, loss=loss) for p in (0.0, 0.4))
    weights = torch.load(tmp_path / "0.0/checkpoint.pt", weights_only=True)["model"]
    assert not bool(weights["network.conditioning.classes.weight"][-1].any())
    layers = ("linear_out", "conditioning.conditions.context", "conditioning.classes")
    sums = [float(weights_of(tmp_path / "0.0", layer).sum()) for layer in layers]
    recorded = [-0.11420208401978016, -0.1443313048221171, -0.10844880808144808]
    assert sums == pytest.approx(recorded, rel=1e-5)
    assert not learned_none(none.network, "context")
    assert learned_none(some.network, "context")
    assert learned_none(some.network, "label")


def weights_of(folder, layer):
    average = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return average[f"network.{layer}.weight"].double()


def test_fit_drops_and_says_so_in_what_it_keeps(tmp_path):
    fitted = fit(
        model(), moons(), 4, condition_dropout=0.3, folder=tmp_path / "run", progress=False
    )
    assert learned_none(fitted.network, "context")
    assert load(tmp_path / "run").recipe["train"]["condition_dropout"] == 0.3


@pytest.mark.parametrize("rate", [1.0, -0.1, "a", True, math.nan])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(InputError, match=rf"train\.condition_dropout .*{re.escape(repr(rate))}"):
        Training(condition_dropout=rate)


def test_dropping_without_effect_is_refused():
    plain = ScoreModel(MLP(2, width=8), VPSDE())
    with pytest.raises(InputError, match=r"condition_dropout .*0\.1"):
        fit(plain, two_moons(count=100), 2, condition_dropout=0.1, progress=False)
    x, mask = torch.randn(20, 2), torch.zeros(20, 2, dtype=torch.uint8)
    own = ScoreModel(Masked(), VPSDE())
    with pytest.raises(InputError, match=r"mask .*uint8"):
        fit(own, (x, {"mask": mask}), 2, condition_dropout=0.1, progress=False)


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x, c, mask):
        return super().forward(x)


# --- The program ---------------------------------------------------------------------------------

SAMPLE = ("task=sample", "sampler=unipc", "sampler.steps=2", "progress=false", "device=cpu")


def two_classes():
    return ScoreModel(MLP(2, width=8, depth=1, classes=2), VPSDE())


def test_samples_of_no_class_need_a_model_that_has_learned_it(tmp_path):
    for name, rate in (("without", 0.0), ("with", 0.3)):
        data = two_moons(count=100)
        fit(
            two_classes(), data, 30, condition_dropout=rate, folder=tmp_path / name, progress=False
        )
    words = (*SAMPLE, "count=3", "hydra.run.dir=out")
    said = refused(*words, "checkpoint=without", cwd=tmp_path)
    assert "label must be set" in said
    assert "train.condition_dropout" in said
    said = refused(*words, "checkpoint=without", "label=[0,-1]", cwd=tmp_path)
    assert re.search(r"label .*-1.*condition_dropout=0\.1", said.replace("\n", " "))
    program(*words, "checkpoint=with", cwd=tmp_path)
    program(*SAMPLE, "count=3", "hydra.run.dir=b", "checkpoint=with", "label=-1", cwd=tmp_path)
    with (
        np.load(tmp_path / "out/samples.npz") as free,
        np.load(tmp_path / "b/samples.npz") as none,
    ):
        assert np.array_equal(free["x"], none["x"])
        assert none["label"].tolist() == [-1] * 3
        assert "label" not in free


def test_samples_take_the_rows_of_a_file_of_conditions_in_turn(tmp_path):
    """Each is what the library draws under its row; without a file the model is not sampled."""
    torch.manual_seed(0)
    x, context = torch.randn(60, 2), torch.randn(60, 1)
    network = ScoreModel(MLP(2, width=8, depth=1, conditions={"context": 1}), VPSDE())
    data = (x, {"context": context})
    trained_one = fit(network, data, 20, seed=0, folder=tmp_path / "run", progress=False)
    rows = np.array([[0.5], [-2.0]])
    np.savez(tmp_path / "rows.npz", context=rows)
    words = (*SAMPLE, "checkpoint=run", "count=3", "hydra.run.dir=out")
    assert "conditions=FILE.npz" in refused(*words, cwd=tmp_path)
    program(*words, "conditions=rows.npz", cwd=tmp_path)
    told_rows = torch.tensor([[0.5], [-2.0], [0.5]])
    sampler = UniPC(2, LogSNRGrid(), final_denoise=True)
    ours = sampler(trained_one, (3, 2), seed=0, context=told_rows).x
    with np.load(tmp_path / "out/samples.npz") as file:
        drawn = torch.from_numpy(file["x"])
        assert file["context"].tolist() == told_rows.tolist()
    raw = load(tmp_path / "run").codec.decode(ours)
    torch.testing.assert_close(drawn, raw, rtol=1e-4, atol=1e-4)
    for name, arrays in (("other", {"height": rows}), ("words", {"context": np.array(["a"])})):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        said = refused(*words, f"conditions={name}.npz", cwd=tmp_path)
        assert re.search("height|context", said)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run whose report has classes."""
    folder = tmp_path_factory.mktemp("reported")
    small = (*TINY, "network.width=8", "network.multipliers=[1]", "network.attention=[]")
    own = ("examples=60", "network.classes=10", "train.condition_dropout=0.5")
    program(*small, *own, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


def test_a_likelihood_says_how_each_class_fares(reported):
    """The means of the classes, by their counts, are the mean of all; names and errors by hand."""
    found = json.loads((reported / "likelihood.json").read_text())
    with np.load(reported / "likelihood.npz") as table:
        label, value, index = table["label"], table["value"], table["index"]
    assert label.tolist() == digits().labels[2][index].tolist()
    assert sum(c["count"] for c in found["classes"]) == 60
    total = sum(c["count"] * c["mean"] for c in found["classes"]) / 60
    assert total == pytest.approx(found["mean"])
    for c in found["classes"]:
        own = value[label == c["label"]]
        assert (c["name"], c["count"]) == (f"class {c['label']}", len(own))
        assert c["mean"] == pytest.approx(own.mean())
        assert c["standard_error"] == pytest.approx(own.std(ddof=1) / math.sqrt(len(own)))


def test_a_report_shows_each_class(reported):
    page = (reported / "report.html").read_text()
    assert all(text in page for text in ("Samples of each class", "loss, validation", "class 7"))
    assert (reported / "classes.png").stat().st_size > 1000


def test_the_loss_of_each_validation_example_is_what_the_loss_is_the_mean_of():
    data, loss, one = moons(), DenoisingScoreMatching(), model()
    rows, values = validation_losses(one, data, loss, seed=3, batch_size=7)
    assert float(values.mean()) == pytest.approx(validation_loss(one, data, loss, 3), rel=1e-6)
    assert rows.tolist() == list(range(20))


def test_classes_are_averaged_apart_and_called_by_their_names():
    values, labels = torch.tensor([1.0, 3.0, 7.0, math.nan]), torch.tensor([0, 0, -1, 1])
    found = by_class(values, labels)
    assert {c: (e.mean, e.count) for c, e in found.items()} == {-1: (7.0, 1), 0: (2.0, 2)}
    titles = [class_title(c, ("ape", "bear")) for c in (-1, 0, 1, 2)]
    assert titles == ["no class", "ape", "bear", "class 2"]


# --- A continuous condition whose answer is known ------------------------------------------------


def test_the_height_of_the_moons_given_the_place_integrates_to_one_and_is_the_joint_density():
    from scoresde.data import Moons

    heights, grid = MoonHeights(), torch.linspace(-3, 3, 6001, dtype=torch.float64)[:, None]
    for place in (-1.0, 0.5, 1.9):
        at = torch.full_like(grid, place)
        p = heights.log_prob_given(grid, at).exp()
        assert float(p.sum() * 1e-3) == pytest.approx(1, abs=1e-6)
        joint = Moons().log_prob(torch.cat((at, grid), 1)).exp()
        assert float(joint.sum() * 1e-3) == pytest.approx(
            float(Moons().marginal(0).log_prob(at[:1]).exp()), rel=1e-6
        )


@pytest.fixture(scope="module")
def heights():
    data = moon_heights()
    torch.manual_seed(0)
    network = MLP(1, width=64, depth=2, conditions={"context": 1})
    options = {"condition_dropout": 0.1, "progress": False}
    return data, fit(ScoreModel(network, VPSDE()), data, 1500, **options)


def test_conditional_densities_are_those_of_the_moons(heights):
    """Above the exact negative log-density by a tenth of a nat at most, within three errors."""
    data, fitted = heights
    raw, context = data.test[:400], data.conditions["context"][2][:400]
    x = data.encode(raw)
    ours = nats(Likelihood("exact")(fitted, x, context=context).log_prob, data.shape, data.scale)
    excess = ours + data.conditional_log_prob(raw, context=context)
    error = float(excess.std()) / math.sqrt(400)
    assert -3 * error < float(excess.mean()) < 0.1 + 3 * error
    # Without the condition it is the density of all heights, which costs more.
    plain = nats(Likelihood("exact")(fitted, x).log_prob, data.shape, data.scale)
    excess = plain + data.log_prob(raw)
    error = float(excess.std()) / math.sqrt(400)
    assert -3 * error < float(excess.mean()) < 0.1 + 3 * error
    assert float((plain - ours).mean()) > 0.2


@pytest.mark.parametrize("place", [-0.5, 0.5, 1.5])
def test_conditional_samples_have_the_law_of_the_closed_form(heights, place):
    """The distribution function at every height, within 0.06 and the bound of Kolmogorov at 1e-4.

    At 0.5 the moons overlap, and the law has two modes.
    """
    data, fitted = heights
    context = torch.full((2000, 1), place)
    raw = data.decode(UniPC(30, LogSNRGrid())(fitted, (2000, 1), seed=1, context=context).x)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)[:, None]
    exact = MoonHeights().log_prob_given(grid, torch.full_like(grid, place)).exp().cumsum(0) * 1e-3
    ours = torch.searchsorted(raw[:, 0].double().sort().values, grid[:, 0]) / 2000
    bound = math.sqrt(math.log(2 / 1e-4) / (2 * 2000))
    assert float((ours - exact).abs().max()) < 0.06 + bound
