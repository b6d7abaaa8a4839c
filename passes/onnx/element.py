"""Element types by name: numpy's names, and ``bfloat16`` and its kind, for ONNX's numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx


def name_of(data_type: int) -> str:
    """Numpy's name of an ONNX element type, ``bfloat16`` and the like for those that numpy lacks.

    >>> name_of(onnx.TensorProto.BFLOAT16)
    'bfloat16'
    """
    if data_type == onnx.TensorProto.STRING:
        return "str"
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).name)


def type_of(name: str) -> int:
    """The ONNX element type called ``name``.

    >>> type_of("float16") == onnx.TensorProto.FLOAT16
    True
    """
    return int(onnx.helper.np_dtype_to_tensor_dtype(numpy_type(name)))


def numpy_type(name: str) -> np.dtype[Any]:
    """The numpy type called ``name``; ml_dtypes' where numpy has none."""
    return np.dtype(getattr(ml_dtypes, name, name))
