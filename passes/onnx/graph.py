"""An ONNX model under rewriting: onnx-graphsurgeon's nodes and tensors, and all of the file that those do not keep.

onnx-graphsurgeon drops node metadata, doc strings, rare attribute kinds, function overloads and model metadata. Every
node therefore keeps the `onnx.NodeProto` it was read from as its template, and `OnnxGraph.to_model` writes templates
with the node's present operands. Rewriting never edits a node's attributes: it makes new nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from hasten.errors import VerificationError
from hasten.passes.onnx import detached, export, functions, inference, types
from hasten.passes.onnx.tensors import tensors_of
from hasten.passes.onnx.traced import fresh
from hasten.passes.onnx.view import OnnxView

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL


@dataclass(eq=False)
class Scope:
    """One graph: the main one, a branch or body, or a local function's body."""

    graph: Any
    template: onnx.GraphProto | onnx.FunctionProto
    path: str = ""
    parent: Scope | None = None
    output_names: list[str] = field(default_factory=list)
    pending: dict[int, list[Any]] = field(default_factory=dict)
    initializers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.template, onnx.GraphProto):
            self.initializers = frozenset(i.name for i in self.template.initializer)

    @property
    def is_function(self) -> bool:
        return isinstance(self.template, onnx.FunctionProto)

    def chain(self) -> list[Scope]:
        """The scope itself and the ones around it, innermost first."""
        return [self] if self.parent is None else [self, *self.parent.chain()]

    @property
    def in_control_flow(self) -> bool:
        """Whether the graph stands inside If, Loop or Scan."""
        return self.parent is not None

    def flush(self) -> None:
        """Put new nodes into their place in the list of nodes."""
        if not self.pending:
            return
        ordered: list[Any] = []
        stack = list(reversed(self.graph.nodes))
        while stack:
            node = stack.pop()
            if before := self.pending.pop(id(node), None):
                stack.append(node)
                stack.extend(reversed(before))
            else:
                ordered.append(node)
        self.graph.nodes[:] = ordered


