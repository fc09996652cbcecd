"""Names of earlier releases: in recipes, in Python, and in folders."""

import importlib
import inspect
import itertools

import pytest
import torch

import scoresde
from scoresde import VPSDE, InputError, ScoreModel, recipe
from scoresde.divergence import Hutchinson
from scoresde.nn import (
    MLP,
    Architecture,
    AttentionLayout,
    DDPMTransition,
    FIRResampling,
    Groups,
    InputSkip,
    OutputSkip,
    UNet,
)
from scoresde.recipe import (
    MOVED,
    OBJECTS,
    REPLACED,
    accepts_moved,
    build,
    complete,
    current,
    updated,
)
from scoresde.sample import Restart, RestartInterval

OLD_MODULES = ("scoresde.bound", "scoresde.cutoff", "scoresde.flow")
ARGUMENTS = {old: new for old, new in MOVED.items() if not new.startswith("scoresde.")}
NAMES = {old: new for old, new in MOVED.items() if old not in {*ARGUMENTS, *OLD_MODULES}}


def found(name):
    home, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(home), attribute)


@pytest.mark.parametrize("old", MOVED)
@pytest.mark.filterwarnings("error")
def test_every_new_name_is_there_and_is_final(old):
    new = current(old)
    assert new != old
    assert current(new) == new
    if old in ARGUMENTS:
        home, _, name = old.rpartition(".")
        assert name not in inspect.signature(found(home)).parameters
        *objects, last = new.split(".")
        for argument in objects:
            assert argument in inspect.signature(found(home)).parameters
            home, _ = OBJECTS[f"{home}.{argument}"]
        assert last in inspect.signature(found(home)).parameters
    elif old in OLD_MODULES:
        importlib.import_module(new)
    else:
        assert callable(found(new))


def test_a_chain_of_names_ends(monkeypatch):
    chain = {"scoresde.a": "scoresde.b", "scoresde.b.C": "scoresde.D", "scoresde.D": "scoresde.E"}
    for old, new in chain.items():
        monkeypatch.setitem(MOVED, old, new)
    assert current("scoresde.a.C") == "scoresde.E"
    assert current("scoresde.a.other") == "scoresde.b.other"


def test_a_name_is_moved_whole():
    assert current("scoresde.boundary.X") == "scoresde.boundary.X"
    assert current("scoresde.sample.Loops") == "scoresde.sample.Loops"
    assert current("") == ""


# --- Recipes -------------------------------------------------------------------------------------

MLP_ = {"_target_": "scoresde.nn.MLP", "shape": [2], "width": 4, "depth": 1}
UNIFORM = {"_target_": "scoresde.times.UniformTimes"}
LABEL = {"_target_": "scoresde.model.ScaledTime", "scale": 10.0}
SDE = {"_target_": "scoresde.VPSDE"}
# Old name: the arguments that it is built with.
BUILT = {
    "scoresde.bound.Folded": {"times": UNIFORM},
    "scoresde.bound.VariationalBound": {"draws": 3},
    "scoresde.cutoff.VariationalCutoff": {"variance": 0.5},
    "scoresde.flow.TimeClock": {},
    "scoresde.data.Board": {"cells": 2},
    "scoresde.data.Units": {"shape": [2], "shift": 1.0, "width": 2.0},
    "scoresde.divergence.HutchPlusPlus": {"count": 5},
    "scoresde.sample.Loop": {"low": 0.1, "steps": 2},
    "scoresde.sample.NoiseLevel": {},
}


@pytest.mark.parametrize("old", BUILT)
@pytest.mark.filterwarnings("error")
def test_an_old_recipe_builds_what_the_new_one_builds(old):
    sections = {"one": {"_target_": old, **BUILT[old]}, "all": [{"_target_": old, **BUILT[old]}]}
    there = build(updated(sections))
    new = build({"_target_": current(old), **BUILT[old]})
    assert there == {"one": new, "all": [new]}
    assert type(new) is found(current(old))


