"""Recipes: trees of plain values that describe objects and cannot run code.

In a recipe, a mapping with ``_target_`` names a class, and its other keys are the arguments. A
recipe can build the classes of the modules listed in ``ROOMS``, torch's activations, the data sets
of ``scoresde.data``, the operators of ``scoresde.operators``, and objects defined in packages that
the user allows by name. No other function can be called, whether by a private name or by a name
that passes through a module (``scoresde.data.files.np.load``).
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from scoresde.errors import InputError

Kind = TypeVar("Kind")

ROOMS = tuple(
    f"scoresde.{room}"
    for room in (
        *("sde", "nn", "solvers", "divergence", "times", "codec"),
        *("model", "likelihood", "sample", "loss", "guidance", "inverse"),
        *("operators", "data"),  # in the last two, functions too
    )
)
# Names that have changed since an earlier release: modules, classes and functions by their dotted
# names, arguments as CLASS.ARGUMENT (mapped to the new name alone, or to ARGUMENT.FIELD if the
# argument is now a field of an object), and sections of a recipe.
MOVED = {
    "scoresde.bound": "scoresde.likelihood",
    "scoresde.cutoff": "scoresde.likelihood",
    "scoresde.flow": "scoresde.likelihood",
    "scoresde.bound.Folded": "scoresde.times.FoldedTimes",
    "scoresde.flow.Carried": "scoresde.likelihood.FlowSolution",
    "scoresde.data.Units": "scoresde.codec.Affine",
    "scoresde.data.Board": "scoresde.data.Checkerboard",
    "scoresde.divergence.HutchPlusPlus": "scoresde.divergence.Hutchinson",
    "scoresde.metrics.Family": "scoresde.metrics.CovarianceFamily",
    "scoresde.model.Evaluations": "scoresde.model.Conditioned",
    "scoresde.model.Label": "scoresde.model.NoiseLabel",
    "scoresde.model.check_batch": "scoresde.shapes.check_batch",
    "scoresde.model.check_data": "scoresde.shapes.check_data",
    "scoresde.sample.Loop": "scoresde.sample.RestartInterval",
    "scoresde.sample.NoiseLevel": "scoresde.sample.RelativeNoise",
    "scoresde.sample.trace": "scoresde.sample.sample_trajectory",
    "scoresde.sample.base.Arrival": "scoresde.sample.FinalState",
    "scoresde.sample.base.Watch": "scoresde.sample.ProgressReporter",
    "scoresde.sample.plan.Move": "scoresde.sample.Stage",
    "scoresde.sample.plan.Row": "scoresde.sample.LinearUpdate",
    "scoresde.sample.plan.follow": "scoresde.sample.run_stages",
    "scoresde.train.Group": "scoresde.train.ProcessGroup",
    "scoresde.train.Keeper": "scoresde.train.CheckpointManager",
    "scoresde.train.joined": "scoresde.train.process_group",
    # arguments
    "scoresde.ScoreModel.label": "noise_label",
    "scoresde.model.ScoreModel.label": "noise_label",
    "scoresde.sample.Restart.loops": "intervals",
    "scoresde.nn.UNet.heads": "attention.heads",
    "scoresde.nn.UNet.head_width": "attention.head_width",
    "scoresde.nn.UNet.attend_after_each": "attention.after_each",
    "scoresde.nn.UNet.transition": "architecture.transition",
    "scoresde.nn.UNet.resampling": "architecture.resampling",
    "scoresde.nn.UNet.input_pyramid": "architecture.input_pyramid",
    "scoresde.nn.UNet.output_pyramid": "architecture.output_pyramid",
    "scoresde.nn.UNet.activation": "architecture.activation",
    "scoresde.nn.UNet.norm": "architecture.norm",
    "scoresde.nn.UNet.groups": "architecture.norm.exceptions",
    "scoresde.nn.UNet.rescale": "architecture.rescale",
    "scoresde.nn.UNet.init_scale": "architecture.init_scale",
    "scoresde.nn.UNet.conditional": "architecture.conditional",
}
# Arguments that take the objects of ARGUMENT.FIELD: the class of each object, and the field that a
# plain value in its place sets.
OBJECTS = {
    "scoresde.nn.UNet.attention": ("scoresde.nn.AttentionLayout", "levels"),
    "scoresde.nn.UNet.architecture": ("scoresde.nn.Architecture", ""),
    "scoresde.nn.Architecture.norm": ("scoresde.nn.Groups", ""),
}
# Classes replaced by one with different results: their unfinished work is not resumed.
REPLACED = ("scoresde.divergence.HutchPlusPlus",)
_LONGEST = max(map(len, MOVED))
_LONGEST_NAME = 1000  # of a class, including its module
_GIVEN = "_given_arguments"  # attribute of an object of a describable class
# Names of the activations that a network accepts, as in torch.
_BUILTIN = ("scoresde", "torch.nn")
_ACTIVATIONS = ("torch.nn.modules.activation",)


def current(name: str) -> str:
    """Returns the current name for the dotted name of a module, class, or argument of a class."""
    # No renamed item has a longer name, but a file may contain a name of any length.
    dots = [i for i, letter in enumerate(name[: _LONGEST + 1]) if letter == "."]
    for end in (len(name), *reversed(dots)):
        if end <= _LONGEST and name[:end] in MOVED:
            return current(MOVED[name[:end]] + name[end:])
    short = _in_room(name)
    return current(MOVED[short]) if short in MOVED else name


def _in_room(name: str) -> str:
    """Returns the public name of a class, independent of the submodule that defines it."""
    parts = name.split(".")
    deep = parts[0] == "scoresde" and len(parts) > 3
    return ".".join((*parts[:2], parts[-1])) if deep else name


def updated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's recipe with the current names of sections, classes and arguments.

    Raises:
        InputError: If it is nested too deeply.
    """
    try:
        return {MOVED.get(section, section): _updated(tree) for section, tree in recipe.items()}
    except RecursionError as error:
        raise InputError("The recipe is nested too deeply; the file is damaged.") from error


