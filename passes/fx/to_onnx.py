"""A rewritten FX graph -> ONNX: fused operators become nodes of domain ``hasten``, torch's exporter maps the rest.

Nothing is matched again on the ONNX side; what is left there is to legalise for the target.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from hasten.errors import HastenError
from hasten.passes import ops as _ops  # noqa: F401  (registers torch.ops.hasten)
from hasten.passes.fx.marked_branches import in_line
from hasten.passes.onnx.detached import WeightsFile
from hasten.passes.onnx.marked_branches import gather

if TYPE_CHECKING:
    import onnx


def _node(
    op: str, inputs: Sequence[Tensor | None], attrs: dict[str, Any], like: Tensor, shape: Sequence[Any]
) -> Tensor:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return torch.onnx.ops.symbolic(f"hasten::{op}", inputs, attrs, dtype=like.dtype, shape=shape, version=1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    attrs = {"scale": scale, "causal": int(causal)}
    return _node("Attention", (q, k, v, mask), attrs, q, (*q.shape[:-1], v.shape[-1]))


def _group_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: str,
) -> Tensor:
    attrs = {"groups": groups, "eps": eps, "act": act}
    return _node("GroupNormAct", (x, weight, bias, scale, shift), attrs, x, x.shape)


def _geglu(x: Tensor, approximate: str, gate_first: bool) -> Tensor:
    attrs = {"approximate": approximate, "gate_first": int(gate_first)}
    return _node("Geglu", (x,), attrs, x, (*x.shape[:-1], x.shape[-1] // 2))


def _upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    return _node("UpsampleConv2d", (x, weight, bias), {}, x, shape)


def _einsum(equation: str, operands: Sequence[Tensor], path: Sequence[int] | None = None) -> Tensor:
    """Axes of one operand in another order, as models spell their unpatching: ONNX's Einsum takes no bfloat16."""
    before, _, after = equation.replace(" ", "").partition("->")
    if len(operands) == 1 and before.isalpha() and len(set(before)) == len(before) and sorted(before) == sorted(after):
        return operands[0].permute([before.index(axis) for axis in after])
    return torch.ops.aten.einsum.default(equation, operands, path=path)


def _square(x: Tensor) -> Tensor:
    """A product of whole numbers: as the power that the exporter makes, runtimes may compute it in floating point."""
    return torch.ops.aten.square.default(x) if x.is_floating_point() else x * x


_TABLE: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.einsum.default: _einsum,
    torch.ops.aten.square.default: _square,
    torch.ops.hasten.attention.default: _attention,
    torch.ops.hasten.group_norm_act.default: _group_norm_act,
    torch.ops.hasten.geglu.default: _geglu,
    torch.ops.hasten.upsample_conv2d.default: _upsample_conv2d,
}


def onnx_from_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    opset: int | None,
    dynamic_shapes: Any = None,
    weights: WeightsFile | None = None,
) -> onnx.ModelProto:
    """Export ``module``, whose graph may hold ``torch.ops.hasten`` nodes, at ``opset`` (None: torch's default).

    ``example_inputs`` and ``dynamic_shapes`` are `torch.export.export`'s, positional. Large weights go straight to the
    file ``weights`` where one is given, and the model says where they are (`passes.onnx.detached`). Raises
    `HastenError` with the exporter's reason where an operator has no ONNX form.
    """
    symbolic = _symbolic(in_line(module))
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                symbolic.eval(),
                tuple(example_inputs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
                optimize=False,
            )
            assert program is not None
            held = list(program.model.graph.initializers.values())
            program.optimize()
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise HastenError(f"the graph cannot be written as ONNX at opset {opset}: {reason}") from error
    if weights is not None:
        weights.detach(program.model)
    model = gather(program.model_proto)
    for value in held:  # the optimiser's rules keep the node that they looked at last, and with it the whole graph
        value.const_value = None
    return model


def _symbolic(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which our operators are the exporter's symbolic ones, in branches too."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    inner: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TABLE:
            node.target = _TABLE[node.target]
        elif node.op == "get_attr" and isinstance(branch := getattr(module, node.target, None), fx.GraphModule):
            inner[node.target] = _symbolic(branch)
    made = fx.GraphModule(module, graph)
    for name, branch in inner.items():
        setattr(made, name, branch)
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of every symbolic size that it names anew."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