DEEP = {
    "scoresde.data.base.Units": "scoresde.data.Units",
    "scoresde.data.toy.Board": "scoresde.data.Board",
    "scoresde.sample.exponential.NoiseLevel": "scoresde.sample.NoiseLevel",
    "scoresde.sample.restart.Loop": "scoresde.sample.Loop",
}


@pytest.mark.parametrize("deep", DEEP)
def test_a_class_is_found_by_the_module_that_defined_it(deep):
    assert current(deep) == current(DEEP[deep])


def test_every_class_that_a_recipe_can_name_is_tried():
    kinds = {old: found(new) for old, new in NAMES.items()}
    rooms = recipe.ROOMS
    buildable = {
        old
        for old, kind in kinds.items()
        if isinstance(kind, type) and kind.__module__.startswith(rooms)
    }
    # States and results, which no recipe holds; a base class.
    never = ("Carried", "Evaluations", "Label", "Arrival", "Watch", "Move", "Row")
    assert {old for old in buildable if not old.endswith(tuple(f".{n}" for n in never))} <= {
        *BUILT
    }


@pytest.mark.filterwarnings("error")
def test_old_arguments_in_a_recipe():
    loop = {"_target_": "scoresde.sample.Loop", "low": 0.1}
    old = {"_target_": "scoresde.sample.Restart", "loops": [loop]}
    assert build(updated({"x": old}))["x"] == Restart(intervals=(RestartInterval(0.1),))
    deep = {"_target_": "scoresde.sample.restart.Restart", "loops": [loop]}
    assert build(updated({"x": deep}))["x"] == Restart(intervals=(RestartInterval(0.1),))
    for name in ("scoresde.ScoreModel", "scoresde.model.ScoreModel"):
        model = {"_target_": name, "network": MLP_, "sde": SDE, "label": LABEL}
        assert updated({"model": model})["model"] == {
            "_target_": name,
            "network": MLP_,
            "sde": SDE,
            "noise_label": LABEL,
        }
        assert build(updated({"model": model}))["model"].noise_label.scale == 10.0


def test_only_arguments_of_that_class_are_moved():
    tree = {
        "label": 1,
        "model": {"_target_": "scoresde.nn.MLP", "label": 2, "loops": {"label": 3}},
    }
    assert updated(tree) == tree


def test_a_section_is_moved(monkeypatch):
    monkeypatch.setitem(MOVED, "old_section", "new_section")
    assert updated({"old_section": {"old_section": 1}}) == {"new_section": {"old_section": 1}}


ODD = {
    "number": {"_target_": 3},
    "list": {"_target_": ["scoresde.VPSDE"]},
    "nothing": {"_target_": None},
    "keys": {"_target_": "scoresde.VPSDE", 3: 1, ("a", "b"): {None: 2}},
    "keys alone": {3: {4: 5}, None: [{("a",): 1}]},
    "long": {"_target_": "scoresde" + ".a" * 500_000},
    "dots": {"_target_": "." * 500_000},
    "empty": {"_target_": ""},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_recipes_are_kept_and_refused_in_a_sentence(name):
    assert updated({"model": ODD[name]}) == {"model": ODD[name]}
    recipe.complete(ODD[name])
    if "alone" not in name:
        with pytest.raises(InputError):
            build(updated({"model": ODD[name]}))


def test_a_deep_recipe_is_a_sentence():
    tree = {}
    for _ in range(100_000):
        tree = {"a": tree}
    with pytest.raises(InputError, match="nested too deeply"):
        updated(tree)
    while tree:  # Python frees such a thing by recursion
        tree = tree["a"]


# --- Arguments that have become fields of an object ----------------------------------------------

SMALL = {"shape": [1, 8, 8], "width": 8, "blocks": 1}
# Each old argument of a U-Net: its value in a recipe and in Python, and what is now written.
FIELDS = {
    "heads": (2, 2, {"attention": AttentionLayout(heads=2)}),
    "head_width": (4, 4, {"attention": AttentionLayout(head_width=4)}),
    "attend_after_each": (True, True, {"attention": AttentionLayout(after_each=True)}),
    "transition": ({"_target_": "scoresde.nn.DDPMTransition"}, DDPMTransition(), None),
    "resampling": ({"_target_": "scoresde.nn.FIRResampling"}, FIRResampling(), None),
    "input_pyramid": ({"_target_": "scoresde.nn.InputSkip"}, InputSkip(), None),
    "output_pyramid": ({"_target_": "scoresde.nn.OutputSkip"}, OutputSkip(), None),
    "activation": ({"_target_": "torch.nn.ELU"}, torch.nn.ELU(), None),
    "norm": ({"_target_": "scoresde.nn.Groups", "most": 2}, Groups(2), None),
    "rescale": (False, False, None),
    "init_scale": (1.0, 1.0, None),
    "conditional": (False, False, None),
    "groups": (
        *({"middle.attention.norm": 8},) * 2,
        {"architecture": Architecture(norm=Groups(exceptions={"middle.attention.norm": 8}))},
    ),
}
each_field = pytest.mark.parametrize("name", FIELDS)


def drawn(make):
    """A network and what it computes with weights other than zero."""
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)
    return network, network(x, torch.tensor([0.5, 2.0]))


