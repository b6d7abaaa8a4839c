"""Programs with a step cache in ONNX Runtime, call by call."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from hasten.passes.onnx.step_cache import Cached
from hasten.passes.onnx.verify import verify_model
from hasten.passes.steps.payload import Residual
from hasten.passes.steps.policy import DECIDE, Policy
from hasten.passes.steps.teacache import TeaCache

STEPS = 12
TEACACHE = Policy("teacache", TeaCache((1.0, 0.0), 0.1), Residual())


class Session:
    def __init__(self, model: onnx.ModelProto) -> None:
        verify_model(model)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        found = self.session.run(self.outputs, {name: given[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


def fresh(cached: Cached, batch: int = 2) -> dict[str, Any]:
    sizes = {t.name: [batch if isinstance(d, str) else d for d in t.shape] for t in cached.state}
    return {t.name: np.full(sizes[t.name], t.start, t.dtype) for t in cached.state}


def control(step: int, threshold: float, force: int = DECIDE, limit: int = -1) -> dict[str, Any]:
    numbers = {"step": step, "steps": STEPS, "force": force, "limit": limit}
    made: dict[str, Any] = {f"cache_{name}": np.int64(value) for name, value in numbers.items()}
    return {**{k: np.asarray(v) for k, v in made.items()}, "cache_threshold": np.asarray(threshold, np.float32)}


def keep(state: dict[str, Any], outputs: dict[str, Any]) -> None:
    for name in [n for n in outputs if n.startswith("next_")]:
        state[name.removeprefix("next_")] = outputs.pop(name)
