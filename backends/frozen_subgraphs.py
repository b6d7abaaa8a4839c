"""Freezing inside loops and branches, where Inductor's own stops at the graph that holds them.

Inductor folds constants and lays the weights of linear layers and convolutions out for oneDNN
(`torch._inductor.freezing`) in the outermost graph alone: in the body of a ``while_loop`` and in the branches of a
``cond`` weights are operands, which its passes do not take for constants, and every call multiplies them as they are.
Here operands that are constants outside become constants of these graphs, the same passes run in each of them, and
what is kept of their constants is kept with those of the outermost graph.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib import import_module
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import GraphModule, Node

Passes = Callable[[GraphModule, Sequence[Any]], None]
Packed = dict[tuple[Any, ...], torch.Tensor]
PATCHED = (
    "freezing:freezing_passes",
    "pattern_matcher:LoweringPatternEntry.apply",
    "graph:SubgraphLowering.__init__",
    "graph:GraphLowering.allocate_non_dup_const_name",
)
logger = logging.getLogger(__name__)


@contextmanager
def frozen_subgraphs() -> Iterator[None]:
    """Freeze loops' bodies and branches in what Inductor compiles meanwhile with ``freezing``."""
    from torch._inductor import freezing, graph, pattern_matcher

    if missing := _missing():
        logger.warning(
            "torch %s has no %s: weights inside loops and branches stay as they are, which is right and slower",
            torch.__version__,
            ", ".join(missing),
        )
        yield
        return
    passes, lower = freezing.freezing_passes, pattern_matcher.LoweringPatternEntry.apply
    begin, name_constant = graph.SubgraphLowering.__init__, graph.GraphLowering.allocate_non_dup_const_name

    def everywhere(module: GraphModule, inputs: Sequence[Any]) -> None:
        passes(module, inputs)
        _freeze_within(module, passes, {})

    def lower_sizes_too(entry: Any, match: Any, within: Any, node: Node) -> None:
        lower(replace(entry, handler=_of_sizes_too(entry.handler, node.meta["val"])), match, within, node)

    def begin_with_constants(self: Any, parent: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, parent, *args, **kwargs)
        for name in ("constants", "constant_reprs", "allocated_constant_name"):
            setattr(self, name, getattr(parent, name))

    def name_once(self: Any, name: str | None, data: torch.Tensor) -> str:
        known = next((k for k, held in self.constants.items() if held is data), None)
        return known or str(name_constant(self, name, data))

    with (
        patch.object(freezing, "freezing_passes", everywhere),
        patch.object(pattern_matcher.LoweringPatternEntry, "apply", lower_sizes_too),
        patch.object(graph.SubgraphLowering, "__init__", begin_with_constants),
        patch.object(graph.GraphLowering, "allocate_non_dup_const_name", name_once),
    ):
        yield


def _missing() -> list[str]:
    """What of Inductor's own, written for 2.13, this torch does not have."""
    return [name for name in PATCHED if not _has(name)]


def _has(name: str) -> bool:
    module, _, attribute = name.partition(":")
    try:
        attrgetter(attribute)(import_module(f"torch._inductor.{module}"))
    except (ImportError, AttributeError):
        return False
    return True


def _of_sizes_too(lowering: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """Let a layer with its activation fused, which only Inductor can call, answer in fake tensors.

    After a change in a loop's body its result is made again, and that calls every node of the body.
    """

    @wraps(lowering)
    def called(match: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.Tensor) for a in (*args, *kwargs.values())):
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return lowering(match, *args, **kwargs)

    return called


def _freeze_within(module: GraphModule, passes: Passes, packed: Packed) -> None:
    """Freeze the subgraphs that ``module`` calls with constants; ``packed`` has the weights laid out so far."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.higher_order.while_loop:
            called = node.args[:2]
        elif node.target is torch.ops.higher_order.cond:
            called = node.args[1:3]
        else:
            continue
        *_, operands = node.args
        constants = {place: t for place, n in enumerate(operands) if (t := _constant(module, n)) is not None}
        if not constants:
            continue
        for part in called:
            given = {place - len(operands): tensor for place, tensor in constants.items()}
            _freeze(getattr(module, part.target), given, passes, packed)
        left = tuple(n for place, n in enumerate(operands) if place not in constants)
        node.args = (*node.args[:-1], left)
    module.recompile()


def _freeze(graph: GraphModule, constants: dict[int, torch.Tensor], passes: Passes, packed: Packed) -> None:
    """Put ``constants`` in the place of these inputs, and do what `torch._inductor.freezing` does."""
    from torch._inductor.compile_fx import fake_tensor_prop
    from torch._inductor.constant_folding import constant_fold, replace_node_with_constant
    from torch._inductor.freezing import convert_conv_weights_to_channels_last
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inputs = graph.graph.find_nodes(op="placeholder")
    for place, tensor in constants.items():
        replace_node_with_constant(graph, inputs[place], tensor)
    graph.recompile()
    given = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    if GraphLowering.decide_layout_opt(graph, is_inference=True):
        fake_tensor_prop(graph, given, True)
        convert_conv_weights_to_channels_last(graph)
    passes(graph, given)
    _freeze_within(graph, passes, packed)
    constant_fold(graph)
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = _constant(graph, node)
        if tensor is not None and tensor.is_mkldnn:
            # two calls of one network, each in a branch of its own, share what is laid out
            setattr(graph, node.target, packed.setdefault(_content(tensor), tensor))
            with V.fake_mode:
                node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells one weight in a layout of oneDNN's from another."""
    size = torch.ops.mkldnn._nbytes(tensor)
    held = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(tensor))
    return tuple(tensor.shape), tensor.dtype, hashlib.blake2b(held).digest()


def _constant(module: GraphModule, node: Any) -> torch.Tensor | None:
    found = attrgetter(str(node.target))(module) if isinstance(node, Node) and node.op == "get_attr" else None
    return found if isinstance(found, torch.Tensor) else None
