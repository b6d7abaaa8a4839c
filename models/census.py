"""Count what the rules must find, by watching the functions that a model calls: no compiler, no weights, no memory.

This is the independent count that a rule's hits are held against, so it shares no code with the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hasten.models.inputs import Input

_ADD_OR_SCALE = {torch.add, torch.mul, torch.Tensor.add, torch.Tensor.mul}


class _Watch(TorchFunctionMode):
    """Counts calls and remembers which tensor came from which; holds on to tensors so that an id stays one tensor."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.norms: dict[int, torch.Tensor] = {}
        self.doubled: dict[int, torch.Tensor] = {}
        self.halves: dict[int, tuple[torch.Tensor, ...]] = {}
        self.gates: dict[int, tuple[torch.Tensor, ...]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        first = id(args[0]) if args else 0
        if function is F.group_norm:
            self.count["group-norm-act"] += 1
            self.norms[id(result)] = result
        elif function is F.silu and first in self.norms:
            self.count["group-norm-act.silu"] += 1
        elif function is F.scaled_dot_product_attention or name == "softmax":
            self.count["attention"] += 1
        elif function is F.interpolate and kwargs.get("mode", "nearest") == "nearest":
            if [2 * n for n in args[0].shape[2:]] == list(result.shape[2:]):
                self.doubled[id(result)] = result
        elif name == "conv2d" and first in self.doubled and tuple(args[1].shape[2:]) == (3, 3):
            self.count["upsample-conv"] += 1
        elif name == "chunk" and len(result) == 2:
            self.halves.update({id(half): result for half in result})
        elif name == "gelu" and first in self.halves:
            self.gates[id(result)] = (result, *self.halves[first])
        elif function in _ADD_OR_SCALE:
            self._combine(args, result)
        return result

    def _combine(self, args: Sequence[Any], result: torch.Tensor) -> None:
        for one, other in (args[:2], args[1::-1]):
            if id(one) in self.norms:  # a norm that is scaled and shifted by a condition is one norm still
                self.norms[id(result)] = result
            if id(one) in self.gates and any(other is half for half in self.gates[id(one)][1:]):
                self.count["geglu"] += 1


def census(skeleton: nn.Module, inputs: Sequence[Input]) -> dict[str, int]:
    """Run a module that lies on the meta device once; return the sites of each rule and variant that occurs."""
    example = {i.name: i.example(1, 0, torch.float32).to("meta") for i in inputs}
    with torch.no_grad(), _Watch() as watch:
        skeleton(**example)
    return dict(sorted(watch.count.items()))
