"""The convolutions of an FX graph as `hasten.passes.choice.Layer`."""

from __future__ import annotations

from typing import Any

from hasten.passes.choice import Layer
from hasten.passes.fx.view import FxView, fake

OPS = ("conv2d", "upsample_conv2d")


def layer_at(view: FxView, value: Any, threads: int) -> Layer | str | None:
    """The layer that ``value`` computes, or why it is none; None where it is no convolution.

    Where a size may change from call to call, the example's counts.
    """
    read = view.op(value)
    if read is None or read.name not in OPS:
        return None
    wanted = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    for key, plain in wanted.items():
        if read.attrs.get(key, plain) != plain:
            return f"the convolution's {key} is {read.attrs[key]}, not {plain}"
    x, weight = read.inputs[:2]
    shape, kernel = view.sizes(x), view.sizes(weight)
    if shape is None or kernel is None or len(shape) != 4 or tuple(kernel[2:]) != (3, 3):
        return "the kernel is not 3x3"
    sizes = [_example(size) for size in (*shape, kernel[0])]
    if None in sizes:
        return "its sizes are not known before the call"
    if 0 in sizes:
        return "it has no elements"
    batch, channels, height, width, outputs = sizes
    dtype = view.dtype(x)
    if dtype is None or dtype != view.dtype(weight):
        return f"the input is {dtype} and the weight {view.dtype(weight)}"
    return Layer(read.name, batch, channels, outputs, height, width, dtype, fake(x).device.type, threads)


def _example(size: Any) -> Any:
    """A size as a number; None where it is only known at the call."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return None if hint is None else int(hint)
