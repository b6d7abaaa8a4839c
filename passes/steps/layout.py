"""In which order a value holds the elements of another one, after reshapes and transpositions.

A layout is the row-major order of a value as loops over the original's elements, outermost first: (size, stride) each.
Reshaping changes nothing about it; transposing reorders the loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Layout = tuple[tuple[int, int], ...]


def plain(sizes: Sequence[int]) -> Layout:
    """The original's own order.

    >>> plain((2, 3))
    ((6, 1),)
    """
    return ((math.prod(sizes), 1),)


def transposed(layout: Layout | None, sizes: Sequence[int], perm: Sequence[int]) -> Layout | None:
    """The order after a value of shape ``sizes`` was transposed; None where it cannot be told.

    >>> transposed(plain((2, 3)), (2, 3), (1, 0))
    ((3, 1), (2, 3))
    >>> transposed(((3, 1), (2, 3)), (3, 2), (1, 0))
    ((6, 1),)
    """
    if layout is None or (groups := _grouped(layout, sizes)) is None:
        return None
    merged: list[tuple[int, int]] = []
    for size, stride in (loop for axis in perm for loop in groups[axis]):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size != 1:
            merged.append((size, stride))
    return tuple(merged) or ((1, 1),)


def _grouped(layout: Layout, sizes: Sequence[int]) -> list[list[tuple[int, int]]] | None:
    """The loops of each axis: loops are split where an axis ends inside one."""
    groups: list[list[tuple[int, int]]] = []
    rest = list(reversed(layout))
    for size in sizes:
        groups.append([])
        wanted = size
        while wanted > 1:
            if not rest:
                return None
            count, stride = rest.pop()
            if count <= wanted and wanted % count == 0:
                groups[-1].append((count, stride))
                wanted //= count
            elif count % wanted == 0:
                inner = count // wanted
                groups[-1].append((wanted, stride * inner))
                rest.append((inner, stride))
                wanted = 1
            else:
                return None
    return groups if all(count == 1 for count, _ in rest) else None
