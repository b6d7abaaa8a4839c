"""One ONNX graph in the neutral vocabulary. Values are tensor names; operators: `passes.onnx.tables`, `writers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import helper

from hasten.errors import HastenError
from hasten.passes.onnx import folding, tables, types, writers
from hasten.passes.onnx.element import name_of
from hasten.passes.pattern import Attr, Dim, OpView

if TYPE_CHECKING:
    from hasten.passes.onnx.graph import OnnxGraph, Scope


class OnnxView:
    """A scope of an `OnnxGraph`. Values of outer graphs can be read, but what makes them is not looked into."""

    def __init__(self, owner: OnnxGraph, scope: Scope) -> None:
        self.owner, self.scope, self.rule = owner, scope, ""
        self.opset = owner.opset
        self._tensors: dict[str, Any] = {}
        for around in reversed(scope.chain()):
            around.flush()
            self._add(around.graph.inputs)
            for node in around.graph.nodes:
                self._add(node.inputs)
                self._add(node.outputs)
            self._add(around.graph.outputs)
        self._own = {t.name for n in scope.graph.nodes for t in n.outputs}
        self._read: dict[str, OpView[str] | None] = {}
        self._made_up: dict[tuple[str, int], str] = {}
        self._folded: dict[str, npt.NDArray[Any] | None] = {}

    def _add(self, tensors: Iterable[Any]) -> None:
        self._tensors.update((t.name, t) for t in tensors if t.name)

    # Reading

    def tensor(self, value: str) -> Any:
        """The graphsurgeon tensor called ``value``."""
        return self._tensors[value]

    def node(self, value: str) -> Any:
        """The node of this scope that makes ``value``; None for inputs, constants, outer values and what is gone."""
        if value not in self._own:
            return None
        made_by = self._tensors[value].inputs
        return made_by[0] if made_by and id(made_by[0]) not in self.owner.dead else None

    def values(self) -> Iterable[str]:
        self.scope.flush()
        skipped = self.owner.dead | self.owner.tentative
        return [t.name for n in self.scope.graph.nodes if id(n) not in skipped for t in n.outputs if t.name]

    def op(self, value: str, /) -> OpView[str] | None:
        if value not in self._read or self.node(value) is None:
            self._read[value] = tables.read(self, value)
        return self._read[value]

    def is_final(self, value: str) -> bool:
        """Whether the node that makes ``value`` was written for the very target that the graph is now rewritten for."""
        node = self.node(value)
        target = self.owner.target
        return (
            bool(target)
            and node is not None
            and any(p.key == "hasten.target" and p.value == target for p in node.template.metadata_props)
        )

    def describe(self, value: str, /) -> str:
        tensor = self._tensors[value]
        if isinstance(tensor, gs.Constant):
            return "an initializer"
        if not tensor.inputs:
            return "an input"
        node = tensor.inputs[0]
        domain = node.domain or ""
        return f"{domain}.{node.op}" if domain not in ("", "ai.onnx") else str(node.op)

    def constant(self, value: str, /) -> npt.NDArray[Any] | None:
        stack = [value]
        while stack:
            missing = [v for v in folding.needs(self, stack[-1]) if v not in self._folded]
            if missing and stack[-1] not in self._folded:
                stack.append(missing[0])
            else:
                last = stack.pop()
                if last not in self._folded:
                    self._folded[last] = folding.evaluate(self, last)
        return self._folded[value]

    def weights(self, value: str, /) -> npt.NDArray[Any] | None:
        return folding.held(self, value)

    def shape(self, value: str, /) -> tuple[Dim, ...] | None:
        tensor = self._tensors[value]
        if tensor.shape is None:
            return None
        return tuple(
            int(d) if isinstance(d, (int, np.integer)) else d or f"{value}:{axis}"
            for axis, d in enumerate(tensor.shape)
        )

    def dtype(self, value: str, /) -> str | None:
        data_type = types.onnx_dtype(self._tensors[value])
        return name_of(data_type) if data_type else None

    def uses(self, value: str, /) -> int:
        return self.owner.uses(self._tensors[value])

    def obstacle(self, first: Iterable[str], root: str, /) -> str | None:
        """Nothing in ONNX changes a tensor in place."""
        return None

    def sharing(self, value: str, source: str, /) -> str | None:
        """Nothing in ONNX can tell whose memory a value is in."""
        return None

    def where(self, value: str, /) -> str:
        """The name of the node that makes ``value`` (else the value's), after the path of the graphs it stands in."""
        node = self.node(value)
        name = node.name if node is not None and node.name else value
        return f"{self.scope.path}/{name}" if self.scope.path else str(name)

    # Writing

    def emit(self, name: str, inputs: list[str | None], attrs: Mapping[str, Attr], *, at: str) -> str:
        if name not in writers.WRITE:
            raise HastenError(f"the ONNX view cannot emit neutral operator {name!r}")
        return writers.WRITE[name](self, inputs, dict(attrs), at)

    def node_at(
        self,
        op: str,
        inputs: list[str | None],
        attrs: Mapping[str, Any],
        *,
        at: str,
        domain: str = "",
        outputs: int = 1,
    ) -> str:
        """A new ONNX node before the one that makes ``at``; returns the name of its first output."""
        operands = [None if i is None else self._tensors[i] for i in inputs]
        place = self.node(at)
        node = self.owner.new_node(
            self.scope, op, operands, outputs, attrs, domain=domain, at=place, rule=self.rule, base=at
        )
        if self.rule == "legalise" and self.owner.target:
            node.template.metadata_props.add(key="hasten.target", value=self.owner.target)
        self._add(node.outputs)
        self._own.update(t.name for t in node.outputs)
        return str(node.outputs[0].name)

    def emit_constant(self, content: npt.NDArray[Any], *, at: str) -> str:
        tensor = self.owner.new_constant(content, f"{at}_constant")
        self._add([tensor])
        return str(tensor.name)

    def made_up(self, value: str, slot: int, content: npt.NDArray[Any]) -> str:
        """A constant that reading ``value`` calls for; always the same one."""
        if (value, slot) not in self._made_up:
            self._made_up[value, slot] = self.emit_constant(content, at=value)
        return self._made_up[value, slot]

    def substitute(self, old: str, new: str) -> None:
        self.owner.substitute(self._tensors[old], self._tensors[new])
        self._read.clear()

    def number(self, number: float, *, like: str, at: str) -> str:
        return self.emit_constant(
            np.asarray(number, helper.tensor_dtype_to_np_dtype(types.onnx_dtype(self._tensors[like]))), at=at
        )

    def discard(self) -> None:
        """Nothing to do: a node that was emitted and never substituted counts as no user and is left out by `clean`."""
