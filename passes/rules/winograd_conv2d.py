"""3x3 convolutions and what stands around them, for ``winograd_conv2d``.

Met: conv2d with 3x3 taps, stride 1, one group, padded inside or by a pad of zeros or of another mode before it; a
``group_norm_act`` (SiLU or none) before it that nobody else reads; an added residual, or a number a picture and
channel, behind it; a SiLU behind that; ``upsample_conv2d``. What is matched is exactly what the operator computes in
one pass over memory. Whether a site is rewritten, and with which tile, is `hasten.passes.fx.winograd`'s choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hasten.passes.pattern import As, GraphView, Match, OneOf, Op, Pattern, Var
from hasten.passes.rules import norm_operands

_BINDS = ("stride", "padding", "dilation", "groups")
NORM_PREFIX = "norm_"
_NORM = norm_operands.pattern(NORM_PREFIX, rank=4)
_WEIGHTS = (Var("weight", rank=4), Var("bias", optional=True))
MODES = {"pad": "zeros", "pad_reflect": "reflect", "pad_replicate": "replicate", "pad_circular": "circular"}


def _padded(inner: Pattern) -> OneOf:
    zeros = Op("pad", (inner,), attrs=(("value", 0.0),), binds=("pads",))
    others = ((mode, Op(name, (inner,), binds=("pads",))) for name, mode in MODES.items() if name != "pad")
    return OneOf((("zeros", zeros), *others), name="mode")


def spellings() -> Iterator[tuple[str, Pattern]]:
    """Largest first: what a user outside forbids to fuse is tried without."""
    for around in ("other-silu", "other", "silu", ""):
        for before in ("norm-pad", "pad", "norm", ""):
            core: Pattern = _NORM if "norm" in before else Var("x", rank=4)
            if "pad" in before:
                core = _padded(core)
            conv = As("conv", Op("conv2d", (core, *_WEIGHTS), binds=_BINDS))
            yield "-".join(filter(None, (before, "conv", around))), _epilogue(conv, around)
        upsampled = As("conv", Op("upsample_conv2d", (Var("x", rank=4), *_WEIGHTS)))
        yield "-".join(filter(None, ("upsample-conv", around))), _epilogue(upsampled, around)


def _epilogue(conv: Pattern, around: str) -> Pattern:
    made = Op("add", (conv, Var("other"))) if "other" in around else conv
    return Op("silu", (made,)) if "silu" in around else made


def obstacle(view: GraphView[Any], found: Match[Any], root: Any) -> str | None:
    """Why the operator does not compute the site, whose convolution is a `hasten.passes.choice.Layer`."""
    pads = found.attrs.get("pads")
    if pads is not None and (len(pads) != 4 or not all(isinstance(p, int) and p >= 0 for p in pads)):
        return f"the map is padded by {tuple(pads)}, not by whole numbers on its last two axes"
    if pads is not None and found.tags["mode"] != "zeros" and any(found.attrs["padding"]):
        return f"the map is padded twice, by {found.tags['mode']} and by zeros"
    if found.attrs.get("norm_act", "none") not in ("none", "silu"):
        return f"the norm's activation is {found.attrs['norm_act']}, not silu"
    if view.dtype(found["x"]) != view.dtype(found["weight"]) or view.dtype(root) != view.dtype(found["x"]):
        return f"the input is {view.dtype(found['x'])} and the weight {view.dtype(found['weight'])}"
    other = found.values.get("other")
    if other is not None:
        got, want = view.shape(other), view.shape(root)
        if view.dtype(other) != view.dtype(root):
            return f"{view.dtype(other)} is added to {view.dtype(root)}"
        if got is None or want is None or len(got) != 4 or view.shape(found["conv"]) != want or not _adds(got, want):
            return f"what is added has shape {got}, not that of the result {want} or one number a picture and channel"
    return None


def _adds(got: tuple[Any, ...], want: tuple[Any, ...]) -> bool:
    return got == want or (got[0] in (1, want[0]) and got[1:] == (want[1], 1, 1))


def padding(found: Match[Any]) -> tuple[list[int], str]:
    """(top, left, bottom, right) and the mode."""
    if "padding" not in found.attrs:
        return [1, 1, 1, 1], "zeros"
    top, left, bottom, right = found.attrs["padding"]
    if (pads := found.attrs.get("pads")) is not None:
        left, right, top, bottom = left + pads[0], right + pads[1], top + pads[2], bottom + pads[3]
    return [top, left, bottom, right], found.tags.get("mode", "zeros")
