"""Exporting a flat graph for a package; where its sizes are a range, it must hold for all of it."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError

if TYPE_CHECKING:
    import torch


def exported(
    module: torch.fx.GraphModule, example_inputs: tuple[torch.Tensor, ...], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """Export ``module`` (tensors in, tuple of tensors out); ``dynamic_shapes`` is torch's, with an item for each input.

    `HastenError` where the graph holds for less than the whole range.
    """
    import torch

    many = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    shapes = (dynamic_shapes,) if many and dynamic_shapes is not None else dynamic_shapes
    try:
        program = torch.export.export(module, example_inputs, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        found = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
        raise HastenError(
            "the graph does not hold for the whole range of its dynamic sizes: "
            f"{found[0] if found else str(error).splitlines()[0]}; make the range narrower, or fix the size"
        ) from error
    except (RuntimeError, KeyError) as error:
        if dynamic_shapes is None or not _split_in_a_branch(error):
            raise
        raise HastenError(
            "a branch returns what was reshaped from a product of dynamic sizes to these sizes, as a step cache's does "
            "that ends with a network's own unpatching of square pictures, and torch.cond finds no strides for that; "
            "fix height and width, where the batch may stay dynamic, take a cache that skips blocks, or build it for "
            "onnxruntime"
        ) from error
    _check_dynamic(program, dynamic_shapes)
    return program


def _split_in_a_branch(error: BaseException) -> bool:
    """Whether torch gave up as it put the strides of two branches' results together (`_higher_order_ops.cond`)."""
    return any(frame.name == "_bound_stride" for frame in traceback.extract_tb(error.__traceback__))


def _check_dynamic(program: torch.export.ExportedProgram, dynamic_shapes: Any) -> None:
    """Refuse a graph that turned out to hold for fewer sizes than it shall: it would be wrong for every other."""
    wanted = [axes or {} for axes in dynamic_shapes or ()]
    users = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in users]
    for node, axes in zip(nodes, wanted, strict=False):
        for axis in axes:
            size = node.meta["val"].shape[axis]
            if isinstance(size, int) or size.node.expr.is_Integer:
                raise HastenError(
                    f"dimension {axis} of input {node.name!r} shall be dynamic, and the graph holds for {size} "
                    "only; make it fixed, or find the pass that fixed it with --skip"
                )
            found = program.range_constraints.get(size.node.expr)
            low, high = getattr(axes[axis], "min", None), getattr(axes[axis], "max", None)
            # torch takes every size for 2 or more while it traces, also where a Dim begins at 1
            if found is not None and (found.lower > max(low or found.lower, 2) or found.upper < (high or 0)):
                raise HastenError(
                    f"dimension {axis} of input {node.name!r} shall be {low or 1} to {high or 'any'}, and the graph "
                    f"holds for {found.lower} to {found.upper} only; make the range narrower"
                )
