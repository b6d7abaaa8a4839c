"""A decision that depends on the timestep alone, made before the run: the mask that it comes to.

The signal is computed with the graph's own part that makes it, at each of the timesteps that the policy was told, and
the policy is replayed on it. What is built then has no decision, none of its state and no branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.errors import HastenError
from hasten.passes.steps.catalog import canonical, parse
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.simulate import Recording, predict

if TYPE_CHECKING:
    import onnx
    import torch

    from hasten.backends.program import FlatProgram
    from hasten.backends.region import Found

SignalAt = Callable[[float], Any]
"""A timestep to the signal, a numpy array."""


@dataclass(frozen=True)
class Folded:
    """A policy with the mask ``bits`` in the place of its decision, and the text that asks for it."""

    policy: Policy
    text: str
    bits: str


def times_of(policy: Policy) -> tuple[float, ...]:
    """The timesteps of the run that a policy was told; none where it decides in the run."""
    return tuple(getattr(policy.decision, "times", ()))


def fold(policy: Policy, found: Found[Any], signal: SignalAt) -> Folded:
    """The mask that ``policy`` decides on; `HastenError` where more than the timestep decides."""
    if found.time is None:
        raise HastenError(
            f"{policy.name}: times were given, and the signal does not depend on the timestep alone in this graph; "
            "leave times out, so that each run decides"
        )
    times = times_of(policy)
    bits = predict(policy, Recording(signals=[signal(time) for time in times]))
    words = (
        f"mask:bits={bits},granularity={policy.granularity},payload={policy.payload.name},branches={policy.branches}"
    )
    text = canonical(words)
    return Folded(parse(text), text, bits)


def signal_in_graph(flat: FlatProgram, found: Found[Any]) -> SignalAt:
    """The signal of a flat graph, as a function of its timestep."""
    import torch

    part, example = _part(flat, found), None
    for node, value in zip(flat.module.graph.find_nodes(op="placeholder"), flat.example_inputs, strict=True):
        example = value if node.name == found.time else example

    def at(time: float) -> Any:
        assert example is not None, "the timestep is an input"
        with torch.no_grad():
            return part(torch.full_like(example, time)).float().cpu().numpy()

    return at


def _part(flat: FlatProgram, found: Found[Any]) -> torch.fx.GraphModule:
    """What makes the signal from the timestep, as a graph of its own."""
    from torch import fx

    wanted, todo = set(), [found.cut.signal]
    while todo:
        node = todo.pop()
        if node not in wanted:
            wanted.add(node)
            todo.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in flat.module.graph.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[found.cut.signal])
    return fx.GraphModule(flat.module, graph)


def signal_in_onnx(model: onnx.ModelProto, found: Found[Any], sizes: Sequence[int]) -> SignalAt:
    """The signal of an ONNX model, as a function of its timestep, whose sizes are ``sizes``."""
    import onnxruntime
    from onnx.utils import Extractor

    from hasten.passes.onnx.element import numpy_type

    (given,) = (i for i in model.graph.input if i.name == found.time)
    part = Extractor(model).extract_model([found.time], [found.cut.signal])
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    dtype = _numpy_name(given)

    def at(time: float) -> Any:
        (made,) = session.run(None, {given.name: np.full(tuple(sizes), time, numpy_type(dtype))})
        return np.asarray(made, np.float32)

    return at


def _numpy_name(value: onnx.ValueInfoProto) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
