"""How many classes a network's inputs choose from: the rows of the tables that they are looked up in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from hasten.passes.fx.view import call_name, fake


def class_counts(graph: fx.Graph, names: Sequence[str]) -> dict[str, int]:
    """Inputs that are looked up as they are, by ``names``, one an input; nothing of those that are computed with first.

    Of several tables the shortest counts: a number beyond its end is read from elsewhere, or stops the runtime.
    """
    found: dict[str, int] = {}
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        tables = [u.args[0] for u in node.users if call_name(u) == "embedding" and u.args[1] is node]
        rows = [size for table in tables if isinstance(size := fake(table).shape[0], int)]
        if rows:
            found[name] = min(rows)
    return found
