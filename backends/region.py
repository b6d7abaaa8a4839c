"""From a policy to a cut of a graph: the region that a reused call leaves out, and what the decision looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.errors import HastenError, UsageError
from hasten.passes.fx.step_cache import Cut
from hasten.passes.fx.view import fake

if TYPE_CHECKING:
    from torch import fx

    from hasten.passes.steps.policy import Policy


@dataclass(frozen=True)
class Found:
    """A cut, one line about it, and the part of the graph's operations that is inside."""

    cut: Cut
    summary: str
    share: float


def find_cut(module: fx.GraphModule, policy: Policy, region: str | None = None) -> Found:
    """Find what ``policy`` skips in ``module``; `HastenError` with the reason where there is nothing of the kind."""
    if policy.granularity == "output":
        if region is not None:
            raise UsageError(f"region {region!r}: {policy.name} skips the whole model; leave the region out")
        return _whole(module, policy)
    raise HastenError(
        f"{policy.name} skips part of a model ({policy.granularity}), and regions are found in no graph yet"
    )


def _whole(module: fx.GraphModule, policy: Policy) -> Found:
    """The whole graph, from the first input that is like the first output to that output."""
    (written,) = module.graph.find_nodes(op="output")
    outputs = list(written.all_input_nodes)
    after = outputs[0]
    kind = fake(after)
    inputs = module.graph.find_nodes(op="placeholder")
    like = [n for n in inputs if getattr(fake(n), "shape", None) == kind.shape and fake(n).dtype == kind.dtype]
    if not like or len(outputs) != 1:
        shapes = ", ".join(f"{n.name} {tuple(fake(n).shape)}" for n in inputs if hasattr(fake(n), "shape"))
        raise HastenError(
            f"{policy.name} adds the model's last change to its input, and no input is like the one output "
            f"{tuple(kind.shape)}: inputs are {shapes}"
        )
    inside = tuple(n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output"))
    signal = like[0] if policy.decision.signal == "input" else None
    return Found(Cut((like[0],), (after,), inside, signal=signal), f"the whole model, {like[0].name} to output", 1.0)
