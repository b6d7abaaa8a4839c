"""GELU spelled out -> one ``gelu`` node.

Formula: ``x/2 (1 + erf(x/sqrt 2))`` (Hendrycks & Gimpel, 1606.08415), and its tanh form ``x/2 (1 + tanh(sqrt(2/pi) (x
+ 0.044715 x^3)))``. The factors may be associated, ordered and written in any way: ``x*0.5*(…)``, ``0.5*(x*(…))``,
``x/2*(…)``, ``x^3`` as a power or a product, the cubic with ``x`` factored out. Left alone: one formula for the other
(that would be an approximation).
"""

from __future__ import annotations

import math
from typing import Any

from hasten.passes.pattern import Const, GraphView, Match, OneOf, Op, Product, Var
from hasten.passes.rule import Rule

_X = Var("x")
_ERF = Product(0.5, (_X, Op("add", (Op("erf", (Product(math.sqrt(0.5), (_X,)),)), Const(1.0)))))
_CUBE = Product(0.044715, (_X, _X, _X))
_INNER = OneOf(
    (
        ("expanded", Product(math.sqrt(2 / math.pi), (Op("add", (_X, _CUBE)),))),
        ("factored", Product(math.sqrt(2 / math.pi), (_X, Op("add", (Product(0.044715, (_X, _X)), Const(1.0)))))),
    )
)
_TANH = Product(0.5, (_X, Op("add", (Op("tanh", (_INNER,)), Const(1.0)))))


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    approximate = "tanh" if "tanh" in found.ops else "none"
    return view.emit("gelu", [found["x"]], {"approximate": approximate}, at=root)


GELU = Rule(
    name="gelu",
    spellings=(("erf", _ERF), ("tanh", _TANH)),
    replace=_replace,
    anchors=frozenset({"erf", "tanh"}),
    variant=lambda found: "tanh" if "tanh" in found.ops else "erf",
)
