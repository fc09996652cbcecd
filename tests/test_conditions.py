"""Conditions from the data to the model: training, sampling, likelihoods, and their refusals."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.utils.data
from torch import nn

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    GaussianMixtureModel,
    InputError,
    Likelihood,
    ScoreModel,
    fit,
)
from scoresde.data import Dataset, check_conditions, digits, random_rows, two_moons
from scoresde.data.toy import Mixture, Moons
from scoresde.guidance import Clipped
from scoresde.metrics import nats
from scoresde.nn import MLP, Architecture, UNet
from scoresde.nn.embedding import takes
from scoresde.sample import UniPC
from scoresde.streams import Streams
from scoresde.tasks.evaluation import Draws, evaluate_likelihood
from scoresde.tasks.sampling import draw_samples
from scoresde.times import LogSNRGrid
from scoresde.train.loop import batches
from scoresde.train.validation import error_by_level, validation_loss
from tests.test_run import TINY, program, refused


def labelled(count=40):
    """Two classes far from each other; the conditions are functions of the class."""
    label = torch.arange(count) % 2
    x = torch.stack((4.0 * label - 2, torch.linspace(-1, 1, count)), 1)
    context = torch.stack((label, 1 - label), 1).float()
    return Dataset.of(
        "two",
        [x] * 3,
        standardise=False,
        labels=[label] * 3,
        conditions={"context": [context] * 3},
    )


def exact():
    """The mixture whose components are the halves of the data's classes."""
    return GaussianMixtureModel(
        [0.25, 0.75], [[-2.0, 0.0], [2.0, 0.0]], [0.5, 0.5], VPSDE(), labels=[0, 1]
    )


def test_a_batch_has_the_conditions_of_its_examples():
    data = labelled()
    batch = data.batch("test", Streams(0, torch.tensor([3, 0, 6])))
    assert batch.cond["label"].tolist() == [1, 0, 0]
    assert batch.cond["context"].tolist() == [[1, 0], [0, 1], [0, 1]]
    assert torch.equal(batch.x[:, 0], torch.tensor([2.0, -2.0, -2.0]))


def test_training_batches_keep_examples_and_conditions_together():
    for _, batch in zip(range(9), batches(labelled(), 7, seed=0), strict=False):
        assert torch.equal(batch.x[:, 0], 4.0 * batch.cond["label"] - 2)


class Named(nn.Module):
    def forward(self, x, c, mask=None):
        return x


def test_a_model_takes_the_conditions_of_its_network():
    network = MLP(2, classes=3, conditions={"context": 2})
    model = ScoreModel(network, VPSDE())
    assert [model.takes(name) for name in ("label", "context", "mask")] == [True, True, False]
    assert Clipped(model, -1, 1).takes("label")
    named = [takes(Named(), name) for name in ("mask", "label", "x")]
    assert named == [True, False, False]
    assert not takes(torch.sin, "label")
    assert takes(lambda x, c, **cond: x, "label")
    assert not ScoreModel(MLP(2), VPSDE()).takes("label")
    assert not GaussianMixtureModel([1.0], [[0.0]], [1.0], VPSDE()).takes("label")
    assert list(model.select({"label": torch.ones(1), "other": torch.ones(1)})) == ["label"]


def test_validation_grades_each_example_under_its_own_condition():
    """Against the loss of the same examples with the classes given by hand; another is worse."""
    data, loss = labelled(), DenoisingScoreMatching()
    model = exact()
    x = data.batch("validation", Streams.of(0, batch=40)).x
    told = {"label": data.labels[1]}
    by_hand = loss(model, x, seed=0, seeds=range(40), **told).double().mean()
    assert validation_loss(model, data, loss, 0) == pytest.approx(float(by_hand), rel=1e-6)
    plain = loss(model, x, seed=0, seeds=range(40)).double().mean()
    assert abs(float(plain - by_hand)) > 1e-3
    without = Dataset.of("two", [data.train] * 3, standardise=False)
    with_, none = (error_by_level(model, one, 1e-5, 0) for one in (data, without))
    assert sum(with_.values()) < sum(none.values())


def test_a_likelihood_is_that_of_each_examples_own_class():
    data, model = labelled(), exact()
    found = evaluate_likelihood(model, Likelihood("exact"), data, progress=False)
    true = model.log_prob(data.encode(data.test), label=data.labels[2])
    torch.testing.assert_close(found.log_prob, true.double(), atol=2e-3, rtol=0)


