"""FX graphs in the neutral vocabulary: Dynamo's functions and methods, and ATen before and after decomposition.

`torch.silu`, ``x.silu()``, `F.silu` and ``aten.silu`` share a name and an order of arguments, so one table row reads
all of them; `passes.fx.tables` holds the rows. Shapes and types come from the fake tensors that tracing left in
``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch._dynamo.source import ConstantSource

from hasten.passes.fx import constants, tables, write
from hasten.passes.fx.aliasing import written
from hasten.passes.fx.call import Call, mutates
from hasten.passes.pattern import Attr, Dim, OpView

Value = Any
"""An `fx.Node`, or a `Literal` for a number written into the call."""


@dataclass(frozen=True)
class Literal:
    """A number that stands in a node's arguments."""

    number: int | float | bool


def call_name(node: fx.Node) -> str:
    """The name shared by the function, the method and the ATen operator; ``aten`` overloads are not told apart."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        space, _, name = node.target._schema.name.partition("::")
        return name if space == "aten" else f"{space}.{name}"
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "torch.nn.functional" and f"F.{name}" in tables.READ:
        return f"F.{name}"
    return str(name)


def fake(node: Any) -> Any:
    """The fake tensor (or symbolic number) that stands for a node's result."""
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def _dim(size: Any) -> Dim:
    """A size as a number, also where tracing found out later which number a symbol stands for."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return str(size.node.expr) if known is None else int(known)


_VIEWS = ("identity", "reshape", "transpose", "expand", "part")
_AUTOCAST = ("_enter_autocast", "_exit_autocast")


class FxView:
    """One `fx.Graph` of a module. Sub-graph-modules have views of their own (`passes.fx.graph.FxGraph.views`)."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.rule = ""
        self.fresh: set[fx.Node] = set()
        self._constants: dict[fx.Node, npt.NDArray[Any] | None] = {}
        self._ops: dict[fx.Node, OpView[Value] | None] = {}
        self._order: dict[fx.Node, int] = {}
        self._mutations: list[tuple[int, fx.Node]] = []
        self._regions = any(call_name(n) in _AUTOCAST for n in self.graph.nodes)
        self._number()

    def _number(self) -> None:
        """Positions are only needed where something changes a tensor in place, or the types that operators use."""
        mutating = [n for n in self.graph.nodes if mutates(n, call_name(n)) or call_name(n) in _AUTOCAST]
        if mutating:
            self._order = {n: i for i, n in enumerate(self.graph.nodes)}
        self._mutations = [(self._order[n], n) for n in mutating]
        self._written = written(self.graph, call_name) if mutating else set()

    def values(self) -> Iterable[Value]:
        return [n for n in self.graph.nodes if n.op in ("call_function", "call_method")]

    def op(self, value: Value, /) -> OpView[Value] | None:
        if not isinstance(value, fx.Node):
            return None
        if value not in self._ops:
            name = call_name(value)
            row = tables.READ.get(name)
            self._ops[value] = row.read(Call(self, value, name, row.arguments)) if row else None
        return self._ops[value]

    def lift(self, argument: Any) -> Value | None:
        """An argument of a node as a value: nodes stay, numbers become literals, everything else is no operand."""
        if isinstance(argument, fx.Node):
            return argument
        return Literal(argument) if isinstance(argument, (int, float, bool)) else None

    def describe(self, value: Value, /) -> str:
        if isinstance(value, Literal):
            return f"the number {value.number}"
        if value.op in ("placeholder", "get_attr"):
            return "an input" if value.op == "placeholder" else "a parameter"
        return call_name(value)

    def constant(self, value: Value, /) -> npt.NDArray[Any] | None:
        if isinstance(value, Literal):
            return np.asarray(value.number)
        if value not in self._constants:
            self._constants[value] = constants.evaluate(self.module, value, call_name, self._written)
        return self._constants[value]

    def weights(self, value: Value, /) -> npt.NDArray[Any] | None:
        """Of exported graphs only: under a graph of Dynamo's the owner may exchange the module's weights."""
        if not isinstance(value, fx.Node) or value.op != "get_attr" or "val" not in value.meta:
            return None
        if any(n.op == "get_attr" and n.target == value.target for n in self._written):
            return None
        tensor = constants.held(self.module, value)
        if tensor is None:
            return None
        return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)

    def shape(self, value: Value, /) -> tuple[Dim, ...] | None:
        if isinstance(value, Literal):
            return ()
        tensor = fake(value)
        if not isinstance(tensor, torch.Tensor):
            return () if isinstance(tensor, (int, float, torch.SymInt, torch.SymFloat)) else None
        return tuple(_dim(d) for d in tensor.shape)

    def sizes(self, node: Any) -> tuple[Any, ...] | None:
        """Sizes as integers and symbolic integers."""
        tensor = fake(node) if isinstance(node, fx.Node) else None
        if not isinstance(tensor, torch.Tensor):
            return None
        return tuple(known if isinstance(known := _dim(d), int) else d for d in tensor.shape)

    def op_result(self, node: fx.Node) -> Any:
        """The fake result of a node: a tensor, or a tuple of them."""
        return fake(node)

    def dtype(self, value: Value, /) -> str | None:
        tensor = fake(value) if isinstance(value, fx.Node) else None
        return str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, torch.Tensor) else None

    def uses(self, value: Value, /) -> int:
        if isinstance(value, Literal):
            return 0
        return sum(sum(a is value for a in _leaves((u.args, u.kwargs))) for u in value.users)

    def obstacle(self, first: Iterable[Value], root: Value, /) -> str | None:
        if not self._mutations:
            return None
        inner = {v for v in first if isinstance(v, fx.Node)}
        items = {v.args[0] for v in (*inner, root) if call_name(v) == "getitem"}  # they speak for what made the tuple
        start = min(self._order.get(v, 0) for v in (*inner, *items, root))
        for position, node in self._mutations:
            if start < position < self._order.get(root, 0) and node not in inner:
                if call_name(node) in _AUTOCAST:
                    return f"{node.name} ({call_name(node)}) stands between the parts of the pattern"
                return f"{node.name} ({call_name(node)}) changes a tensor in place between the parts of the pattern"
        return None

    def sharing(self, value: Value, source: Value, /) -> str | None:
        behind = dict.fromkeys((value, source))
        stack = [source]
        while stack and self._written:
            node = stack.pop()
            read = node.all_input_nodes if self._may_be_view(node) else []
            stack.extend(n for n in read if n not in behind)
            behind.update(dict.fromkeys(read))
        if (changed := next((n for n in behind if n in self._written), None)) is not None:
            return f"{changed.name} is changed in place"
        seen = any(self._may_be_view(user) for user in value.users)
        if seen and (self._may_be_view(source) or self.uses(source) > 1):
            return f"{value.name} may be returned, and would share its memory with {source.name}"
        return None

    def _may_be_view(self, node: fx.Node) -> bool:
        """Whether a result may be a view of an operand, as inputs, outputs and unknown operators count as well."""
        read = self.op(node)
        return read is None or read.name in _VIEWS

    def where(self, value: Value, /) -> str:
        return value.name if isinstance(value, fx.Node) else str(value.number)

    def emit(self, name: str, inputs: list[Value | None], attrs: Mapping[str, Attr], *, at: Value) -> Value:
        target, args, kwargs = write.WRITE[name](self, inputs, attrs)
        return self.call(target, args, kwargs, at=at)

    def call(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, at: fx.Node
    ) -> fx.Node:
        """A new ``call_function`` node before ``at``, with fake result, stack trace and the rule's name."""
        args = torch.fx.node.map_aggregate(args, lambda a: a.number if isinstance(a, Literal) else a)
        with self.graph.inserting_before(at):
            new = self.graph.call_function(target, args, kwargs)
        key = "val" if "val" in at.meta else "example_value"
        mode = getattr(fake(at), "fake_mode", None)
        if mode is not None:
            values = torch.fx.node.map_aggregate((args, kwargs), lambda a: fake(a) if isinstance(a, fx.Node) else a)
            with mode, torch.no_grad(), self._autocast(at) as casts:
                compute = target if casts else write.RESULT.get(target, target)
                new.meta[key] = compute(*values[0], **values[1])
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in at.meta:
                new.meta[name] = at.meta[name]
        new.meta["hasten_rule"] = self.rule
        self.fresh.add(new)
        return new

    @contextmanager
    def _autocast(self, at: fx.Node) -> Iterator[bool]:
        """The autocast regions around ``at``, entered; whether any is active, the caller's included."""
        regions: dict[fx.Node, Any] = {}
        for node in self.graph.nodes if self._regions else ():
            if node is at:
                break
            if call_name(node) == "_enter_autocast":
                regions[node] = node.args
            elif call_name(node) == "_exit_autocast":
                regions.pop(node.args[0])
        with ExitStack() as stack:
            for device, dtype, enabled, cached in regions.values():
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield torch._C._is_any_autocast_enabled()

    def emit_constant(self, content: npt.NDArray[Any], *, at: Value) -> Value:
        tensor, result = torch.from_numpy(np.ascontiguousarray(content)), fake(at)
        on = tensor.to(result.device) if isinstance(result, torch.Tensor) else tensor
        return self.emit_buffer(on, at=at, like=at)

    def emit_buffer(self, tensor: torch.Tensor, *, at: fx.Node, like: fx.Node) -> fx.Node:
        """A new buffer of the module, read right before ``at``; its fake tensor is of ``like``'s kind."""
        name = f"_hasten_constant_{sum(k.startswith('_hasten_constant_') for k, _ in self.module.named_buffers())}"
        self.module.register_buffer(name, tensor)
        sources = getattr(self.module, "_param_name_to_source", None)
        if sources is not None:  # a graph of Dynamo's: AOTAutograd asks where every tensor in it came from
            sources[name] = ConstantSource(name)
        with self.graph.inserting_before(at):
            node = self.graph.get_attr(name)
        mode = getattr(fake(like), "fake_mode", None)
        node.meta["val" if "val" in like.meta else "example_value"] = mode.from_tensor(tensor) if mode else tensor
        return node

    def number(self, number: float, *, like: Value, at: Value) -> Value:
        return Literal(number)

    def substitute(self, old: Value, new: Value) -> None:
        old.replace_all_uses_with(new)
        self._drop(old)
        self.fresh.clear()
        for user in new.users:  # and the items of the tuples that these make
            for node in (user, *user.users):
                self._ops.pop(node, None)
        if self._mutations:
            self._number()

    def discard(self) -> None:
        for node in reversed(self.graph.nodes):
            if node in self.fresh:
                self.graph.erase_node(node)
        self.fresh.clear()

    def _drop(self, node: fx.Node) -> None:
        """Erase a replaced node and what only it read: dead-code elimination keeps SDPA, which may draw numbers."""
        if node.users or node._erased or self.op(node) is None or not self._writes_nothing_else(node):
            return
        read = node.all_input_nodes
        self.graph.erase_node(node)
        for inner in read:
            self._drop(inner)

    def _writes_nothing_else(self, node: fx.Node) -> bool:
        """Whether nothing can tell that ``node`` is gone: it writes nothing, or to a new tensor that only it reads."""
        if not mutates(node, call_name(node)):
            return True
        (source, *others) = node.all_input_nodes
        made = self.op(source)
        return not others and len(source.users) == 1 and made is not None and made.name in ("group_norm", "add")


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _leaves(item)
    elif isinstance(tree, slice):
        yield from _leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree
