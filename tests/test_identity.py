"""Texts of what kept work belongs to: written, and compared with those of earlier releases."""

import functools
import json
import math
from dataclasses import dataclass, field, make_dataclass

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import scoresde
from scoresde import Likelihood, VariationalBound
from scoresde.data import TruncatedNormalDequantisation
from scoresde.divergence import ColourProbing, Hutchinson
from scoresde.errors import OtherRunError
from scoresde.sample import (
    DDIM,
    DEIS,
    Heun,
    Langevin,
    PredictorCorrector,
    RelativeNoise,
    Restart,
    RestartInterval,
    Time,
)
from scoresde.tasks.evaluation import Draws
from scoresde.tasks.identity import agrees, fingerprint, text_of
from scoresde.tasks.parts import Parts
from scoresde.times import FoldedTimes, ImportanceTimes, KarrasGrid, LevelTimes, UniformTimes
from tests.test_describe import OBJECTS


def project(x, t, noise):
    return x


class Painted:
    """A constraint with values of its own."""

    def __init__(self, mask, strength=1.0):
        self.mask = mask
        self.strength = strength

    def __call__(self, x, t, noise):
        return x


class Bare:
    """Without words of its own."""


def enclosing(mask):
    def constrain(x, t, noise):
        return x + mask

    return constrain