def test_several_draws_of_integers_are_told_the_class_too():
    raw = torch.arange(8)[:, None].to(torch.uint8)
    label = (raw[:, 0] > 3).long()
    data = Dataset.of("steps", [raw] * 3, levels=8, labels=[label] * 3)
    model = GaussianMixtureModel([0.5, 0.5], [[-0.5], [0.5]], [0.2, 0.2], VPSDE(), labels=[0, 1])
    found = evaluate_likelihood(
        model, Likelihood("exact"), data, draws=Draws(200), batch_size=8, progress=False
    )
    ends = 2 * torch.arange(9, dtype=torch.float64) / 8 - 1
    phi = torch.special.ndtr((ends[:, None] - torch.tensor([-0.5, 0.5])) / 0.2)
    true = (phi[1:] - phi[:-1]).log2().neg().gather(1, label[:, None])[:, 0]
    # The bound is below by Jensen's gap, at most 0.17 bits for steps of 1.25 standard deviations.
    assert bool((found.values > true - 3 * found.errors - 0.01).all())
    assert bool((found.values < true + 0.35 + 3 * found.errors).all())


def test_samples_take_the_conditions_in_turn():
    drawn = draw_samples(
        exact(),
        UniPC(steps=20),
        labelled().codec,
        11,
        batch_size=4,
        seed=0,
        cond={"label": torch.tensor([1, 0, 0])},
        progress=False,
    )
    assert (drawn.x[:, 0] > 0).tolist() == [i % 3 == 0 for i in range(11)]


@pytest.fixture(scope="module")
def halves():
    """A model of two moons that is told which of them an example belongs to."""
    data = two_moons()
    torch.manual_seed(0)
    model = fit(ScoreModel(MLP(2, width=128, classes=2), VPSDE()), data, 1500, progress=False)
    return data, model


def half(c):
    """The exact density of one moon."""
    whole = Moons()._mixture
    k = len(whole.weights) // 2
    part = slice(c * k, (c + 1) * k)
    return Mixture(2 * whole.weights[part], whole.means[part], whole.stds[part])


@pytest.mark.parametrize("c", [0, 1])
def test_class_conditional_samples_have_the_law_of_their_moon(halves, c):
    """Mean and covariance within four standard errors and a twentieth of the std; at most one in
    twenty lies where one in a hundred of the moon does, and one in fifty on the other moon."""
    data, model = halves
    label = torch.full((2000,), c)
    raw = data.decode(UniPC(30, LogSNRGrid())(model, (2000, 2), seed=c, label=label).x).double()
    truth = half(c).sample(Streams.of(9, batch=20_000))
    std, allowed = truth.std(0), 4 / math.sqrt(2000) + 0.05
    assert float(((raw.mean(0) - truth.mean(0)) / std).abs().max()) < allowed
    off = (raw.T.cov() - truth.T.cov()) / torch.outer(std, std)
    assert float(off.abs().max()) < allowed * math.sqrt(2)
    rare = half(c).log_prob(truth).quantile(0.01)
    assert float((half(c).log_prob(raw) < rare).double().mean()) < 0.05
    assert float((half(1 - c).log_prob(raw) > half(c).log_prob(raw)).double().mean()) < 0.02


def test_class_conditional_densities_are_those_of_the_moons(halves):
    """Above the exact negative log-density by a tenth of a nat at most, within three errors."""
    data, model = halves
    raw, label = data.test[:300], data.labels[2][:300]
    ours = nats(
        Likelihood("exact")(model, data.encode(raw), label=label).log_prob, data.shape, data.scale
    )
    true = torch.where(label == 0, half(0).log_prob(raw), half(1).log_prob(raw))
    excess = ours + true
    error = float(excess.std()) / math.sqrt(300)
    assert -3 * error < float(excess.mean()) < 0.1 + 3 * error


def test_toy_data_say_which_part_an_example_is_of():
    data = two_moons(count=500)
    nearer = half(1).log_prob(data.train) > half(0).log_prob(data.train)
    assert float((nearer.long() == data.labels[0]).float().mean()) > 0.99


def test_digits_have_their_labels():
    from sklearn.datasets import load_digits

    data, loaded = digits(), load_digits()
    known = {
        image.tobytes(): int(y) for image, y in zip(loaded.images, loaded.target, strict=True)
    }
    for split in (0, 2):
        raw = (data.train, data.validation, data.test)[split][:, 0].double().numpy()
        assert [known[image.tobytes()] for image in raw] == data.labels[split].tolist()


def test_more_classes_than_the_network_knows_are_refused():
    with pytest.raises(InputError, match=r"label .*classes=9.* 9.*classes=10"):
        check_conditions(ScoreModel(UNet((1, 8, 8), 8, classes=9), VPSDE()), digits())


