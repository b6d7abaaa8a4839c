"""``backend="hasten"`` up to Inductor, so that a test need not wait for a compiler: rewritten graphs run in eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager

from hasten.backends import dynamo

Backend = Callable[..., Callable[..., Any]]


def rewritten(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Run node by node, which needs no printed code: FX prints ``(-1) ** x`` as ``-1 ** x``."""
    ours, _ = dynamo.split_options(mode, options)
    if dynamo._trains(graph, example_inputs):
        dynamo.counters["training"] += 1
    else:
        dynamo._rewrite(graph, ours)
        dynamo.counters["compiled"] += 1
    return fx.Interpreter(graph).run


def traced(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Also decomposed and made functional, as Inductor would get it."""
    counters, reports = dynamo.counters.copy(), list(dynamo.reports)
    rewritten(graph, example_inputs, **kwargs)
    try:
        return aot_eager(graph, example_inputs)
    except Exception:  # Dynamo may ask for the same graph again
        clear(compiled=False)
        dynamo.counters.update(counters)
        dynamo.reports.extend(reports)
        raise


BACKENDS: dict[str, Backend] = {"rewritten": rewritten, "traced": traced}


def clear(*, compiled: bool = True) -> None:
    """Forget counters, reports, and what was compiled."""
    if compiled:
        torch._dynamo.reset()
    dynamo.counters.clear()
    dynamo.reports.clear()


def hits() -> dict[str, int]:
    """Rewrites by rule since `clear`, rules without any left out."""
    found: dict[str, int] = {}
    for report in dynamo.reports:
        for rule in report.rules:
            found[rule.name] = found.get(rule.name, 0) + rule.hits
    return {name: count for name, count in found.items() if count}


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in tensors(item)]
    return [t for v in vars(output).values() for t in tensors(v)] if hasattr(output, "__dict__") else []


def relative_error(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of ``want``, over all tensors; infinite where shapes or types differ."""
    if [(t.shape, t.dtype) for t in want] != [(t.shape, t.dtype) for t in got]:
        return float("inf")
    flat_want, flat_got = (torch.cat([_wide(t) for t in ts]) for ts in (want, got))
    difference, norm = float((flat_want - flat_got).norm()), float(flat_want.norm())
    return difference / norm if norm else difference


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).double()