def _updated(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return [_updated(value) for value in tree]
    if not isinstance(tree, Mapping):
        return tree
    if not isinstance(tree.get("_target_"), str):
        return {key: _updated(value) for key, value in tree.items()}
    target = current(tree["_target_"])
    owner, arguments = _in_room(target), {"_target_": target}
    for key, value in tree.items():
        if key != "_target_":
            path = MOVED.get(f"{owner}.{key}")
            _put(arguments, owner, path.split(".") if path else [key], _updated(value))
    return arguments


def _put(arguments: dict[Any, Any], owner: str, path: Sequence[Any], value: Any) -> None:
    """Sets an argument of a class, or of an object among its arguments."""
    (name, *rest), argument = path, f"{owner}.{path[0]}"
    if argument not in OBJECTS:
        arguments[name] = value
        return
    kind, plain = OBJECTS[argument]
    inside = arguments.setdefault(name, {"_target_": kind})
    if not rest:
        inside |= _fields(value, plain)
    elif value is not None:  # None was the default of every argument that became a field
        _put(inside, kind, rest, value)


def _fields(value: Any, plain: str) -> Mapping[str, Any]:
    """Returns the fields of the object that a plain value in its place represents."""
    if isinstance(value, Mapping):
        return value
    return {} if value is None else {plain: value}


def renamed(module: str) -> Callable[[str], Any]:
    """Returns a module's ``__getattr__``, which resolves renamed items with a warning."""

    def find(name: str) -> Any:
        old = f"{module}.{name}"
        new = current(old)
        home, _, attribute = new.rpartition(".")
        moved = new != old and not name.startswith("__")
        value = getattr(importlib.import_module(home), attribute, None) if moved else None
        if value is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{old} is deprecated and will be removed; use {new}."
        warnings.warn(text, FutureWarning, stacklevel=2)
        return value

    return find


def accepts_moved(kind: type[Kind]) -> type[Kind]:
    """Makes a class accept its renamed arguments (``MOVED``), with a warning."""
    moved, original = moved_arguments(kind), kind.__init__
    owner, signature = _in_room(f"{kind.__module__}.{kind.__name__}"), inspect.signature(kind)

    @functools.wraps(original)
    def init(self: Any, *values: Any, **named: Any) -> None:
        old = {name: named.pop(name) for name in moved if name in named}
        if old:  # positional ones too: one may be an object that gets a field
            values, named = (), dict(signature.bind_partial(*values, **named).arguments)
        for name, value in old.items():
            new, *path = moved[name].split(".")
            if new in named and not path:
                raise TypeError(
                    f"{kind.__name__} accepts either {new} or {name}, its old name, got both; "
                    f"pass only {new}."
                )
            form = _form(owner, new, path)
            text = f"The argument {name} of {kind.__name__} is deprecated; use {form}."
            warnings.warn(text, FutureWarning, stacklevel=2)
            named[new] = _with_field(f"{owner}.{new}", named.get(new), path, value)
        original(self, *values, **named)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


def _form(owner: str, name: str, path: Sequence[str]) -> str:
    """Returns the text form of an argument: its name, or for a field, the object as well."""
    if not path:
        return name
    kind, _ = OBJECTS[f"{owner}.{name}"]
    inner = _form(kind, path[0], path[1:])
    return f"{name}={_last(kind)}({inner}{'' if '=' in inner else '=...'})"


def _with_field(argument: str, thing: Any, path: Sequence[str], value: Any) -> Any:
    """Returns the new value of an argument: ``value`` itself, or its object with a field set."""
    if not path:
        return value
    name, plain = OBJECTS[argument]
    kind = _locate(name, ())
    made = thing if isinstance(thing, kind) else kind(**_fields(thing, plain))
    if value is None:  # as in _put
        return made
    inner = _with_field(f"{name}.{path[0]}", getattr(made, path[0]), path[1:], value)
    return dataclasses.replace(made, **{path[0]: inner})


def moved_arguments(kind: type) -> dict[str, str]:
    """Returns the current names of a class's renamed arguments, by their old names."""
    prefix = f"{_in_room(f'{kind.__module__}.{kind.__name__}')}."
    return {k.removeprefix(prefix): new for k, new in MOVED.items() if k.startswith(prefix)}


def names_of(kind: type) -> set[str]:
    """Returns the current and former names of a class, without modules."""
    old = (name for name in MOVED.keys() - {*REPLACED} if _last(current(name)) == kind.__name__)
    return {kind.__qualname__, *map(_last, old)}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def build(tree: Any, allow: Iterable[str] = ()) -> Any:
    """Builds the object that a tree of plain values describes.

    Arguments:
        tree: Mappings with ``_target_`` become objects; other values stay.
        allow: Packages besides ``scoresde`` whose classes and functions may be called: names, or
            a single name.

    Raises:
        InputError: If a name is not allowed or not found, or does not accept its arguments.
    """
    try:
        return _build(tree, (allow,) if isinstance(allow, str) else tuple(allow))
    except RecursionError as error:
        raise InputError("The recipe is nested too deeply; the file is damaged.") from error


def _build(tree: Any, allow: tuple[str, ...]) -> Any:
    if isinstance(tree, Mapping):
        values = {key: _build(value, allow) for key, value in tree.items() if key != "_target_"}
        return _call(tree["_target_"], values, allow) if "_target_" in tree else values
    if isinstance(tree, list | tuple):
        return [_build(value, allow) for value in tree]
    return tree


def _call(name: Any, arguments: dict[str, Any], allow: tuple[str, ...]) -> Any:
    target = _locate(name, allow)
    try:
        return target(**arguments)
    except InputError:
        raise
    except Exception as error:  # any error that such arguments cause
        raise InputError(
            f"Cannot build {name} from the arguments {brief(arguments)}: {brief(error)}."
        ) from error


def _locate(name: Any, allowed: tuple[str, ...]) -> Any:
    """Returns a class or function that a checkpoint may call."""
    packages = (*_BUILTIN, *allowed)
    if isinstance(name, str) and len(name) > _LONGEST_NAME:  # importing it would take memory
        raise InputError(
            f"The checkpoint names {brief(name)!r}, which has {len(name)} characters, more than "
            f"{_LONGEST_NAME}; do not trust this file."
        )
    if not isinstance(name, str) or not _within(name, packages) or "._" in f".{name}":
        package = str(name).partition(".")[0]
        yours = package.isidentifier() and package not in (
            *sys.stdlib_module_names,
            "scoresde",
            "torch",
        )
        advice = "Do not trust this file."
        if yours and _within(name, allowed):
            advice = "No part of its path may start with an underscore."
        elif yours:
            advice = (
                f"If you trust its package, use allow={package} (in Python, allow=[{package!r}])."
            )
        raise InputError(
            f"The checkpoint names {name!r}, which is not a public name in an allowed package "
            f"({', '.join(packages)}). {advice}"
        )
    module_name, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"The checkpoint names {name!r}, which was not found: {error}."
        ) from error
    home = getattr(target, "__module__", None) or ""
    ours = _within(home, ROOMS[-2:]) or (
        isinstance(target, type) and _within(home, (*ROOMS, *_ACTIVATIONS))
    )
    if not callable(target) or not (ours or _within(home, allowed)):
        raise InputError(
            f"The checkpoint names {name!r}, from which no part of a model or data set is built; "
            "do not trust this file."
        )
    return target


