"""Symbolic sizes: what ONNX's inference leaves open where a Reshape's constant target settles it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from hasten.passes.onnx.types import GENERATED

if TYPE_CHECKING:
    from hasten.passes.onnx.graph import Scope

_PRODUCT = re.compile(r"[A-Za-z0-9_]+(\*[A-Za-z0-9_]+)*")


def unify(scopes: Iterable[Scope]) -> None:
    """Give made-up sizes the names that they are equal to: the -1 and 0 of Reshape targets, in order of computation.

    A made-up name stands for one size wherever it occurs, so what one Reshape settles is put in everywhere.
    """
    known: dict[str, Any] = {}
    every = list(scopes)
    for scope in every:
        for node in scope.graph.nodes:
            if node.op == "Reshape" and not node.domain:
                _reshape(node, known)
    if not known:
        return
    for scope in every:
        for node in scope.graph.nodes:
            for tensor in node.outputs:
                if isinstance(tensor, gs.Variable) and tensor.shape is not None:
                    tensor.shape = [settled(d, known) for d in tensor.shape]


def settled(dim: Any, known: dict[str, Any]) -> Any:
    """``dim``, or what it is known to equal."""
    while isinstance(dim, str) and dim in known:
        dim = known[dim]
    return dim


def _reshape(node: Any, known: dict[str, Any]) -> None:
    source, output = node.inputs[0], node.outputs[0]
    target = _content(node.inputs[1]) if len(node.inputs) > 1 else None
    if target is None or node.attrs.get("allowzero", 0) or source.shape is None or output.shape is None:
        return
    if len(target) != len(output.shape) or (0 in target[len(source.shape) :]):
        return
    before = [settled(d, known) for d in source.shape]
    after: list[Any] = [before[axis] if size == 0 else size for axis, size in enumerate(target)]
    if -1 in target:
        open_axis = target.index(-1)
        after[open_axis] = quotient(before, [d for axis, d in enumerate(after) if axis != open_axis])
    shape = list(output.shape)
    for axis, wanted in enumerate(after):
        found = settled(shape[axis], known)
        if wanted is None or wanted == found or isinstance(found, (int, np.integer)):
            continue
        if found is None:
            shape[axis] = wanted
        elif GENERATED.fullmatch(found) and wanted != found:
            known[found] = wanted
    output.shape = shape


def _content(tensor: Any) -> list[int] | None:
    if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) <= 16:
        return [int(n) for n in np.asarray(tensor.values).reshape(-1)]
    if tensor.inputs and tensor.inputs[0].op == "Constant":
        value = tensor.inputs[0].attrs.get("value")
        if value is not None:
            return _content(value)
        listed = tensor.inputs[0].attrs.get("value_ints")
        return None if listed is None else [int(n) for n in listed]
    return None


def quotient(sizes: Iterable[Any], others: Iterable[Any]) -> Any:
    """The size that ``others`` leave of the product of ``sizes``; None where it cannot be told.

    >>> quotient(["B", "N", 64], ["B", 4, 16])
    'N'
    >>> quotient(["B", 4, "N", 16], ["N", 16])
    '4*B'
    """
    top, bottom = _product(sizes), _product(others)
    if top is None or bottom is None or bottom[0] == 0 or top[0] % bottom[0] or bottom[1] - top[1]:
        return None
    number, symbols = top[0] // bottom[0], sorted((top[1] - bottom[1]).elements())
    if not symbols:
        return number
    return "*".join(([str(number)] if number != 1 else []) + symbols)


def _product(sizes: Iterable[Any]) -> tuple[int, Counter[str]] | None:
    number, symbols = 1, Counter[str]()
    for size in sizes:
        if isinstance(size, (int, np.integer)):
            number *= int(size)
        elif not isinstance(size, str) or not _PRODUCT.fullmatch(size):
            return None
        else:
            for factor in size.split("*"):
                if factor.isdigit():
                    number *= int(factor)
                else:
                    symbols[factor] += 1
    return number, symbols
