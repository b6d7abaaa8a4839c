"""GEGLU in plain torch operators: one loop under Inductor, two reads and a write."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hasten.passes.ops.activations import gelu_tanh
from hasten.passes.ops.registry import runs_eagerly, statistics_dtype


def geglu(x: Tensor, approximate: str, gate_first: bool) -> Tensor:
    """Arguments are checked by the caller."""
    value, gate = x.to(statistics_dtype(x.dtype)).chunk(2, -1)
    if gate_first:
        value, gate = gate, value
    # Eager torch has a vectorised kernel for the tanh form; traced, the sigmoid form is the fast one (see activations).
    traced_tanh = approximate == "tanh" and not runs_eagerly(x)
    activated = gelu_tanh(gate) if traced_tanh else F.gelu(gate, approximate=approximate)
    return (value * activated).to(x.dtype)
