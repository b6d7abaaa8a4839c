"""A flat graph in a sampler's loop, as one more flat graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from hasten.backends.manifest import TensorSpec
from hasten.backends.sampling import Looping
from hasten.passes.fx.solver_loop import SolverLoop

if TYPE_CHECKING:
    from hasten.backends.program import FlatProgram


def in_a_loop(flat: FlatProgram, looping: Looping) -> FlatProgram:
    """Put ``flat``, a denoiser of fixed sizes, into the loop of `SolverLoop`; the examples are its own, and zeros."""
    module = SolverLoop(
        flat.module,
        looping.plan,
        [t.name for t in flat.inputs],
        [t.name for t in flat.outputs],
        looping.kept,
        looping.controls,
    )
    device = flat.example_inputs[0].device
    specs = [TensorSpec(s.name, s.dtype, s.shape) for s in module.inputs]
    sizes = [[int(size) for size in s.shape] for s in specs]
    examples = tuple(
        torch.zeros(size, dtype=getattr(torch, s.dtype), device=device) for s, size in zip(specs, sizes, strict=True)
    )
    return replace(
        flat,
        module=cast(torch.fx.GraphModule, module.eval()),
        example_inputs=examples,
        inputs=tuple(specs),
        outputs=tuple(TensorSpec(s.name, s.dtype, s.shape) for s in module.outputs),
        dims={},
        dynamic_shapes=None,
    )
