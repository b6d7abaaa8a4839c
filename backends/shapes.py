"""Shapes as text: trtexec's ``x:1x4x64x64,t:1`` and polygraphy's ``x:[1,4,64,64],t:[1]``, and symbolic sizes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hasten.backends.manifest import Dim, TensorSpec
from hasten.errors import UsageError, nearest

Shape = tuple[int, ...]
EXAMPLE = "x:1x4x64x64,t:1 or x:[1,4,64,64],t:[1]"


class Profile(NamedTuple):
    """The least, most frequent and greatest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape


Shapes = str | Mapping[str, Sequence[int]]
"""One shape for every input: as text, or by name."""


def parse_shapes(text: str) -> dict[str, Shape]:
    """Read the shapes of named inputs; both grammars may be mixed, and ``t:[]`` is a scalar.

    >>> parse_shapes("x:2x4x64x64,t:[2]")
    {'x': (2, 4, 64, 64), 't': (2,)}
    """
    shapes: dict[str, Shape] = {}
    at = 0
    while True:
        name, at = _name(text, at)
        if name in shapes:
            raise _error(text, at - len(name) - 1, f"input {name!r} is named twice")
        shapes[name], at = _bracketed(text, at) if text[at : at + 1] == "[" else _crossed(text, at)
        if at == len(text):
            return shapes
        if text[at] != ",":
            raise _error(text, at, "expected ','")
        at += 1


def parse_profiles(shapes: Shapes | tuple[Shapes, Shapes, Shapes]) -> dict[str, Profile]:
    """One `Shapes` for fixed sizes, or three of them: least, most frequent (which is optimised for), greatest.

    >>> parse_profiles(("x:1x4", "x:2x4", "x:8x4"))
    {'x': Profile(min=(1, 4), opt=(2, 4), max=(8, 4))}
    """
    if isinstance(shapes, tuple):
        if len(shapes) != 3:
            raise UsageError(f"shapes: {len(shapes)} given; give one, or three for min, opt and max")
        low, opt, high = (_as_dict(s) for s in shapes)
    else:
        low = opt = high = _as_dict(shapes)
    for kind, other in (("min", low), ("max", high)):
        if other.keys() != opt.keys():
            raise UsageError(
                f"shapes: {kind} names {', '.join(other)}, opt names {', '.join(opt)}; name the same inputs"
            )
    profiles = {name: Profile(low[name], opt[name], high[name]) for name in opt}
    for name, profile in profiles.items():
        if len({len(shape) for shape in profile}) > 1:
            ranks = ", ".join(str(len(shape)) for shape in profile)
            raise UsageError(f"shapes: input {name!r} has {ranks} dimensions in min, opt, max; give the same number")
        for axis, (least, best, most) in enumerate(zip(*profile, strict=True)):
            if not least <= best <= most:
                raise UsageError(
                    f"shapes: input {name!r}, dimension {axis}: min {least}, opt {best}, max {most} do not ascend"
                )
    return profiles


def check_profiles(profiles: Mapping[str, Profile], inputs: Sequence[TensorSpec]) -> None:
    """Refuse profiles for inputs that do not exist, of another rank, or that change a fixed size."""
    specs = {t.name: t for t in inputs}
    for name, profile in profiles.items():
        if name not in specs:
            raise UsageError(f"shapes: there is no input {name!r}; inputs: {', '.join(specs)}.{nearest(name, specs)}")
        shape = specs[name].shape
        if len(shape) != len(profile.opt):
            raise UsageError(
                f"shapes: input {name!r} has {len(shape)} dimensions {format_shape(shape)}, {len(profile.opt)} given"
            )
        for axis, (size, least, most) in enumerate(zip(shape, profile.min, profile.max, strict=True)):
            if isinstance(size, int) and not least == most == size:
                given = least if least != size else most
                raise UsageError(f"shapes: input {name!r}, dimension {axis} is fixed to {size}, {given} given")


