"""A classifier of noised examples: its loss, its training, and what it guides."""

import json
import math

import pytest
import torch

from scoresde import VPSDE, GaussianMixtureModel, InputError, ScoreModel, fit, load
from scoresde.data import Dataset
from scoresde.guidance import ClassifierFreeGuidance, ClassifierGuidance
from scoresde.loss import CrossEntropy, DenoisingScoreMatching
from scoresde.model import Classifier
from scoresde.nn import MLP, Encoder
from scoresde.passes import counting
from scoresde.recipe import build, describe
from scoresde.sample import DDIM
from scoresde.tasks.classifier_report import accuracy_by_level
from scoresde.train import Checkpoint
from tests.test_run import TINY, program

MEANS = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, -1.5]])


def mixture():
    return GaussianMixtureModel([1, 1, 2], MEANS, [0.5] * 3, VPSDE(), labels=[0, 1, 2])


def drawn(n, seed=0):
    """Examples and their classes, of which every tenth is not known."""
    label = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    x = mixture().sample(n, seed=seed, label=label)
    return x, torch.where(torch.arange(n) % 10 == 0, -1, label)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x, label = drawn(4000)
    classifier = Classifier(MLP(2, width=64, depth=2, outputs=3), VPSDE())
    found = fit(classifier, (x, {"label": label}), 500, loss=CrossEntropy(), progress=False)
    assert isinstance(found, Classifier)
    return found


def uniform_classes():
    """The exact model of what ``drawn`` draws: the classes are equally likely."""
    return GaussianMixtureModel([1, 1, 1], MEANS, [0.5] * 3, VPSDE(), labels=[0, 1, 2])


@pytest.mark.parametrize("t", [0.01, 0.2, 0.5, 0.8])
def test_it_learns_the_exact_probabilities(trained, t):
    exact, time = uniform_classes(), torch.tensor(t)
    x = exact.sample(2000, t, seed=5)
    found, truth = trained(x, time).exp(), exact.class_log_prob(x, time).exp()
    assert float((found - truth).abs().mean()) < 0.03


def test_its_guidance_is_near_that_of_the_exact_one(trained):
    exact, label = uniform_classes(), torch.arange(300) % 3
    latent = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    ours = DDIM(30)(ClassifierGuidance(exact, trained, 1.0), latent=latent, label=label)
    truth = DDIM(30)(exact, latent=latent, label=label).x
    assert float((ours.x - truth).norm(dim=1).mean()) < 0.25
    assert (ours.nfe.tolist(), ours.vjps.tolist()) == ([60] * 300, [30] * 300)
    free = DDIM(30)(ClassifierFreeGuidance(exact, 1.0), latent=latent, label=label).x
    torch.testing.assert_close(free, truth)


def test_the_loss_is_the_cross_entropy_and_nothing_without_a_class():
    classifier = Classifier(lambda x, c: torch.cat((x, 0 * x[:, :1]), 1), VPSDE())
    x, t, noise = drawn(20)[0], torch.tensor(0.3), torch.zeros(20, 2)
    label = torch.arange(20) % 4 - 1
    terms = CrossEntropy().terms(classifier, x, t, noise, label=label)
    alpha, sigma = VPSDE().alpha(t), VPSDE().sigma(t)
    logits = torch.cat((alpha * x / torch.sqrt(alpha**2 + sigma**2), torch.zeros(20, 1)), 1)
    expected = torch.nn.functional.cross_entropy(logits, label, ignore_index=-1, reduction="none")
    torch.testing.assert_close(terms.value, expected)
    assert torch.equal(terms.parts["accuracy"], (logits.argmax(1) == label).float())


def test_a_row_that_is_not_guided_counts_no_pass_of_it(trained):
    label = torch.tensor([1, -1])
    with counting(2) as passes:
        ClassifierGuidance(mixture(), trained, 2.0).noise(
            MEANS[:2], torch.tensor(0.3), label=label
        )
    assert (passes.network.tolist(), passes.products.tolist()) == ([2, 1], [1, 0])


