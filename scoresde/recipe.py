"""Recipes: trees of plain values that describe objects, and that cannot run code.

In a recipe a mapping with ``_target_`` names a class, and its other keys are the arguments. What
is built from one are the classes of the rooms listed in ``ROOMS``, torch's activations, the data
sets of ``scoresde.data``, and what is defined in packages that the user allows by name: no other
function of this package or of any other can be called, neither by a private name nor by one that
merely passes through a module (``scoresde.data.files.np.load``).
"""

import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from scoresde.errors import InputError

ROOMS = tuple(
    f"scoresde.{room}"
    for room in (
        *("sde", "model", "nn", "loss", "times", "likelihood", "bound", "cutoff"),
        *("flow", "solvers", "divergence", "sample"),
        "data",  # the last one: its functions too
    )
)
# The names of the activations, of which a network takes one, are torch's.
_BUILTIN = ("scoresde", "torch.nn")
_ACTIVATIONS = ("torch.nn.modules.activation",)


def build(tree: Any, allow: Iterable[str] = ()) -> Any:
    """Builds the object that a tree of plain values describes.

    Arguments:
        tree: Mappings with ``_target_`` become objects; other values stay.
        allow: Packages besides ``scoresde`` whose classes and functions may be called.

    Raises:
        InputError: If a name is not allowed or not found, or refuses its arguments.
    """
    try:
        return _build(tree, allow)
    except RecursionError as error:
        raise InputError("The recipe is nested too deeply; the file is damaged.") from error


def _build(tree: Any, allow: Iterable[str]) -> Any:
    if isinstance(tree, Mapping):
        values = {key: _build(value, allow) for key, value in tree.items() if key != "_target_"}
        return _call(tree["_target_"], values, allow) if "_target_" in tree else values
    if isinstance(tree, list | tuple):
        return [_build(value, allow) for value in tree]
    return tree


def _call(name: Any, arguments: dict[str, Any], allow: Iterable[str]) -> Any:
    target = _locate(name, tuple(allow))
    try:
        return target(**arguments)
    except InputError:
        raise
    except Exception as error:  # whatever such arguments lead to
        raise InputError(
            f"{name} does not take the arguments {brief(arguments)}: {brief(error)}."
        ) from error


def _locate(name: Any, allowed: tuple[str, ...]) -> Any:
    """Finds a class or function that a checkpoint may call."""
    packages = (*_BUILTIN, *allowed)
    if not isinstance(name, str) or not _within(name, packages) or "._" in f".{name}":
        package = str(name).partition(".")[0]
        yours = package.isidentifier() and package not in (
            *sys.stdlib_module_names,
            "scoresde",
            "torch",
        )
        advice = (
            f"If it is yours and you trust it, name its package: allow={package}."
            if yours
            else "The file is not to be trusted."
        )
        raise InputError(
            f"The checkpoint wants to build {name!r}, which lies outside of what may be built "
            f"({', '.join(packages)}). {advice}"
        )
    module_name, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"The checkpoint wants to build {name!r}, which is not to be found: {error}."
        ) from error
    home = getattr(target, "__module__", None) or ""
    ours = _within(home, ROOMS[-1:]) or (
        isinstance(target, type) and _within(home, (*ROOMS, *_ACTIVATIONS))
    )
    if not callable(target) or not (ours or _within(home, allowed)):
        raise InputError(
            f"The checkpoint wants to call {name!r}, which is none of the parts that a model or a "
            "data set is built of; the file is not to be trusted."
        )
    return target


def brief(thing: Any) -> str:
    """Returns one line of at most 200 characters."""
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
