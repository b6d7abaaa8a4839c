"""From a policy to a cut of a graph: the region that a reused call leaves out, and what the decision looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hasten.errors import HastenError, UsageError
from hasten.passes.fx.step_cache import Cut

if TYPE_CHECKING:
    import onnx
    from torch import fx

    from hasten.passes.onnx.step_cache import Cut as OnnxCut
    from hasten.passes.steps.policy import Policy

C = TypeVar("C")
"""The cut of one kind of graph."""


@dataclass(frozen=True)
class Found(Generic[C]):
    """A cut, lines about it for a person, and the part of the graph's operations that is inside.

    ``time`` is the timestep's input where the decision depends on it alone, else None.
    """

    cut: C
    lines: tuple[str, ...]
    share: float
    time: str | None = None

    @property
    def summary(self) -> str:
        return self.lines[0]


def find_cut(module: fx.GraphModule, policy: Policy, region: str | None = None) -> Found[Cut]:
    """Find what ``policy`` skips in ``module``.

    ``region`` is FIRST:LAST, blocks from FIRST up to LAST, which is left out. Raises `HastenError` with the reason
    where the graph has no such region: it is never cached at no effect.
    """
    from hasten.passes.fx.flow import FxFlow
    from hasten.passes.fx.view import FxView

    _refuse_blocks(policy, region)
    return _search(FxFlow(FxView(module)), Cut, policy, region)


def find_cut_onnx(model: onnx.ModelProto, policy: Policy, region: str | None = None) -> Found[OnnxCut]:
    """Find what ``policy`` skips in an ONNX model; see `find_cut`.

    Where nothing is found and the model has local functions, they are written out in place and it is looked for again.
    """
    from hasten.passes.onnx.flow import OnnxFlow
    from hasten.passes.onnx.graph import OnnxGraph
    from hasten.passes.onnx.local_functions import write_out
    from hasten.passes.onnx.step_cache import Cut as OnnxCut

    _refuse_blocks(policy, region)
    try:
        return _search(OnnxFlow(OnnxGraph(model)), OnnxCut, policy, region)
    except HastenError:
        if not write_out(model):
            raise
    return _search(OnnxFlow(OnnxGraph(model)), OnnxCut, policy, region)


def _refuse_blocks(policy: Policy, region: str | None) -> None:
    if region is not None and policy.granularity not in ("stack", "tail"):
        raise UsageError(f"region {region!r}: {policy.name} does not skip a row of blocks; leave the region out")


def _search(flow: Any, kind: Callable[..., C], policy: Policy, region: str | None) -> Found[C]:
    from hasten.passes.steps.region import find
    from hasten.passes.steps.span import Refusal

    found = find(flow, policy, region)
    if isinstance(found, Refusal):
        raise HastenError(f"{policy.name} finds nothing to skip in this graph: {found.reason}")
    kept = getattr(policy.payload, "of", policy.payload.name)  # a forecast says of what it is
    if found.no_residual is not None and kept != "value":
        raise HastenError(
            f"{policy.name} adds the last change to what comes in, which cannot be here: {found.no_residual}; take a "
            "policy whose payload is a value"
        )
    cut = kind(
        found.before,
        found.after,
        found.inside,
        kept=found.extra,
        signal=found.signal.value if found.signal is not None else None,
        signal_base=found.signal.base if found.signal is not None else None,
        tap=found.tap.value if found.tap is not None else None,
        tap_base=found.tap.base if found.tap is not None else None,
    )
    return Found(cut, tuple(found.describe(policy)), found.share, found.time if found.foldable else None)