def describe(thing: Any) -> Any:
    """Returns the recipe of an object, from which :func:`build` makes an equal object.

    It contains the arguments that differ from the defaults.

    Arguments:
        thing: A frozen dataclass of this package, an object of a :func:`describable` class, an
            activation of torch with its default arguments, a plain value, or a list, tuple or
            mapping of them.

    Raises:
        InputError: If ``thing`` is anything else.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    if isinstance(thing, Mapping) and "_target_" not in thing:
        return {key: describe(value) for key, value in thing.items()}
    if isinstance(thing, numbers.Integral):  # such as those of NumPy
        return int(thing)
    kind, parameters = type(thing), getattr(thing, "__dataclass_params__", None)
    if kind.__module__ in _ACTIVATIONS and repr(thing) == repr(kind()):
        return {"_target_": f"torch.nn.{kind.__name__}"}
    kept = getattr(thing, _GIVEN, None) is not None
    known = kept or (parameters is not None and parameters.frozen)
    name = _public(kind) if known else None
    if name is None and kept:  # a user's class
        name = f"{kind.__module__}.{kind.__qualname__}"
    if name is None or "<" in name or name.startswith("__main__."):
        raise InputError(
            "A recipe supports plain values, frozen dataclasses of scoresde and objects of "
            f"describable classes defined in a module, got {brief(thing)}; write its recipe by "
            "hand, or decorate its class with @scoresde.recipe.describable."
        )
    return {"_target_": name, **{key: describe(value) for key, value in changed(thing).items()}}


def describable(kind: type[Kind]) -> type[Kind]:
    """Makes the objects of a class store their arguments, for :func:`describe`.

    It is for classes other than dataclasses, such as networks. A subclass must be decorated too.
    """
    original, signature = kind.__init__, inspect.signature(kind)

    @functools.wraps(original)
    def init(self: Any, *values: Any, **named: Any) -> None:
        if type(self) is kind:
            with contextlib.suppress(TypeError):  # the class itself reports wrong arguments
                vars(self)[_GIVEN] = dict(signature.bind(*values, **named).arguments)
        original(self, *values, **named)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


def _public(kind: type) -> str | None:
    """Returns the shortest public name of a class of this package, if it has one."""
    home, name = kind.__module__.split("."), kind.__name__
    if home[0] != "scoresde" or any(part.startswith("_") for part in (*home, name)):
        return None
    homes = (".".join(home[: i + 1]) for i in range(len(home)))
    found = (h for h in homes if getattr(importlib.import_module(h), name, None) is kind)
    return next((f"{h}.{name}" for h in found), None)


def changed(thing: Any) -> dict[str, Any]:
    """Returns the fields or stored arguments of an object that differ from their defaults."""
    usual, nothing = defaults(type(thing)), object()
    given = getattr(thing, _GIVEN, None)
    if given is None:
        given = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
    return {k: v for k, v in given.items() if not _equal(v, usual.get(k, nothing))}


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # tensors and arrays compare one by one
        return False


def defaults(kind: Any) -> dict[str, Any]:
    """Returns the default values of the arguments of a class or function."""
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):  # it has no signature
        return {}
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        if field.name in found and field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def complete(tree: Any) -> Any:
    """Returns a recipe with the defaults of its classes filled in, for comparison only.

    Each class has its shortest name. Nothing is built or imported; names in modules that are not
    loaded are left unchanged.
    """
    if isinstance(tree, list | tuple):
        return [complete(value) for value in tree]
    if not isinstance(tree, Mapping):
        return tree
    spelled, kind = {}, _in_use(tree.get("_target_"))
    for key, value in defaults(kind).items():
        with contextlib.suppress(InputError):  # such as a function, which only equals itself
            spelled[key] = complete(describe(value))
    spelled |= {key: complete(value) for key, value in tree.items()}
    name = _public(kind) if isinstance(kind, type) else None
    return spelled if name is None else {**spelled, "_target_": name}


def _in_use(name: Any) -> Any:
    """Returns the object of a dotted name in the loaded modules, or None."""
    home, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    try:
        return getattr(sys.modules.get(home), attribute, None)
    except Exception:  # a module may resolve names with its own code
        return None


def brief(thing: Any) -> str:
    """Returns a one-line description of at most 200 characters."""
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
