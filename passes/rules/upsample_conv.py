"""Nearest 2x upsampling, then a 3x3 convolution -> ``upsample_conv2d``: four 2x2 convolutions on the small map.

Every output pixel of the pair sees only a 2x2 window of the small map, with the 3x3 kernel's taps that fall on one
source pixel added up: exact, 2.25 times fewer multiplications, and the upsampled map is never written: a
resize convolution is a sub-pixel convolution whose taps are shared (Aitken et al., arXiv 1707.02937). Left alone: other
factors, strides, dilations, groups and paddings; an upsampled map that somebody else reads.
"""

from __future__ import annotations

from typing import Any

from hasten.passes.pattern import GraphView, Match, Op, Var
from hasten.passes.rule import Rule

_UP = Op("upsample_nearest", (Var("x", rank=4),), binds=("scale",))
_WEIGHTS = (Var("weight", rank=4), Var("bias", optional=True))
_BINDS = ("stride", "padding", "dilation", "groups")
_DIRECT = Op("conv2d", (_UP, *_WEIGHTS), binds=_BINDS)
_PADDED = Op("conv2d", (Op("pad", (_UP,), attrs=(("value", 0.0),), binds=("pads",)), *_WEIGHTS), binds=_BINDS)


def _guard(view: GraphView[Any], found: Match[Any]) -> str | None:
    kernel = (view.shape(found["weight"]) or ())[2:]
    if kernel != (3, 3):
        return f"the kernel is {kernel}, not (3, 3)"
    if found.attrs["scale"] != (2, 2):
        return f"the map is upsampled {found.attrs['scale']} times, not (2, 2)"
    pads = tuple(found.attrs.get("pads", ()))
    wanted: dict[str, Any] = {
        "stride": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "padding": (0, 0, 0, 0) if pads else (1, 1, 1, 1),
    }
    for key, value in wanted.items():
        if found.attrs[key] != value:
            return f"the convolution's {key} is {found.attrs[key]}, not {value}"
    if pads and pads != (1, 1, 1, 1):
        return f"the map is padded by {pads}, not by one on each side"
    return None


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    return view.emit("upsample_conv2d", [found["x"], found["weight"], found.values["bias"]], {}, at=root)


UPSAMPLE_CONV = Rule(
    name="upsample-conv",
    spellings=(("direct", _DIRECT), ("padded", _PADDED)),
    guard=_guard,
    replace=_replace,
    anchors=frozenset({"upsample_nearest"}),
)
