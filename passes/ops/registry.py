"""How an operator becomes ``torch.ops.hasten.*``, and what every implementation must know about its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.errors import UsageError

# The library must live as long as the process: torch unregisters its operators when it is collected.
LIBRARY = torch.library.Library("hasten", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Tensor]) -> None:
    """Define ``hasten::<schema>`` with one implementation that consists of other operators.

    CompositeImplicitAutograd: torch.export keeps the operator as one node, every later stage (AOTAutograd, Inductor,
    AOTInductor, ``run_decompositions``) traces through ``implementation``, and autograd differentiates what it finds
    there.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")


def register_opaque(schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define ``hasten::<schema>`` as an operator that compilers call and do not look into.

    ``implementation`` serves every device that no kernel is registered for (`passes.ops.native` has the CPU's);
    ``fake`` gives shape, type and memory format. Compilers may hand over operands in any memory format. There is no
    backward pass: asking for one raises `UsageError`, rather than leaving gradients out.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(name, fake, "Meta")

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise UsageError(
            f"hasten::{name} has no backward pass: optimised modules are for inference; train the original module, or "
            "torch.compile it with backend 'hasten', which leaves graphs that need gradients alone"
        )

    torch.library.register_autograd(f"hasten::{name}", backward, lib=LIBRARY)


def runs_eagerly(x: Tensor) -> bool:
    """Whether ``x`` is computed now, by torch's own kernels, rather than traced for a compiler to fuse."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in: float64 stays, everything narrower is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a backward pass, which the hand-written kernels do not have."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
