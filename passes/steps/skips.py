"""The skip connections of a UNet: concatenations of a value with what has been made of it further down.

DeepCache (Ma et al., 2312.00858; horseee/DeepCache) keeps the deep side of one: everything between the k-th skip and
its concatenation is left out, and its ``cache_branch_id`` is k - 1 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from hasten.errors import UsageError
from hasten.passes.steps.flow import Flow, V
from hasten.passes.steps.pairs import Pairs, leaks
from hasten.passes.steps.span import Refusal


@dataclass(frozen=True)
class Skip(Generic[V]):
    """``joined`` holds ``skip`` and ``deep``, which is made from ``skip``."""

    joined: V
    skip: V
    deep: V


def find_skips(flow: Flow[V]) -> list[Skip[V]]:
    """Every skip connection, from the outermost to the innermost."""
    found = []
    for value in flow.values:
        joined = flow.data.joined(value)
        if joined is None or len(joined.parts) != 2:
            continue
        for deep, skip in (joined.parts, joined.parts[::-1]):
            if flow.place(skip) < flow.place(deep) and flow.flops(flow.path(skip, deep)):
                found.append(Skip(value, skip, deep))
                break
    return found[::-1]


def skip_pairs(flow: Flow[V], level: int) -> Pairs[V] | Refusal:
    """The ends of the region under skip connection ``level``, 1 for the outermost."""
    skips = find_skips(flow)
    if not skips:
        return Refusal("no skip connection was found: nothing is concatenated with what was made of it")
    if not 1 <= level <= len(skips):
        raise UsageError(f"level: {level} was asked for; the graph has skip connections 1 (outermost) to {len(skips)}")
    skip = skips[level - 1]
    if read := leaks(flow, [skip.skip], [skip.deep]):
        named = ", ".join(flow.view.where(v) for v in read[:3])
        return Refusal(f"{named} inside skip connection {level} is read outside it")
    return Pairs((skip.skip,), (skip.deep,), (), "what is concatenated is made from the skip, not added to it")
