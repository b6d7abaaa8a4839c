"""Weights that stay in a file while their model is rewritten: the proto says where they are, and no pass copies them.

A model is written anew by every pass, and a proto of two gigabytes each time costs more than the pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class WeightsFile:
    """The file ``path`` for the large weights of a model, written beside what is done with the model meanwhile.

    Used as a context: its end is when the file is whole, or raises the `OSError` that it could not be written for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = ThreadPoolExecutor(1, "weights")
        self._written: Future[None] | None = None

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._pool.shutdown()
        if kind is None and self._written is not None:
            self._written.result()

    def detach(self, model: ir.Model) -> None:
        """Begin to write the large weights of ``model``, one after the other; the model holds their places at once."""
        pieces: list[tuple[int, Any]] = []
        end = 0
        for value in model.graph.initializers.values():
            tensor: Any = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or math.prod(tensor.shape.numpy()) < FROM:
                continue
            offset = end + -end % _PAGE  # runtimes map them into memory
            pieces.append((offset, tensor))
            end = offset + tensor.nbytes
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=self.path.parent,
            )
        self._written = self._pool.submit(self._write, pieces)

    def _write(self, pieces: Sequence[tuple[int, Any]]) -> None:
        with self.path.open("wb") as file:
            for offset, tensor in pieces:
                file.seek(offset)
                file.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)


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