class OnnxGraph:
    """The whole model. ``views`` gives the rules something to match on; ``to_model`` writes it back."""

    ir = "onnx"

    def __init__(self, model: onnx.ModelProto, weights: Path | None = None) -> None:
        """``weights``: the folder of the files that the model's external tensors are in."""
        self.shell = onnx.ModelProto()
        for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
            if model.HasField(name):
                setattr(self.shell, name, getattr(model, name))
        self.shell.opset_import.extend(model.opset_import)
        self.shell.metadata_props.extend(model.metadata_props)
        self.shell.training_info.extend(model.training_info)
        kept = [f for f in model.functions if not functions.is_ours(f)]
        imported = gs.import_onnx(_with_functions(model, kept))
        self.overridable = _overridable(model)
        self.scopes: list[Scope] = []
        self.tentative: set[int] = set()
        self.dead: set[int] = set()
        self.notes: list[str] = []
        self.target = ""
        self.renames: list[tuple[Any, str]] = []
        self.made: set[int] = set()
        self._enter(imported, model.graph, "", None)
        for function, template in zip(imported.functions, kept, strict=True):
            self._enter(function, template, f"{template.domain}.{template.name}", None)
        for scope in self.scopes:
            _sort(scope)
            if weights is not None:
                detached.attach_readers(scope.graph, weights)
        self.names = {t.name for s in self.scopes for t in tensors_of(s.graph)}
        self.node_names = {n.name for s in self.scopes for n in s.graph.nodes}
        self.infer()

    @property
    def main(self) -> Scope:
        return self.scopes[0]

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((o.version for o in self.shell.opset_import if o.domain in ("", "ai.onnx")), 1)

    def set_opset(self, version: int) -> None:
        """Declare another version of the standard operators; the caller has made every node legal there."""
        for entry in self.shell.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = version

    def _enter(self, graph: Any, template: Any, path: str, parent: Scope | None) -> None:
        scope = Scope(graph, template, path, parent)
        self.scopes.append(scope)
        for node, proto in zip(graph.nodes, template.node, strict=True):
            node.template = proto
        scope.output_names = [o if isinstance(o, str) else o.name for o in template.output]
        if parent is not None:
            _link_outer_outputs(scope)
        for node in graph.nodes:
            for attribute in node.template.attribute:
                inner = node.attrs.get(attribute.name)
                if isinstance(inner, gs.Graph):
                    where = f"{path}/" if path else ""
                    self._enter(inner, attribute.g, f"{where}{node.name or node.op}.{attribute.name}", scope)

    # The Graph protocol

    def views(self) -> Iterable[OnnxView]:
        """The main graph, branches and bodies, then local functions."""
        # One at a time: what is done in one graph is seen by the views of the graphs inside it.
        for scope in list(self.scopes):
            if scope in self.scopes:
                yield OnnxView(self, scope)

    def clean(self) -> None:
        """Remove what nothing reads, give graph outputs their names back, restore topological order, infer types."""
        for scope in self.scopes:
            scope.flush()
        self._remove_dead()
        self._inherit_names()
        for scope in self.scopes:
            self._restore_output_names(scope)
        for scope in self.scopes:
            _sort(scope)
        self.infer()

    def finish(self) -> None:
        """Nothing to do: `to_model` writes the graph whenever it is asked."""

    def check(self) -> None:
        from hasten.passes.onnx.verify import verify

        verify(self)

    def op_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for scope in self.scopes:
            for node in scope.graph.nodes:
                name = operator_name(node)
                counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items()))

    def text(self) -> str:
        """ONNX's text format, large constants shown as inputs."""
        return str(onnx.printer.to_text(self.to_model(strip=True, infos=False))) + "\n"

    # Back to a file

    def to_model(self, *, strip: bool = False, infos: bool = True) -> onnx.ModelProto:
        """The model as a proto. ``strip``: large constants become inputs; ``infos``: with inferred value infos."""
        return export.write(self, strip=strip, infos=infos)

    # Editing

    def fresh(self, base: str) -> str:
        """A value name that nothing in the model has."""
        return fresh(base, self.names)

    def new_node(
        self,
        scope: Scope,
        op: str,
        inputs: list[Any],
        outputs: int | list[Any],
        attrs: Mapping[str, Any],
        *,
        domain: str = "",
        at: Any = None,
        rule: str = "",
        base: str = "",
    ) -> Any:
        """A node right before node ``at`` (last without one); it counts as no user until `substitute` reaches it."""
        template = onnx.helper.make_node(op, [], [], domain=domain or None, **dict(attrs))
        if rule:
            template.metadata_props.add(key="hasten.rule", value=rule)
        base = base or (at.name if at is not None and at.name else "hasten")
        name = fresh(f"{base}/{op}", self.node_names)
        if isinstance(outputs, int):
            outputs = [gs.Variable(self.fresh(f"{name}_out")) for _ in range(outputs)]
            self.made.update(id(t) for t in outputs)
        operands = [gs.Variable.empty() if t is None else t for t in inputs]
        while operands and operands[-1].name == "":
            operands.pop()
        node = gs.Node(op, name, dict(attrs), operands, outputs, domain=domain or None)
        node.template = template
        self.tentative.add(id(node))
        if at is None:
            scope.graph.nodes.append(node)
        else:
            scope.pending.setdefault(id(at), []).append(node)
        if domain and domain not in {o.domain for o in self.shell.opset_import}:
            self.shell.opset_import.append(onnx.helper.make_opsetid(domain, 1))
        inference.infer_node(node, self.shell.opset_import)
        return node

    def new_constant(self, content: npt.NDArray[Any], base: str) -> Any:
        """A constant tensor; it is written where something reads it."""
        return gs.Constant(self.fresh(base), np.ascontiguousarray(content).reshape(content.shape))

    def uses(self, tensor: Any) -> int:
        """Operand slots of live nodes, and graph outputs, that read ``tensor``."""
        slots = sum(id(node) not in self.tentative for node in tensor.outputs)
        return slots + sum(output is tensor for scope in self.scopes for output in scope.graph.outputs)

    def substitute(self, old: Any, new: Any) -> None:
        """Every live user of ``old`` reads ``new``; nodes that only ``old`` needed are taken out."""
        self._commit(new)
        for node in {id(n): n for n in tensor_users(old)}.values():
            for slot, operand in enumerate(node.inputs):
                if operand is old:
                    node.inputs[slot] = new
        for scope in self.scopes:
            scope.graph.outputs = [new if o is old else o for o in scope.graph.outputs]
        if types.known(old) and not types.known(new) and isinstance(new, gs.Variable):
            new.dtype, new.shape = old.dtype, old.shape
        if id(new) in self.made:
            self.renames.append((new, old.name))
        self._prune(old)

    def _commit(self, tensor: Any) -> None:
        stack = list(tensor.inputs)
        while stack:
            node = stack.pop()
            if id(node) in self.tentative:
                self.tentative.discard(id(node))
                stack.extend(n for t in node.inputs for n in t.inputs)

    def _prune(self, tensor: Any) -> None:
        """Detach the producers that nothing needs any more, so that they count as no users."""
        stack = list(tensor.inputs)
        while stack:
            node = stack.pop()
            if node.inputs and not any(self.uses(t) for t in node.outputs):
                operands = list(node.inputs)
                node.inputs.clear()
                self.dead.add(id(node))
                for inner in self._inner_scopes(node):
                    operands.extend(self._abandon(inner))
                stack.extend(n for t in operands for n in t.inputs)

    def _inner_scopes(self, node: Any) -> list[Scope]:
        graphs = [v for v in node.attrs.values() if isinstance(v, gs.Graph)]
        return [s for s in self.scopes if any(s.graph is g for g in graphs)]

    def _abandon(self, scope: Scope) -> list[Any]:
        """Detach every node of a graph whose owner is gone; returns what they read."""
        read = list(scope.graph.outputs)
        scope.graph.outputs = []
        for node in scope.graph.nodes:
            read.extend(node.inputs)
            node.inputs.clear()
            for inner in self._inner_scopes(node):
                read.extend(self._abandon(inner))
        scope.graph.nodes.clear()
        self.scopes.remove(scope)
        return read

    def _remove_dead(self) -> None:
        changed = True
        while changed:
            changed = False
            for scope in list(self.scopes):
                if scope not in self.scopes:
                    continue
                kept = []
                for node in reversed(scope.graph.nodes):
                    live = id(node) not in self.tentative and any(self.uses(t) for t in node.outputs)
                    if live:
                        kept.append(node)
                        continue
                    changed = True
                    node.inputs.clear()
                    for inner in self._inner_scopes(node):
                        self._abandon(inner)
                    node.outputs.clear()
                scope.graph.nodes[:] = kept[::-1]
        self.tentative.clear()
        self.dead.clear()

    def _inherit_names(self) -> None:
        """A value that stands for one that is gone takes over its name."""
        present = {id(t): t for s in self.scopes for t in tensors_of(s.graph)}
        taken = {t.name for t in present.values()}
        for tensor, wanted in reversed(self.renames):
            if id(tensor) in present and id(tensor) in self.made and wanted not in taken:
                taken.discard(tensor.name)
                taken.add(wanted)
                tensor.name = wanted
                self.made.discard(id(tensor))
        self.renames.clear()
        self.made.clear()
        self.names |= taken

    def _restore_output_names(self, scope: Scope) -> None:
        """A graph output keeps its name whoever makes it now."""
        produced = {id(t) for n in scope.graph.nodes for t in n.outputs}
        taken: set[int] = {id(t) for t, w in zip(scope.graph.outputs, scope.output_names, strict=True) if t.name == w}
        for position, (tensor, wanted) in enumerate(zip(scope.graph.outputs, scope.output_names, strict=True)):
            if tensor.name == wanted:
                continue
            holder = next((t for t in tensors_of(scope.graph) if t.name == wanted), None)
            if holder is not None:
                holder.name = self.fresh(f"{wanted}_inner")
            if id(tensor) in produced and id(tensor) not in taken:
                taken.add(id(tensor))
                self.names.discard(tensor.name)
                tensor.name = wanted
            else:
                output = gs.Variable(wanted, getattr(tensor, "dtype", None), getattr(tensor, "shape", None))
                node = self.new_node(scope, "Identity", [tensor], [output], {}, base=wanted)
                self.tentative.discard(id(node))
                scope.graph.outputs[position] = output
            self.names.add(wanted)

    def infer(self) -> None:
        """Find element types and shapes, as far as ONNX's inference gets; large constants are left out of it."""
        inference.infer_graph(self)