@pytest.mark.parametrize("wanted", [{"classes": 2}, {"conditions": {"context": 2}}])
def test_a_condition_that_the_data_lack_is_named(wanted):
    model = ScoreModel(MLP(2, width=8, **wanted), VPSDE())
    plain = Dataset.of("plain", [torch.randn(30, 2)] * 3)
    (sentence,) = check_conditions(model, plain)
    assert sentence.startswith("label" if "classes" in wanted else "context")
    with pytest.warns(UserWarning, match="plain"):
        fit(model, plain, 2, progress=False)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("label", [torch.zeros(5)] * 3, "label .*int64.*float32"),
        ("label", [torch.zeros(4, dtype=torch.int64)] * 3, r"label .*\[5, 5, 5\].*\(4,\)"),
        ("label", [torch.full((5,), -2)] * 3, "label .*-1"),
        ("seed", [torch.zeros(5)] * 3, "'seed'"),
        ("class", [torch.zeros(5)] * 3, "'class'"),
        ("context", [torch.zeros(5, 2), torch.zeros(5, 3), torch.zeros(5, 2)], r"context .*3"),
        ("context", [[0.0] * 5] * 3, "context .*list"),
        ("context", [torch.zeros(())] * 3, r"context .*\(\)"),
    ],
)
def test_conditions_that_do_not_belong_to_the_examples_are_refused(name, parts, message):
    with pytest.raises(InputError, match=message):
        Dataset.of("d", [torch.randn(5, 2)] * 3, conditions={name: parts})


# --- The program ---------------------------------------------------------------------------------