@dataclass(frozen=True)
class Solver:
    """A class that gets more arguments with every release."""

    steps: int = 4
    grid: object = field(default_factory=KarrasGrid)


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: type(thing).__name__)
def test_the_text_of_an_object_and_that_of_all_its_fields_agree(thing):
    assert agrees(text_of(thing), thing)
    assert agrees(repr(thing), thing)  # as earlier releases wrote it
    others = [one for one in OBJECTS if type(one) is not type(thing)]
    assert not any(agrees(text, one) for one in others for text in (repr(thing), text_of(thing)))


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (DDIM(), "DDIM()"),
        (DDIM(7, eta=0.3), "DDIM(steps=7, eta=0.3)"),
        (Heun(churn_high=math.inf, churn=2.0), "Heun(churn=2.0)"),
        (
            PredictorCorrector(corrector=Langevin(0.2)),
            "PredictorCorrector(corrector=Langevin(snr=0.2))",
        ),
        (
            Restart(intervals=[RestartInterval(0.1)]),
            "Restart(intervals=(RestartInterval(low=0.1),))",
        ),
        (DDIM(constraint=project), "DDIM(constraint=tests.test_identity.project)"),
        (
            DDIM(constraint=Painted(None)),
            "DDIM(constraint=tests.test_identity.Painted(mask=None, strength=1.0))",
        ),
        ({"a": [1, (2,)], "b": (3, 4)}, "{'a': [1, (2,)], 'b': (3, 4)}"),
        *((None, "None"), (True, "True"), ((), "()"), ([], "[]"), (1e-5, "1e-05")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_texts(thing, text):
    assert text_of(thing) == text
    assert agrees(text, thing)


# What 073b527 wrote: every field of its classes, under its names.
COMMON = "eps=None, final_denoise=False, temperature=1.0"
LIKELIHOOD = (
    "Likelihood(probes={probes}, rtol=1e-05, atol=1e-05, eps=None, method='dopri5', "
    "cutoff=PlainCutoff(), clock=NoiseClock(scale=0.5), target_error=None, max_sets=100, "
    "strict=True, differentiable=False)"
)
OLD = [
    (
        f"DEIS({COMMON}, steps=4, grid=UniformGrid(), along_path=False, order=3, "
        "single_steps=False, lower_order_below=0, variable=NoiseLevel())",
        DEIS(4, variable=RelativeNoise()),
        DEIS(4, variable=Time()),
    ),
    (
        f"Restart({COMMON}, sampler=Heun({COMMON}, steps=17, grid=KarrasGrid(rho=7.0), "
        "along_path=False, churn=0.0, churn_low=0.0, churn_high=inf, churn_noise=1.0), "
        "loops=(Loop(low=0.06, high=0.3, steps=3, repeats=1), Loop(low=0.01, high=0.05, steps=2, "
        "repeats=2)))",
        Restart(intervals=(RestartInterval(), RestartInterval(0.01, 0.05, 2, 2))),
        Restart(intervals=(RestartInterval(), RestartInterval(0.01, 0.05, 2, 3))),
    ),
    (
        "VariationalBound(draws=3, times=Folded(times=UniformTimes()), eps=None, replicates=1)",
        VariationalBound(3, FoldedTimes(UniformTimes()), replicates=1),
        VariationalBound(3, FoldedTimes(ImportanceTimes()), replicates=1),
    ),
    (
        LIKELIHOOD.format(probes="ColourProbing(spacing=4, repeats=2)"),
        Likelihood(probes=ColourProbing(4, 2), rtol=1e-5, atol=1e-5),
        Likelihood(probes=ColourProbing(4, 1), rtol=1e-5, atol=1e-5),
    ),
    (
        LIKELIHOOD.format(probes="2"),
        Likelihood(probes=2, rtol=1e-5, atol=1e-5),
        Likelihood(probes=2, rtol=1e-5, atol=1e-6),
    ),
    (
        "Draws(count=2, dequantisation=TruncatedNormalDequantisation(std=0.3), weighted=True)",
        Draws(2, TruncatedNormalDequantisation(0.3), True),
        Draws(2, TruncatedNormalDequantisation(0.3), False),
    ),
]


@pytest.mark.parametrize(("text", "same", "other"), OLD, ids=lambda v: type(v).__name__)
def test_old_texts(text, same, other):
    assert agrees(text, same)
    assert not agrees(text, other)


def test_a_constraint_is_news_to_an_old_text():
    text = f"DDIM({COMMON}, steps=4, grid=UniformGrid(), along_path=False, eta=0.0)"
    assert agrees(text, DDIM(4))
    assert not agrees(text, DDIM(4, constraint=project))


def test_a_replaced_estimator_is_another():
    """HutchPlusPlus is read as Hutchinson, but its half of a table is not gone on with."""
    assert not agrees("HutchPlusPlus(count=3)", Hutchinson(3))
    assert not agrees(LIKELIHOOD.format(probes="HutchPlusPlus(count=3)"), Likelihood(3))


def test_a_new_field_changes_no_text_and_refuses_no_old_one():
    new = make_dataclass("Solver", [("limit", float, 1.0)], bases=(Solver,), frozen=True)
    new.__qualname__ = "Solver"
    assert text_of(new()) == text_of(Solver()) == "Solver()"
    old = "Solver(steps=4, grid=KarrasGrid(rho=7.0))"
    assert agrees(old, new())
    assert agrees("Solver(steps=5)", new(5))
    assert not agrees(old, new(limit=2.0))
    assert agrees("Solver(limit=2.0)", new(limit=2.0))


GUIDANCE = {"_target_": "scoresde.guidance.Clipped", "_partial_": True, "low": -2.0, "high": 2.0}


def test_recipes_of_guidance():
    text = str(GUIDANCE)
    assert text_of(GUIDANCE) == text
    assert agrees(text, GUIDANCE)
    assert not agrees(text, {**GUIDANCE, "high": 3.0})
    assert not agrees(text, None)
    assert not agrees("None", GUIDANCE)
    # More that is at its default, and names that have moved.
    loops = {
        "_target_": "scoresde.sample.Restart",
        "loops": [{"_target_": "scoresde.sample.Loop"}],
    }
    assert agrees(str(loops), {"_target_": "scoresde.sample.Restart", "eps": None})
    assert text_of(GUIDANCE) == str(OmegaConf.create(GUIDANCE))


@pytest.mark.parametrize(
    "text",
    [
        *("", "(", "DDIM(", "DDIM(4)", "DDIM(*a)", "DDIM(**{'steps': 4})", "a.DDIM()", "DDIM"),
        *("DDIM(steps=4, steps=5)", "DDIM(nothing=1)", "DDIM() + 1", "lambda: 1", "{}", "\0"),
        *("(" * 1000 + ")" * 1000, "-" * 100_000 + "1", "f(" * 90 + ")" * 90, "DDIM(steps=x y)"),
        *("DDIM(steps={[]: 1})", "DDIM(steps=__import__('os').mkdir('executed'))", "1_" * 999),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.filterwarnings("error")
def test_odd_texts_agree_with_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = [DDIM(4), [DDIM()], {"a": 1}, (), None, 1.0, math.inf, project, torch.zeros(2)]
    assert not any(agrees(text, value) for value in values[:-5])
    assert not any(agrees(text, value) for value in values[-5:])
    assert not list(tmp_path.iterdir())


def test_numbers_without_a_literal():
    assert agrees("Heun(churn_high=inf)", Heun())
    assert agrees("Heun(churn_high=2.0)", Heun(churn_high=2.0))
    assert not agrees("Heun(churn_high=inf)", Heun(churn_high=2.0))
    assert not agrees("Heun(churn_high=2.0)", Heun())
    assert agrees("Likelihood(rtol=1e-3)", Likelihood(rtol=0.001))


def test_constraints_are_told_apart():
    mask = torch.arange(4.0)
    held = [
        *(None, project, math.sin, Painted(mask), Painted(mask, 2.0), Painted(mask + 1)),
        *(Painted(mask.double()), Painted(Bare()), lambda x, t, noise: x, enclosing(mask)),
        *(enclosing(mask + 1), functools.partial(project, noise=1), functools.partial(project)),
        *(functools.partial(project, noise=2), functools.partial(project, 1)),
        *(
            torch.Tensor.clamp,
            project.__call__,
            Solver().__eq__,
            Solver(5).__eq__,
            Solver().__hash__,
            Painted,
        ),
    ]
    samplers = [DDIM(constraint=one) for one in held]
    for i, one in enumerate(samplers):
        assert [agrees(text_of(one), other) for other in samplers] == [
            j == i for j in range(len(samplers))
        ]
    assert "0x" not in "".join(map(text_of, samplers))
    assert agrees(text_of(samplers[3]), DDIM(constraint=Painted(mask.clone())))


def test_a_constraint_in_a_function_and_a_new_field():
    """Its text is that of a name, so that the rest is still compared value by value."""
    sampler = DDIM(4, constraint=enclosing(torch.ones(2)))
    text = text_of(sampler).replace("steps=4", "steps=4, eta=0.0")
    assert text != text_of(sampler)
    assert agrees(text, sampler)


def test_what_holds_itself_is_a_sentence(tmp_path):
    painted = Painted(None)
    painted.mask = painted
    with pytest.raises(scoresde.InputError, match=r"identity.*DDIM"):
        Parts(tmp_path).claim({"sampler": DDIM(constraint=painted)})


def test_tensors_are_told_by_their_digest():
    assert text_of(torch.ones(3)) == f"tensor({fingerprint(torch.ones(3))!r})"
    assert agrees(text_of([torch.ones(3)]), [torch.ones(3)])
    assert not agrees(text_of([torch.ones(3)]), [torch.zeros(3)])


# --- Folders -------------------------------------------------------------------------------------


def test_the_pieces_of_an_old_folder_are_used(tmp_path):
    text, same, other = OLD[0]
    (tmp_path / "identity.json").write_text(json.dumps({"sampler": text}, indent=2) + "\n")
    before = (tmp_path / "identity.json").read_bytes()
    parts = Parts(tmp_path).claim({"sampler": same})
    parts.save(range(2), {"x": torch.ones(2)})
    again = Parts(tmp_path).claim({"sampler": same})
    assert torch.equal(again.load(range(2))["x"], torch.ones(2))
    assert (tmp_path / "identity.json").read_bytes() == before
    with pytest.raises(OtherRunError, match=r"sampler = DEIS\(eps=None.*got DEIS\(steps=4\)"):
        Parts(tmp_path).claim({"sampler": other})


def test_the_mark_is_that_of_073b527(tmp_path):
    """The digest of the file as it stands, by which its pieces are known."""
    import hashlib

    text = json.dumps({"sampler": OLD[0][0], "seed": "0"}, indent=2) + "\n"
    (tmp_path / "identity.json").write_text(text)
    parts = Parts(tmp_path).claim({"sampler": OLD[0][1], "seed": "0"})
    assert parts.mark == hashlib.sha256(text.encode()).hexdigest()
    parts.save(range(2), {"x": torch.ones(2)})
    with np.load(tmp_path / "00000000-00000002.npz") as file:
        assert str(file["_mark"]) == parts.mark


@pytest.mark.parametrize("change", ["less", "more"])
def test_what_is_said_on_one_side_alone_is_refused(change, tmp_path):
    one, two = {"seed": "0"}, {"seed": "0", "guidance": None}
    there, here = (two, one) if change == "less" else (one, two)
    Parts(tmp_path).claim(there)
    with pytest.raises(OtherRunError, match="guidance = None"):
        Parts(tmp_path).claim(here)


@pytest.mark.parametrize("content", ['{"seed": 0}', '{"seed": null}', "[1]", "[" * 5000])
def test_an_identity_of_something_else_is_a_sentence(content, tmp_path):
    (tmp_path / "identity.json").write_text(content)
    with pytest.raises(scoresde.InputError, match="remove the folder"):
        Parts(tmp_path).claim({"seed": "0"})


def test_levels_are_compared():
    assert not agrees(text_of(FoldedTimes(LevelTimes(10))), FoldedTimes(LevelTimes(11)))
