"""Options that several policies share, and the payload that they choose."""

from __future__ import annotations

from collections.abc import Mapping

from hasten.errors import UsageError
from hasten.passes.steps.forecast import Chebyshev, Taylor
from hasten.passes.steps.options import Option
from hasten.passes.steps.payload import Residual, Value
from hasten.passes.steps.policy import Payload

MOST = 1 << 40
LIMIT = Option("integer", "the most reuses in a row, -1 for any number", -1, -1, MOST)
BRANCHES = Option(
    "text",
    "what guidance branches have in common",
    "joint",
    choices=("joint", "separate", "conditional"),
)
MODULES = Option("words", "names of the modules, all of attention and feed-forward where none is given")
PAYLOADS = ("residual", "value", "taylor", "taylor-residual", "chebyshev", "chebyshev-residual")


def threshold(default: float | None = None) -> Option:
    """The option ``threshold``; 0 switches the cache off."""
    return Option("number", "0 switches the cache off", default, 0.0)


def count(meaning: str, default: int | None = 0, low: int = 0) -> Option:
    """An option that counts something."""
    return Option("integer", meaning, default, low, MOST)


def payload_options(default: str) -> Mapping[str, Option]:
    """The options ``payload`` and ``order``, which `payload` reads."""
    return {
        "payload": Option("text", "what a reused call returns", default, choices=PAYLOADS),
        "order": Option("integer", "the order of an extrapolation", None, 0, 4),
    }


def payload(name: str, order: int | None) -> Payload:
    """Build the payload; `UsageError` for an order of one that has none."""
    if name.startswith("taylor"):
        return Taylor(1 if order is None else order, of=_of(name))
    if order is not None:
        raise UsageError(f"order: {order} was given, but payload={name} does not extrapolate; payload=taylor does")
    if name.startswith("chebyshev"):
        return Chebyshev(of=_of(name))
    return Residual() if name == "residual" else Value()


def _of(name: str) -> str:
    return "residual" if name.endswith("residual") else "value"
