"""Compare one rewritten site with what it replaces, in ONNX Runtime on random inputs, before anything reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from hasten.passes.onnx import export, functions, types
from hasten.passes.onnx.element import name_of, numpy_type
from hasten.passes.onnx.view import OnnxView
from hasten.passes.pattern import Match

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference allowed, relative to the largest magnitude of the result, by the lowest precision on the way."""
LARGEST = 1 << 24
"""Elements of the largest tensor that a check may make."""
WEIGHT = 1 << 14
"""Elements from which a constant is drawn at random like an input: sites that differ in weights only are equal."""
SIZES = (2, 3, 5, 4, 7, 6)
"""What symbolic sizes are tried as; the same name is the same size."""


class SiteCheck:
    """A `hasten.passes.rule.Verifier` for ONNX graphs. Equal sites are checked once.

    ``unchecked`` counts those that are too large, or that cannot be run here as they were.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.unchecked = 0
        self._seen: dict[bytes, str | None] = {}

    def __call__(self, view: OnnxView, old: str, new: str, found: Match[Any]) -> str | None:
        slice_ = _Slice(view, old, new)
        if any(_elements(t) > LARGEST for t in slice_.tensors):
            self.unchecked += 1
            return None
        model, inputs = slice_.model()
        key = model.SerializeToString(deterministic=True)
        if key not in self._seen:
            self._seen[key] = self._compare(model, inputs)
        return self._seen[key]

    def _compare(self, model: onnx.ModelProto, inputs: list[Any]) -> str | None:
        numbers = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
        kinds = [name_of(n) for n in numbers if n]
        allowed = max((TOLERANCE[k] for k in kinds if k in TOLERANCE), default=0.0)
        for sizes in _assignments(inputs):
            feeds = _draw(model.graph.input, inputs, sizes, np.random.default_rng(self.seed))
            want = _run(model, 0, feeds)
            if want is None:
                continue
            got = _run(model, 1, feeds)
            return "the new nodes cannot be run" if got is None else _difference(want, got, allowed)
        self.unchecked += 1
        return None


def verify_site(view: OnnxView, old: str, new: str, found: Match[Any]) -> str | None:
    """Why ``new`` is not ``old``, computed from the same values; None where they agree or cannot be run here."""
    return SiteCheck()(view, old, new, found)


class _Slice:
    """The nodes that make both values from what the new ones read."""

    def __init__(self, view: OnnxView, old: str, new: str) -> None:
        self.view, self.owner = view, view.owner
        self.roots = [view.tensor(old), view.tensor(new)]
        fresh = list(self._upstream([self.roots[1]], lambda n: id(n) in self.owner.tentative))
        inner = {id(n) for n in fresh}
        self.leaves = {id(t) for n in fresh for t in n.inputs if not any(id(p) in inner for p in t.inputs)}
        self.kept = self.roots[1] if not fresh else None
        """The new value, where it was there before: what it holds is anything."""
        self.as_they_are = any(_is_weight(t) and not self.owner.uses(t) for n in fresh for t in n.inputs)
        """Whether the rule computed weights: these and what they come from cannot be drawn at random."""
        self.nodes = list(self._upstream(self.roots, self._inside))
        made = {id(t) for n in self.nodes for t in n.outputs}
        read = {id(t): t for n in self.nodes for t in n.inputs if t.name and id(t) not in made}
        read.update((id(t), t) for t in self.roots if id(t) not in made)
        self.outer = list(read.values())
        self.tensors = [*self.outer, *(t for n in self.nodes for t in n.outputs if t.name)]

    def _inside(self, node: Any) -> bool:
        if any(isinstance(v, gs.Graph) for v in node.attrs.values()):
            return False
        if any(t is self.kept for t in node.outputs):
            return False
        produces_leaf = any(id(t) in self.leaves for t in node.outputs)
        roots = any(t is r for t in node.outputs for r in self.roots)
        return roots or not produces_leaf or any(_vague(t) for t in node.outputs if id(t) in self.leaves)

    def _upstream(self, roots: Iterable[Any], inside: Any) -> Iterator[Any]:
        """Nodes behind ``roots`` that are ``inside``, producers first."""
        done: set[int] = set()
        stack = [(n, False) for t in roots for n in t.inputs]
        while stack:
            node, left = stack.pop()
            if left:
                yield node
            elif id(node) not in done and inside(node):
                done.add(id(node))
                stack.append((node, True))
                stack.extend((n, False) for t in node.inputs for n in t.inputs)

    def model(self) -> tuple[onnx.ModelProto, list[Any]]:
        """A model with both values as outputs, names numbered so that equal sites give equal bytes; and its inputs."""
        names: dict[int, str] = {}

        def number(tensor: Any) -> str:
            return names.setdefault(id(tensor), f"v{len(names)}") if tensor.name else ""

        model = onnx.ModelProto()
        model.CopyFrom(self.owner.shell)
        for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
            model.ClearField(field)
        del model.metadata_props[:]
        model.graph.name = "site"
        bodies = functions.Attached(self.view.opset)
        for node in self.nodes:
            proto = model.graph.node.add()
            proto.CopyFrom(node.template)
            del proto.input[:], proto.output[:], proto.metadata_props[:]
            proto.name = proto.doc_string = ""
            proto.input.extend(number(t) for t in node.inputs)
            proto.output.extend(number(t) for t in node.outputs)
            if functions.is_fused(proto):
                proto.overload = bodies.overload(proto, export.signature(node))
        inputs = []
        for tensor in self.outer:
            content = None if _is_weight(tensor) and not self.as_they_are else _content(tensor)
            if content is None:
                inputs.append(tensor)
                model.graph.input.append(_info(tensor, number(tensor)))
            else:
                model.graph.initializer.append(onnx.numpy_helper.from_array(content, number(tensor)))
        for position, tensor in enumerate(self.roots):
            proto = model.graph.node.add(op_type="Identity", input=[number(tensor)], output=[f"out{position}"])
            model.graph.output.append(_info(tensor, proto.output[0]))
        for scope in self.owner.scopes:
            if scope.is_function:
                model.functions.append(scope.template)
        bodies.attach(model)
        return model, inputs


def _vague(tensor: Any) -> bool:
    """Whether a leaf's sizes depend on others in a way that drawing them at random would miss, or it holds indices."""
    shape = tensor.shape
    if shape is None or types.dtype_name(tensor) in (None, "int64", "int32"):
        return True
    return any(d is None or (isinstance(d, str) and types.GENERATED.fullmatch(d)) for d in shape)