SMALL = [*TINY, "network.width=8", "network.multipliers=[1]", "network.attention=[]"]
BENCHMARK = (
    *("benchmark.batch_sizes=[4]", "benchmark.rounds=1", "benchmark.likelihood=false"),
    *("data=digits", "network.classes=10", "network.width=8", "network.multipliers=[1]"),
    "network.attention=[]",
)
QUICK = ("sampler.rtol=1e-1", "sampler.atol=1e-1", "progress=false", "device=cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits whose network knows their classes, inspected on its way."""
    folder = tmp_path_factory.mktemp("conditional")
    inspected = ("train.inspect_every=1", "inspect.count=2", "inspect.examples=4")
    program(*SMALL, "network.classes=10", *inspected, f"hydra.run.dir={folder}/run", cwd=folder)
    return folder / "run"


def test_the_program_samples_the_classes_asked_for(trained, tmp_path):
    words = ("task=sample", f"checkpoint={trained}", "count=5", "hydra.run.dir=out", *QUICK)
    program(*words, "label=[0,1,2]", cwd=tmp_path)
    with np.load(tmp_path / "out/samples.npz") as file:
        assert file["label"].tolist() == [0, 1, 2, 0, 1]
        assert file["x"].shape == (5, 1, 8, 8)
    # The folder holds samples of other classes, and is left alone.
    assert "label" in refused(*words, "label=3", cwd=tmp_path)


def test_latents_keep_the_labels_of_their_examples(trained, tmp_path):
    words = (f"checkpoint={trained}", *QUICK)
    program("task=encode", "examples=4", "hydra.run.dir=a", *words, cwd=tmp_path)
    program("task=sample", "latents=a/latents.npz", "hydra.run.dir=b", *words, cwd=tmp_path)
    for path in ("a/latents.npz", "b/samples.npz"):
        with np.load(tmp_path / path) as file:
            assert file["label"].tolist() == digits().labels[2][random_rows(180, 4)].tolist()


@pytest.mark.parametrize(
    "words",
    [
        ("task=interpolate", "label=[3,4]", "count=2", "points=3", *QUICK),
        ("task=likelihood", "examples=4", "progress=false", "device=cpu"),
        ("task=sample", "label=-1", "count=2", "trajectory=2", *QUICK),
        ("task=benchmark", *BENCHMARK),
    ],
    ids=["interpolate", "likelihood", "sample", "benchmark"],
)
def test_every_task_hands_conditions_through(trained, tmp_path, words):
    own = () if words[0] == "task=benchmark" else (f"checkpoint={trained}",)
    program(*words, *own, "hydra.run.dir=out", cwd=tmp_path)
    assert json.loads((tmp_path / "out/result.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("task=sample",), r"label must be set.*label=\[0,1,2\]"),
        (("task=sample", "label=10"), "label .*classes=10.* 10"),
        (("task=sample", "label=scaled_time"), "label .*scaled_time.*noise_label"),
        (("task=sample", "label=[1,x]"), "label .*x"),
        (("task=sample", "label=true"), "label .*True"),
        (("task=sample", "label=[]"), "label"),
        (("task=likelihood", "label=3"), "likelihood.* label"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(trained, tmp_path, words, message):
    said = refused(*words, f"checkpoint={trained}", "hydra.run.dir=out", cwd=tmp_path)
    assert re.search(message, said.replace("\n", " "))


def test_a_label_is_refused_by_a_model_without_classes(tmp_path):
    program(*SMALL, "hydra.run.dir=run", cwd=tmp_path)
    said = refused("task=sample", "checkpoint=run", "label=3", cwd=tmp_path)
    assert re.search("label .*classes.* 3", said)


# --- Networks of one's own, and data that lack conditions ----------------------------------------


class Around(nn.Module):
    """Tells the network inside nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, c):
        return self.inner(x, c)


class Passing(Around):
    def forward(self, x, c, **cond):
        return self.inner(x, c, **cond)


def test_what_a_network_takes_is_what_its_forward_can_pass_on():
    classes, plain = MLP(2, width=8, classes=2), MLP(2, width=8)
    assert not takes(Around(classes), "label")
    assert takes(Passing(classes), "label")
    assert not takes(Passing(plain), "label")
    deaf = UNet((1, 8, 8), 8, architecture=Architecture(conditional=False))
    assert not takes(deaf, "label")
    fit(ScoreModel(deaf, VPSDE()), digits(), 1, progress=False)


@pytest.mark.parametrize("label", [2, 7, -2])
def test_what_is_no_class_is_no_row_of_a_compiled_network_either(label, monkeypatch):
    """As on a GPU, where nothing is looked at before the lookup."""
    network = MLP(2, width=8, classes=2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(IndexError):
        network(torch.zeros(1, 2), torch.zeros(1), label=torch.tensor([label]))


@pytest.mark.parametrize("label", [3, [0, 1], np.zeros(2)])
def test_a_label_that_is_no_tensor_is_refused_in_a_sentence(label):
    with pytest.raises(InputError, match=r"label .*tensor"):
        MLP(2, width=8, classes=4)(torch.zeros(2, 2), torch.zeros(2), label=label)


def test_labels_of_any_whole_type_are_classes():
    network = MLP(2, width=8, classes=2)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        network(torch.zeros(2, 2), torch.zeros(2), label=torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    "data", [(torch.zeros(9, 2), torch.zeros(9)), (torch.zeros(9, 2),), (torch.zeros(9, 2), {}, 1)]
)
def test_a_tuple_that_is_no_pair_is_refused_by_fit(data):
    with pytest.raises(InputError, match=r"data .*tuple.*\{'label': labels\}"):
        fit(ScoreModel(MLP(2, width=8), VPSDE()), data, 1, progress=False)


def test_conditions_of_another_type_come_in_that_of_the_model():
    context = torch.ones(20, 3, dtype=torch.float64)
    model = ScoreModel(Contextual(), VPSDE())
    fit(model, (torch.randn(20, 2), {"context": context}), 1, progress=False)


class Contextual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x, c, context):
        return self.layer(torch.cat((x, context), 1))


def test_a_likelihood_of_data_without_the_labels_is_refused(trained, tmp_path):
    """A row that was never trained would grade them at random."""
    np.save(tmp_path / "x.npy", digits().test.numpy())
    words = ("task=likelihood", f"checkpoint={trained}", "progress=false", "device=cpu")
    given = ("data=array", "data.path=x.npy", "data.levels=17")
    assert re.search(r"label .*\bx\b.*none", refused(*words, *given, cwd=tmp_path))
    ood = ("data@ood=array", "ood.path=x.npy", "ood.levels=17")
    assert re.search(r"label .*\bx\b.*none", refused(*words, *ood, "examples=4", cwd=tmp_path))


def test_labels_of_the_training_split_alone_are_not_enough():
    x, label = torch.randn(30, 2), torch.zeros(30, dtype=torch.int64)
    pairs = torch.utils.data.TensorDataset(x, label)
    data = Dataset.of("half", [pairs, x, x])
    (sentence,) = check_conditions(ScoreModel(MLP(2, width=8, classes=2), VPSDE()), data)
    assert "label" in sentence


def test_the_likelihood_of_what_fit_has_kept_needs_no_word_more(tmp_path):
    fit(ScoreModel(MLP(2, width=8), VPSDE()), two_moons(count=100), 2, folder=tmp_path / "run")
    np.save(tmp_path / "x.npy", torch.randn(5, 2).numpy())
    words = ("task=likelihood", "checkpoint=run", "data=array", "data.path=x.npy")
    program(*words, "likelihood.rtol=0.1", "likelihood.atol=0.1", "progress=false", cwd=tmp_path)