def format_shape(shape: Sequence[Dim]) -> str:
    """As Python writes a tuple, symbols without quotes.

    >>> format_shape((2, 4, "h", "w"))
    '(2, 4, h, w)'
    """
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def multiple(dim: Dim) -> tuple[int, str] | None:
    """Split ``8*h`` into 8 and ``h``; None for anything else.

    >>> multiple("8*h"), multiple("h"), multiple(4)
    ((8, 'h'), None, None)
    """
    factor, star, symbol = str(dim).partition("*")
    return (int(factor), symbol) if star and factor.isdecimal() and symbol.isidentifier() else None


def bound(shape: Sequence[Dim], sizes: Sequence[int]) -> dict[str, int]:
    """Read the values of symbols off an array of that shape.

    >>> bound(("b", 4, "8*h"), (2, 4, 24))
    {'b': 2, 'h': 3}
    """
    found = {}
    for dim, size in zip(shape, sizes, strict=True):
        if (scaled := multiple(dim)) is not None:
            found[scaled[1]] = size // scaled[0]
        elif isinstance(dim, str):
            found[dim] = size
    return found


_MAX_POWER = 4
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(dim: Dim, symbols: Mapping[str, int]) -> int | None:
    """Compute the size that ``dim`` stands for; None if a symbol is unbound or it is not plain integer arithmetic.

    >>> evaluate("8*h", {"h": 4}), evaluate("8*h", {}), evaluate("batch size", {"batch size": 2})
    (32, None, 2)
    """
    if isinstance(dim, int):
        return dim
    if dim in symbols:
        return symbols[dim]
    try:
        return _value(ast.parse(dim, mode="eval").body, symbols)
    except (SyntaxError, KeyError, ZeroDivisionError, ValueError):
        return None


def _power(size: int, power: int) -> int:
    """``h**2`` tokens of a square picture; a manifest may not ask for numbers without end."""
    if not 0 <= power <= _MAX_POWER:
        raise ValueError(power)
    raised: int = size**power
    return raised


def _value(node: ast.expr, symbols: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return symbols[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, symbols), _value(right, symbols))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, symbols), _value(right, symbols))
    raise ValueError(node)


def _as_dict(shapes: Shapes) -> dict[str, Shape]:
    if isinstance(shapes, str):
        return parse_shapes(shapes)
    for name, shape in shapes.items():
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
            raise UsageError(f"shapes: input {name!r} has shape {tuple(shape)}; sizes are whole numbers from 1")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _name(text: str, at: int) -> tuple[str, int]:
    """Read a name, which may itself hold colons (``input:0``): the last one before the sizes ends it."""
    end = next((i for i in range(at, len(text)) if text[i] in ",["), len(text))
    colon = text.rfind(":", at, end)
    if colon < 0:
        raise _error(text, end, "expected ':' after an input's name")
    if colon == at:
        raise _error(text, at, "expected an input's name")
    return text[at:colon], colon + 1


def _number(text: str, at: int) -> tuple[int, int]:
    end = at
    while end < len(text) and text[end] in "0123456789":
        end += 1
    if end == at or int(text[at:end]) == 0:
        raise _error(text, at, "expected a whole number from 1")
    return int(text[at:end]), end


def _crossed(text: str, at: int) -> tuple[Shape, int]:
    size, at = _number(text, at)
    sizes = [size]
    while text[at : at + 1] == "x":
        size, at = _number(text, at + 1)
        sizes.append(size)
    return tuple(sizes), at


def _bracketed(text: str, at: int) -> tuple[Shape, int]:
    at += 1
    sizes: list[int] = []
    while text[at : at + 1] != "]":
        if sizes:
            if text[at : at + 1] != ",":
                raise _error(text, at, "expected ',' or ']'")
            at += 1
        while text[at : at + 1] == " ":
            at += 1
        size, at = _number(text, at)
        sizes.append(size)
    return tuple(sizes), at + 1


def _error(text: str, at: int, expected: str) -> UsageError:
    found = repr(text[at]) if at < len(text) else "the end"
    return UsageError(f"shapes {text!r}: {expected} at position {at + 1}, found {found}; write {EXAMPLE}")
