"""The calls that are timed: each implementation of a layer, on random inputs, in the form that a compiled graph has.

The library's own gets its best form: on a CPU its weight is laid out beforehand, as Inductor does under freezing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UsageError
from hasten.passes.choice import DIRECT, Layer

Ways = Mapping[str, Callable[[], Any]]
"""Forms of one implementation by name, of which the fastest counts."""
_ONES = [1, 1]


@dataclass(frozen=True)
class Inputs:
    """x is channels-last, (B, C, H, W); weight (K, C, 3, 3); bias (K,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor


class TorchRunners:
    """``runners(layer, name)`` for ``conv2d`` and ``upsample_conv2d``; keeps the inputs of one layer at a time."""

    def __init__(self) -> None:
        self._layer: Layer | None = None
        self._inputs: Inputs | None = None

    def __call__(self, layer: Layer, name: str) -> Ways:
        """Lay out weights, and give the calls. Raises whatever torch does where it cannot."""
        if self._inputs is None or self._layer != layer:
            self._layer, self._inputs = layer, inputs(layer)
        if name == DIRECT:
            return direct(layer, self._inputs)
        return {"": winograd(name, self._inputs)}


def inputs(layer: Layer) -> Inputs:
    """Normal deviates, the same every time; the outputs' variance is one. The global generator is left alone."""
    generator = torch.Generator(layer.device).manual_seed(0)
    dtype = getattr(torch, layer.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=layer.device)

    x = normal(layer.batch, layer.channels, layer.height, layer.width).to(dtype)
    weight = normal(layer.outputs, layer.channels, 3, 3) / (9 * layer.channels) ** 0.5
    return Inputs(x.contiguous(memory_format=torch.channels_last), weight.to(dtype), normal(layer.outputs).to(dtype))


def direct(layer: Layer, given: Inputs) -> dict[str, Callable[[], Any]]:
    """What the graph has without Winograd; an upsampled map also in the form of four phases."""
    if layer.op == "conv2d":
        return _convolutions(given, lambda: given.x)
    if layer.op != "upsample_conv2d":
        raise UsageError(f"tuning: no layer {layer.op!r}; layers: conv2d, upsample_conv2d")

    def upsampled() -> Tensor:
        return F.interpolate(given.x, scale_factor=2.0, mode="nearest")

    return {**_convolutions(given, upsampled), "phases": _phases(given)}


def winograd(name: str, given: Inputs) -> Callable[[], Any]:
    """``winograd-f4`` and its like, with weights transformed beforehand."""
    import hasten.passes.ops  # noqa: F401  (registers the operators)
    from hasten.passes.ops.winograd_conv2d.select import form

    found = form(name)
    if found is None:
        raise UsageError(f"tuning: no implementation {name!r} of a 3x3 convolution")
    outputs = given.weight.shape[0]
    made = torch.ops.hasten.winograd_weight(given.weight, found.tile, found.phases)
    return lambda: torch.ops.hasten.winograd_conv2d(
        given.x, made, given.bias, None, None, outputs=outputs, tile=found.tile, phases=found.phases
    )


def _convolutions(given: Inputs, map_: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    weight = given.weight.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Any]] = {"channels-last": lambda: F.conv2d(map_(), weight, given.bias, padding=1)}
    if _prepacks(given.x):
        size = list(map_().shape)
        packed = torch.ops.mkldnn._reorder_convolution_weight(given.weight, _ONES, _ONES, _ONES, 1, size)
        ways["prepacked"] = lambda: torch.ops.mkldnn._convolution_pointwise(
            map_(), packed, given.bias, _ONES, _ONES, _ONES, 1, "none", [], ""
        )
    return ways


def _phases(given: Inputs) -> Callable[[], Any]:
    """The transposed convolution of `hasten.passes.ops.upsample_conv2d.phases`, its taps summed beforehand."""
    from hasten.passes.ops.upsample_conv2d.phases import phase_weight

    weight = phase_weight(given.weight).contiguous(memory_format=torch.channels_last)
    if not _prepacks(given.x):
        return lambda: F.conv_transpose2d(given.x, weight, given.bias, stride=2, padding=1)
    packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, _ONES, [0, 0], [2, 2], _ONES, 1, list(given.x.shape)
    )
    return lambda: torch.ops.mkldnn._convolution_transpose_pointwise(
        given.x, packed, given.bias, _ONES, [0, 0], [2, 2], _ONES, 1, "none", [], ""
    )


def _prepacks(x: Tensor) -> bool:
    """Whether Inductor lays weights out beforehand for such an input."""
    available = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return bool(available and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()))