def test_it_is_written_and_read(trained, tmp_path):
    again = build(describe(trained))
    again.load_state_dict(trained.state_dict())
    x, t = drawn(5)[0], torch.tensor(0.3)
    assert torch.equal(again(x, t), trained(x, t))
    torch.manual_seed(0)
    small = Classifier(MLP(2, width=8, depth=1, outputs=3), VPSDE())
    x, label = drawn(100)
    best = fit(small, (x, {"label": label}), 5, loss=CrossEntropy(), progress=False,
               folder=tmp_path / "run")  # fmt: skip
    assert torch.equal(load(tmp_path / "run").model(x, t), best(x, t))


def test_accuracy_falls_from_the_exact_one_to_chance(trained):
    x, label = drawn(900, seed=7)
    known = label >= 0
    data = Dataset.of("points", [x] * 3, standardise=False, conditions={"label": [label] * 3})
    rows = accuracy_by_level(trained, data)
    levels = [row["log_snr"] for row in rows]
    assert levels == sorted(levels, reverse=True)
    best = uniform_classes().class_log_prob(x[known], 0.0)
    right = (best.argmax(1) == label[known]).double().mean()
    # Four standard errors of 810 examples, besides what the network has not learned.
    assert rows[0]["accuracy"] == pytest.approx(float(right), abs=0.03)
    assert rows[-1]["accuracy"] == pytest.approx(1 / 3, abs=0.08)
    assert rows[-1]["cross_entropy"] == pytest.approx(math.log(3), abs=0.1)


@pytest.mark.parametrize("shape", [(3, 5), (1, 8, 8), (2, 7, 6), (1, 4, 4, 4)], ids=str)
def test_an_encoder_reads_signals_images_and_volumes(shape):
    network = Encoder(shape, outputs=4, width=8, multipliers=(1, 2))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = network(x, torch.tensor([0.0, 0.0, 1.0]))
    assert found.shape == (3, 4)
    torch.testing.assert_close(network(x[:1], torch.zeros(1)), found[:1])
    assert not torch.allclose(network(x[2:], torch.zeros(1)), found[2:])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Classifier(MLP(2, outputs=3), None), "sde.*NoneType"),
        (lambda: Classifier(lambda x, c: x.sum(1), VPSDE())(MEANS, 0.1), r"network.*\(3,\)"),
        (lambda: CrossEntropy()(Classifier(MLP(2, outputs=3), VPSDE()), MEANS), "label.*None"),
        (lambda: CrossEntropy().check(ScoreModel(MLP(2), VPSDE())), "Classifier.*ScoreModel"),
        (
            lambda: DenoisingScoreMatching().check(Classifier(MLP(2, outputs=3), VPSDE())),
            "ScoreFunction.*Classifier",
        ),
        (lambda: Encoder((8,), 3), "shape.*8"),
        (lambda: Encoder((1, 8, 8), 0), "outputs"),
        (lambda: Encoder((1, 8, 8), 3)(torch.zeros(1, 1, 4, 4), torch.zeros(1)), "4, 4"),
    ],
)
def test_what_has_no_meaning_is_refused(use, message):
    with pytest.raises(InputError, match=message):
        use()


@pytest.mark.usefixtures("undrawn")
def test_the_program_trains_and_reports_one(tmp_path):
    small = ["+experiment=digits_classifier", "network.width=8", "network.multipliers=[1,2]"]
    program(*small, *TINY, "hydra.run.dir=run", cwd=tmp_path)
    rows = json.loads((tmp_path / "run/accuracy.json").read_text())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["accuracy"] == pytest.approx(sum(r["accuracy"] for r in rows) / len(rows))
    assert isinstance(Checkpoint.load(tmp_path / "run").build_model(), Classifier)
    assert "Accuracy at each noise level" in (tmp_path / "run/report.html").read_text()
    assert not (tmp_path / "run/likelihood.json").exists()
