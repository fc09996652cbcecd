"""Identities of stored results, as texts that are compared before results are reused.

The text of an object is a call that constructs it. Default arguments are omitted, so the text is
the same if a class gets a new argument. Earlier releases wrote every field, and some names have
changed: texts are therefore compared with objects value by value. Functions are identified by
their qualified names and closures, tensors by their digests.
"""

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch

from scoresde.errors import InputError
from scoresde.recipe import changed, complete, moved_arguments, names_of, updated


def text_of(value: Any) -> str:
    """Returns the text of a value.

    Raises:
        InputError: If it contains itself.
    """
    try:
        return _text(value)
    except RecursionError as error:
        raise InputError(
            "The identity of stored results must not contain itself, got a "
            f"{type(value).__name__} that does; use plain values."
        ) from error


def _text(value: Any) -> str:
    match value:
        case torch.Tensor():
            return f"tensor({fingerprint(value)!r})"
        case list() | tuple():
            inner = ", ".join(map(_text, value))
            comma = "," if len(value) == 1 else ""
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{comma})"
        case Mapping():
            return f"{{{', '.join(f'{k!r}: {_text(v)}' for k, v in value.items())}}}"
    if is_dataclass(value) and not isinstance(value, type):
        return _call(type(value).__qualname__, changed(value))
    plain = not callable(value) and type(value).__repr__ is not object.__repr__
    return repr(value) if plain else _named(value)


def _named(value: Any) -> str:
    """Returns the qualified name of a function or class, and its closure."""
    named = value if getattr(value, "__qualname__", None) else type(value)
    home = getattr(named, "__module__", None) or "builtins"
    # Removes the brackets of <locals>, which is not a name.
    name = f"{home}.{named.__qualname__}".replace("<", "").replace(">", "")
    match value:
        case partial():
            return _call(name, {"func": value.func, "args": value.args, **value.keywords})
        case MethodType():
            return _call(name, {"self": value.__self__})
        case FunctionType(__closure__=tuple() as cells):
            held = zip(value.__code__.co_freevars, cells, strict=True)
            return _call(name, {key: cell.cell_contents for key, cell in held})
    return name if named is value else _call(name, getattr(value, "__dict__", {}))


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={_text(v)}' for k, v in arguments.items())})"


def agrees(text: str, value: Any) -> bool:
    """Returns whether a text, also one of an earlier release, describes a value."""
    if isinstance(value, str):
        return text == value
    if text in (str(value), text_of(value)):
        return True
    try:
        return _is(ast.parse(text, mode="eval").body, value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False  # no call, or a damaged file


def _is(node: ast.expr, value: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        return isinstance(node, ast.Call) and _makes(node, value)
    if isinstance(value, list | tuple):
        if not isinstance(node, ast.List | ast.Tuple) or len(node.elts) != len(value):
            return False
        return all(map(_is, node.elts, value))
    if isinstance(value, Mapping):  # a recipe
        there, here = (updated({"": tree}) for tree in (ast.literal_eval(node), value))
        return bool(complete(there) == complete(here))
    # Numbers without a literal, such as inf, and functions are compared by their texts.
    own = ast.parse(text_of(value), mode="eval").body
    return ast.unparse(node) == ast.unparse(own) or _literal(node) == (value,)


def _literal(node: ast.expr) -> tuple[Any, ...]:
    try:
        return (ast.literal_eval(node),)
    except ValueError:
        return ()


def _makes(call: ast.Call, value: Any) -> bool:
    """Returns whether a call has the class of a value and all its non-default arguments."""
    moved, rest = moved_arguments(type(value)), changed(value)
    given = {moved.get(str(word.arg), str(word.arg)): word.value for word in call.keywords}
    known = {field.name for field in fields(value)}
    if call.args or ast.unparse(call.func) not in names_of(type(value)):
        return False
    return (rest.keys() <= given.keys() <= known) and all(
        _is(node, getattr(value, name)) for name, node in given.items()
    )


def fingerprint(*parts: str | torch.Tensor) -> str:
    """Returns 16 digits that depend on every text, every number and the order of rows."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]