def assert_same(one, other):
    (one, y), (other, expected) = drawn(one), drawn(other)
    assert str(one) == str(other)
    assert list(one.state_dict()) == list(other.state_dict())
    assert torch.equal(y, expected)


def test_every_argument_that_has_become_a_field_is_tried():
    assert {f"scoresde.nn.UNet.{name}" for name in FIELDS} == {
        old for old, new in ARGUMENTS.items() if "." in new
    }


def written(name):
    """What is written today for an old argument."""
    _, value, arguments = FIELDS[name]
    return arguments or {"architecture": Architecture(**{name: value})}


@each_field
@pytest.mark.filterwarnings("error")
def test_an_old_field_in_a_recipe(name):
    old = {"_target_": "scoresde.nn.UNet", **SMALL, name: FIELDS[name][0]}
    tree = updated({"network": old})
    assert name not in tree["network"]
    assert updated(tree) == tree
    assert_same(lambda: build(tree)["network"], lambda: UNet(**SMALL, **written(name)))
    deep = {**old, "_target_": "scoresde.nn.unet.UNet"}
    assert complete(updated({"network": deep})) == complete(tree)


@each_field
def test_an_old_field_in_python(name):
    (argument, thing), *_ = written(name).items()
    form = rf"{name} of UNet .*{argument}={type(thing).__name__}\(.*=\.\.\."
    with pytest.warns(FutureWarning, match=form):
        assert_same(
            lambda: UNet(**SMALL, **{name: FIELDS[name][1]}),
            lambda: UNet(**SMALL, **written(name)),
        )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_fields_join_what_is_given_in_their_place():
    old = UNet((1, 8, 8), 8, (1, 2), 1, (0, 1), heads=2, head_width=None)
    assert str(old) == str(UNet((1, 8, 8), 8, (1, 2), 1, AttentionLayout((0, 1), 2)))
    ddpm = Architecture(DDPMTransition(), norm=Groups(2))
    old = UNet(**SMALL, architecture=ddpm, groups={"norm_out": 1}, rescale=False)
    norm = Groups(2, exceptions={"norm_out": 1})
    assert old.architecture == Architecture(DDPMTransition(), norm=norm, rescale=False)
    nothing = dict.fromkeys(("transition", "resampling", "norm", "activation", "groups"))
    assert UNet(**SMALL, **nothing).architecture == Architecture()


