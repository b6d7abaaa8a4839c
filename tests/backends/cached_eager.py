"""The graph of a cached model, run node by node: what the back ends are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hasten.backends.program import flatten
from hasten.backends.region import find_cut
from hasten.backends.step_cache import example
from hasten.passes.fx.step_cache import conditional
from hasten.passes.steps.catalog import parse


class CachedEager:
    """Capture ``model`` on ``inputs``, cut it for the policy, and run it call by call, ``steps`` calls a run."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], policy: str, steps: int) -> None:
        self.policy, self.steps = parse(policy), steps
        with torch.no_grad():
            program = torch.export.export(model, (), kwargs=dict(inputs), strict=False)
        flat = flatten(program.module(check_guards=False), program)
        self.names = [t.name for t in flat.inputs]
        self.found = find_cut(flat.module, self.policy)
        self.cached = conditional(flat.module, self.found.cut, self.policy)
        self.forced = self.policy.decision.forced(steps)
        self.begin()

    def begin(self) -> None:
        """Start a run."""
        self.state = {t.name: example(t.value, t.start) for t in self.cached.state}
        self.mask = ""

    def __call__(self, **inputs: Any) -> torch.Tensor:
        step = self.cached.programs["step"]
        decision = self.policy.decision
        controls = {
            "cache_step": torch.tensor(len(self.mask)),
            "cache_steps": torch.tensor(self.steps),
            "cache_force": torch.tensor(int(self.forced[len(self.mask)])),
            "cache_threshold": torch.tensor(decision.threshold, dtype=torch.float32),
            "cache_limit": torch.tensor(decision.limit),
        }
        known = {**self.state, **controls}
        with torch.no_grad():
            result, *written = step.module(*(inputs[n] for n in self.names), *(known[n] for n in step.extra_inputs))
        self.state.update(dict(zip(step.extra_outputs, written, strict=True)))
        self.mask += str(int(self.state.pop("cache_computed")))
        return result
