"""Weights that stay in a file while their model is rewritten: the proto says where they are, and no pass copies them.

A model is written anew by every pass, and a proto of two gigabytes each time costs more than the pass.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir

from hasten.passes.onnx.tensors import tensors_of

FROM = 1 << 14
"""Elements from which a floating tensor goes to the file: below, passes may look at what it holds."""
_PAGE = 4096


def detach(model: ir.Model, file: Path) -> None:
    """Write the large weights of ``model`` to ``file``, one after the other; the model then holds their places."""
    with file.open("wb") as opened:
        for value in model.graph.initializers.values():
            tensor: Any = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or math.prod(tensor.shape.numpy()) < FROM:
                continue
            opened.write(b"\0" * (-opened.tell() % _PAGE))  # runtimes map them into memory
            offset = opened.tell()
            opened.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                opened.tell() - offset,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=file.parent,
            )


def attach_readers(graph: Any, folder: Path) -> None:
    """Let the external weights of an onnx-graphsurgeon graph be read from ``folder`` where a pass looks at them."""
    for tensor in tensors_of(graph):
        if isinstance(tensor, gs.Constant) and is_detached(tensor._values):
            tensor._values = _Outside(tensor._values.tensor, folder)


def is_detached(values: Any) -> bool:
    """Whether a constant's content is in a file."""
    proto = getattr(values, "tensor", None)
    return isinstance(proto, onnx.TensorProto) and proto.data_location == onnx.TensorProto.EXTERNAL


class _Outside(gs.ir.tensor.LazyValues):
    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        super().__init__(tensor)
        self.folder = folder

    def load(self) -> Any:
        return onnx.numpy_helper.to_array(self.tensor, base_dir=str(self.folder))
