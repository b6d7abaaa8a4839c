"""Element types and shapes of graphsurgeon tensors, from and to ONNX's forms."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from hasten.passes.onnx.element import name_of

GENERATED = re.compile(r"unk__\d+|.+\*.+")
"""Dimension names that inference makes up (ONNX's, and products); they are compared but never written."""


def onnx_dtype(tensor: Any) -> int:
    """`onnx.TensorProto.DataType` of a graphsurgeon tensor; 0 where unknown."""
    dtype = tensor.dtype
    if dtype is None:
        return 0
    return int(dtype) if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def dtype_name(tensor: Any) -> str | None:
    """The element type's name; None where it is unknown."""
    data_type = onnx_dtype(tensor) if tensor.name else 0
    return name_of(data_type) if data_type else None


def known(tensor: Any) -> bool:
    """Whether element type and rank are known."""
    return tensor.dtype is not None and tensor.shape is not None


def value_info(tensor: Any) -> onnx.ValueInfoProto | None:
    """What is known of a tensor, in ONNX's form; None where that is nothing or where it is not a tensor."""
    if getattr(tensor, "type", "tensor_type") != "tensor_type" or not onnx_dtype(tensor):
        return None
    shape = tensor.shape
    if shape is not None:
        shape = [None if isinstance(d, str) and GENERATED.fullmatch(d) else d for d in shape]
    return onnx.helper.make_tensor_value_info(tensor.name, onnx_dtype(tensor), shape)


def set_type(tensor: Any, info: onnx.TypeProto) -> None:
    """Take over what inference found where it is more than is known."""
    if not info.HasField("tensor_type") or isinstance(tensor, gs.Constant):
        return
    if info.tensor_type.elem_type:
        tensor.dtype = info.tensor_type.elem_type
    if info.tensor_type.HasField("shape"):
        found = [_dim(d) for d in info.tensor_type.shape.dim]
        before = tensor.shape
        if before is not None and len(before) == len(found):
            found = [b if _better(b, f) else f for b, f in zip(before, found, strict=True)]
        tensor.shape = found


def _better(before: Any, found: Any) -> bool:
    if found is None or isinstance(before, int):
        return True
    return isinstance(before, str) and isinstance(found, str) and bool(GENERATED.fullmatch(found))


def _dim(dim: Any) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.dim_param else None
