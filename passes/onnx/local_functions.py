"""A model's local functions, written out where they are called."""

from __future__ import annotations

import onnx
import onnx.inliner
from onnx import helper

from hasten.passes.onnx import functions
from hasten.passes.onnx.protos import without_weights


def write_out(model: onnx.ModelProto) -> bool:
    """Put the nodes of every local function where it is called, in place; False where there is none.

    The fused operators of domain ``hasten`` stay. The weights are not touched: they may be larger than the 2 GB that
    ONNX's inliner can be given.
    """
    theirs = sorted({(f.domain, f.name) for f in model.functions if not functions.is_ours(f)})
    if not theirs:
        return False
    light = without_weights(model)
    light.graph.node.extend(model.graph.node)
    light.graph.output.extend(model.graph.output)
    light.graph.value_info.extend(model.graph.value_info)
    # As inputs, so that the inliner gives their names to nothing else.
    given = {v.name for v in model.graph.input}
    held = [t for t in model.graph.initializer if t.name not in given]
    light.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in held)
    written = onnx.inliner.inline_selected_functions(light, theirs)
    for field in ("node", "value_info"):
        model.graph.ClearField(field)
    model.graph.node.extend(written.graph.node)
    model.graph.value_info.extend(written.graph.value_info)
    for field in ("functions", "opset_import"):
        model.ClearField(field)
    model.functions.extend(written.functions)
    model.opset_import.extend(written.opset_import)
    return True