def operator_name(node: Any) -> str:
    """``Conv``, ``hasten.GroupNormAct``, ``com.microsoft.Gelu``."""
    domain = node.domain or ""
    return f"{domain}.{node.op}" if domain not in ("", "ai.onnx") else str(node.op)


def tensor_users(tensor: Any) -> list[Any]:
    """Nodes that read ``tensor``, once per operand slot."""
    return list(tensor.outputs)


def _with_functions(model: onnx.ModelProto, kept: list[onnx.FunctionProto]) -> onnx.ModelProto:
    """``model`` itself where every function stays, else a copy without the others."""
    if len(kept) == len(model.functions):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.functions[:]
    copy.functions.extend(kept)
    return copy


def _overridable(model: onnx.ModelProto) -> frozenset[str]:
    """Initializers that a caller may override: since IR version 4 those that are graph inputs as well."""
    if model.ir_version < 4:
        return frozenset()
    return frozenset({i.name for i in model.graph.input} & {i.name for i in model.graph.initializer})


def _link_outer_outputs(scope: Scope) -> None:
    """A branch may give an outer value as its output; graphsurgeon makes a tensor of its own for it."""
    inside = {id(t) for t in scope.graph.inputs} | {id(t) for n in scope.graph.nodes for t in n.outputs}
    for position, tensor in enumerate(scope.graph.outputs):
        if id(tensor) in inside or isinstance(tensor, gs.Constant):
            continue
        parent = scope.parent
        while parent is not None:
            outer = next((t for t in tensors_of(parent.graph) if t.name == tensor.name), None)
            if outer is not None:
                scope.graph.outputs[position] = outer
                break
            parent = parent.parent


def _sort(scope: Scope) -> None:
    """Producers before users, otherwise the order there was."""
    homes = {id(t): node for node in scope.graph.nodes for t in node.outputs}
    done: set[int] = set()
    active: set[int] = set()
    ordered: list[Any] = []
    for start in scope.graph.nodes:
        stack = [(start, False)]
        while stack:
            node, left = stack.pop()
            if id(node) in done:
                continue
            if left:
                done.add(id(node))
                ordered.append(node)
                continue
            if id(node) in active:
                raise VerificationError(f"{node.name or node.op}: reads, over other nodes, its own result")
            active.add(id(node))
            stack.append((node, True))
            before = [homes[id(t)] for t in _all_reads(node) if id(t) in homes]
            stack.extend((n, False) for n in reversed(before) if id(n) not in done)
    scope.graph.nodes[:] = ordered


def _all_reads(node: Any) -> Iterator[Any]:
    """Operands of a node and of the nodes in its graphs."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from value.outputs
            for inner in value.nodes:
                yield from _all_reads(inner)
