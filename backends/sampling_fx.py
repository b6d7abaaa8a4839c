"""A flat graph in a sampler's loop, as one more flat graph."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from hasten.backends.manifest import Dim as Size
from hasten.backends.manifest import TensorSpec
from hasten.backends.sampling import PICTURES, Looping
from hasten.backends.shapes import bound, evaluate, format_shape, multiple
from hasten.errors import HastenError
from hasten.passes.fx.solver_loop import SolverLoop
from hasten.passes.fx.unroll import UnrolledSampler
from hasten.passes.solvers.plan import Shaped

if TYPE_CHECKING:
    from hasten.backends.program import FlatProgram

Range = tuple[int, int | None]


def in_a_loop(flat: FlatProgram, looping: Looping) -> FlatProgram:
    """Put ``flat``, a denoiser, into the loop of `SolverLoop`; the examples are zeros, of the denoiser's own sizes.

    A size that is dynamic there is dynamic in the loop, in the same range, and of one name wherever it is met.
    """
    reads, writes = [t.name for t in flat.inputs], [t.name for t in flat.outputs]
    wrapped = (flat.module, looping.plan, reads, writes, looping.kept, looping.controls)
    module = SolverLoop(*wrapped) if looping.bits is None else UnrolledSampler(*wrapped, looping.bits)
    device = flat.example_inputs[0].device
    specs = [TensorSpec(s.name, s.dtype, s.shape) for s in module.inputs]
    dims = looping.bounds(flat.dims)
    sizes = _examples(flat, looping, dims)
    examples = tuple(
        torch.zeros([_sized(size, sizes, s) for size in s.shape], dtype=getattr(torch, s.dtype), device=device)
        for s in specs
    )
    return replace(
        flat,
        module=cast(torch.fx.GraphModule, (_Settled(module) if dims else module).eval()),
        example_inputs=examples,
        inputs=tuple(specs),
        outputs=tuple(TensorSpec(s.name, s.dtype, s.shape) for s in module.outputs),
        dims=dims,
        dynamic_shapes=_dynamic_shapes(specs, dims),
    )


class _Settled(nn.Module):
    """A loop for a range of sizes, in which every size that is made of others is that from the start.

    What a step cache keeps would have sizes of its own, and a branch that gives it back other ones than the branch that
    makes it anew.
    """

    def __init__(self, loop: SolverLoop) -> None:
        super().__init__()
        self.loop = loop

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(zip(self.loop.inputs, tensors, strict=True))
        known: dict[str, Any] = {}
        for spec, tensor in given:  # a cache's state comes last, behind what its sizes are made of
            known = bound([s if _dimension(s) else 0 for s in spec.shape], tensor.shape) | known
        made: tuple[Tensor, ...] = self.loop(*(_settled(spec, tensor, known) for spec, tensor in given))
        return made


def _settled(spec: Shaped, tensor: Tensor, known: Mapping[str, Any]) -> Tensor:
    sizes: list[Any] = [evaluate(size, known) for size in spec.shape]
    if any(found != wanted for found, wanted in zip(tensor.shape, sizes, strict=True)):
        raise HastenError(f"input {spec.name!r} is {tuple(tensor.shape)}, which is not {format_shape(spec.shape)}")
    if all(isinstance(size, int) or _dimension(size) for size in spec.shape):
        return tensor
    return tensor.as_strided(sizes, [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))])


def _dimension(size: Size) -> bool:
    """Whether a size is a symbol or a multiple of one."""
    return multiple(size) is not None or str(size).isidentifier()


def _examples(flat: FlatProgram, looping: Looping, dims: Mapping[str, Range]) -> dict[str, int]:
    """The size of every symbol in the examples."""
    found: dict[str, int] = {}
    for spec, tensor in zip(flat.inputs, flat.example_inputs, strict=True):
        found |= bound(spec.shape, tuple(tensor.shape))
    if looping.doubled is not None:
        found[PICTURES] = found[looping.doubled] // 2
    # an example of 1 would stand for a size that is always 1
    return {name: low if low == high else max(found[name], low, 2) for name, (low, high) in dims.items()}


def _sized(size: Size, sizes: Mapping[str, int], spec: TensorSpec) -> int:
    number = evaluate(size, sizes)
    if number is None:
        raise HastenError(f"input {spec.name!r} has the size {size}, which does not follow from {', '.join(sizes)}")
    return number


def _dynamic_shapes(specs: Sequence[TensorSpec], dims: Mapping[str, Range]) -> tuple[dict[int, Any] | None, ...] | None:
    """As `torch.export.export` takes it.

    Every symbol is a named `Dim`, which torch refuses where the graph does not hold for all of its range; but a size
    that is another function of symbols (``side**2`` tokens of a step cache) has no `Dim`, and torch finds it out only
    if all sizes are left to it.
    """
    known = {name: Dim(name, min=low, max=high) for name, (low, high) in dims.items() if low != high}
    if not known:
        return None
    varying = [
        {axis: size for axis, size in enumerate(s.shape) if known.keys() & re.findall(r"\w+", str(size))} for s in specs
    ]
    found_out = any(_dim(size, known) is None for axes in varying for size in axes.values())
    return tuple(
        {axis: _left(size, dims) if found_out else _dim(size, known) for axis, size in axes.items()} or None
        for axes in varying
    )


def _dim(size: Size, known: Mapping[str, Any]) -> Any:
    factor, symbol = multiple(size) or (1, size)
    dim = known.get(str(symbol))
    return dim if dim is None or factor == 1 else factor * dim


def _left(size: Size, dims: Mapping[str, Range]) -> Any:
    low, high = dims.get(str(size), (None, None))
    return Dim.AUTO(min=low, max=high)