def test_old_fields_join_in_a_recipe_in_any_order():
    arguments = {
        "groups": {"norm_out": 1},
        "norm": {"_target_": "scoresde.nn.basics.Groups", "most": 2},
        "heads": 2,
        "attention": [0, 1],
        "head_width": None,
    }
    expected = {
        "_target_": "scoresde.nn.UNet",
        **SMALL,
        "attention": {"_target_": "scoresde.nn.AttentionLayout", "levels": [0, 1], "heads": 2},
        "architecture": {
            "_target_": "scoresde.nn.Architecture",
            "norm": {"_target_": "scoresde.nn.Groups", "most": 2, "exceptions": {"norm_out": 1}},
        },
    }
    for names in itertools.permutations(arguments):
        old = {"_target_": "scoresde.nn.UNet", **SMALL, **{k: arguments[k] for k in names}}
        assert complete(updated({"x": old})) == complete({"x": expected})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"attention": [1], "heads": 1}, {"attention": None}),
        ({"heads": 1, "rescale": True}, {}),
        ({"input_pyramid": None, "transition": None, "norm": None}, {"architecture": None}),
        ({"attention": [0]}, {"attention": {"levels": [0]}}),
        ({"attention": [1], "heads": 2}, {"attention": {"heads": 2}}),
    ],
)
def test_old_and_new_recipes_of_one_network_are_equal(old, new):
    old, new = (
        complete(updated({"x": {"_target_": "scoresde.nn.UNet", **SMALL, **arguments}}))
        for arguments in (old, new)
    )
    assert old == new


def test_recipes_of_two_networks_differ():
    recipes = [{}, {"heads": 2}, {"attention": [0]}, {"rescale": False}, {"groups": {"a": 1}}]
    spelled = [
        complete(updated({"x": {"_target_": "scoresde.nn.UNet", **SMALL, **arguments}}))
        for arguments in recipes
    ]
    assert not any(one == other for one, other in itertools.combinations(spelled, 2))


# --- Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_is_found_with_a_warning(old):
    with pytest.warns(FutureWarning, match=f"{old} .*{current(old)}"):
        assert found(old) is found(current(old))


@pytest.mark.parametrize("module", sorted({old.rpartition(".")[0] for old in NAMES}))
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        found(f"{module}.nothing")
    assert not hasattr(importlib.import_module(module), "__nothing__")


@pytest.mark.parametrize("module", OLD_MODULES)
def test_an_old_module_has_the_names_that_it_had(module):
    kind = {
        "scoresde.bound": "VariationalBound",
        "scoresde.cutoff": "PlainCutoff",
        "scoresde.flow": "TimeClock",
    }[module]
    with pytest.warns(FutureWarning, match=f"{module}.{kind} .*scoresde.likelihood.{kind}"):
        assert found(f"{module}.{kind}") is found(f"scoresde.likelihood.{kind}")
    with pytest.raises(AttributeError):
        found(f"{module}.nothing")


def test_old_arguments_are_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="loops of Restart .*intervals"):
        assert Restart(loops=[RestartInterval(0.1)]) == Restart(intervals=(RestartInterval(0.1),))
    label = scoresde.ScaledTime(3.0)
    with pytest.warns(FutureWarning, match="label of ScoreModel .*noise_label"):
        model = ScoreModel(MLP(2, width=4, depth=1), VPSDE(), label=label)
    assert model.noise_label is label


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_unknown_and_doubled_arguments_are_type_errors():
    with pytest.raises(TypeError, match="nothing"):
        Restart(nothing=1)
    with pytest.raises(TypeError, match=r"intervals.*loops"):
        Restart(loops=[], intervals=[])
    with pytest.raises(TypeError, match="nothing"):
        ScoreModel(MLP(2, width=4, depth=1), VPSDE(), nothing=1)


def test_a_class_without_moved_arguments_is_as_it_was():
    @accepts_moved
    class Plain:
        def __init__(self, a: int = 1) -> None:
            self.a = a

    assert Plain(a=2).a == 2
    assert list(inspect.signature(Plain).parameters) == ["a"]


def test_what_was_replaced_is_listed():
    assert {*REPLACED} <= MOVED.keys()
    assert build(updated({"x": {"_target_": REPLACED[0], "count": 4}}))["x"] == Hutchinson(4)