def _content(tensor: Any) -> npt.NDArray[Any] | None:
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


def _is_weight(tensor: Any) -> bool:
    """Whether a constant is large enough to be drawn at random."""
    if not isinstance(tensor, gs.Constant):
        return False
    return math.prod(tensor.shape) >= WEIGHT and types.dtype_name(tensor) in TOLERANCE


def _info(tensor: Any, name: str) -> onnx.ValueInfoProto:
    shape = None if tensor.shape is None else list(tensor.shape)
    if not types.onnx_dtype(tensor):
        return onnx.ValueInfoProto(name=name)
    return helper.make_tensor_value_info(name, types.onnx_dtype(tensor), shape)


def _elements(tensor: Any) -> int:
    largest = max(SIZES)
    return math.prod(int(d) if isinstance(d, (int, np.integer)) else largest for d in tensor.shape or ())


def _assignments(inputs: list[Any]) -> Iterator[dict[str, int]]:
    """Sizes for the symbolic ones: all different, then all equal."""
    names = list(dict.fromkeys(str(d) for t in inputs for d in t.shape or () if not isinstance(d, (int, np.integer))))
    yield {n: SIZES[i % len(SIZES)] for i, n in enumerate(names)}
    if names:
        for size in (4, 1):
            yield dict.fromkeys(names, size)


def _draw(
    infos: Iterable[onnx.ValueInfoProto], tensors: list[Any], sizes: dict[str, int], random: np.random.Generator
) -> dict[str, npt.NDArray[Any]]:
    feeds = {}
    for info, tensor in zip(infos, tensors, strict=True):
        shape = [int(d) if isinstance(d, (int, np.integer)) else sizes[str(d)] for d in tensor.shape or ()]
        dtype = numpy_type(types.dtype_name(tensor) or "float32")
        if dtype == np.bool_:
            feeds[info.name] = random.random(shape) > 0.3
        elif dtype.kind in "iu":
            feeds[info.name] = random.integers(0, 3, shape).astype(dtype)
        else:
            feeds[info.name] = np.asarray(random.standard_normal(shape)).astype(dtype)
    return feeds


def _run(model: onnx.ModelProto, output: int, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    """One of the two values by ONNX Runtime, or by ONNX's reference where that has no kernel; None if neither can."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    del alone.graph.output[1 - output]
    _drop_unread(alone.graph)
    read = {i.name for i in alone.graph.input}
    fed = {k: v for k, v in feeds.items() if k in read}
    try:
        session = ort.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, fed)[0])
    except Exception as error:
        return _reference(alone, fed) if type(error).__name__ == "NotImplemented" or _unfed(feeds) else None


def _unfed(feeds: dict[str, npt.NDArray[Any]]) -> bool:
    """Whether there is a type among the inputs that ONNX Runtime's Python interface does not take."""
    return any(v.dtype.name not in np.sctypeDict for v in feeds.values())


def _reference(model: onnx.ModelProto, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    import onnx.inliner
    from onnx.reference import ReferenceEvaluator

    try:
        flat = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
        return np.asarray(ReferenceEvaluator(flat).run(None, feeds)[0])
    except Exception:
        return None


def _drop_unread(graph: onnx.GraphProto) -> None:
    wanted, kept = {o.name for o in graph.output}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(kept)]
    inputs = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in graph.input if i.name in wanted]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)


def _difference(want: npt.NDArray[Any], got: npt.NDArray[Any], allowed: float) -> str | None:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"the result is {got.shape} {got.dtype}, it was {want.shape} {want.dtype}"
    a, b = want.astype(np.float64), got.astype(np.float64)
    known = ~np.isnan(a)
    same = known & (a == b)
    with np.errstate(invalid="ignore"):
        error = float(np.abs(a - b)[known & ~same].max(initial=0.0))
    largest = float(np.abs(a[known & np.isfinite(a)]).max(initial=0.0))
    if math.isnan(error) or error > allowed * max(largest, 1e-6):
        return f"the result differs by {error:.3g} where values reach {largest:.3g}"
    return None
