"""The candidates of a 3x3 convolution and what the roofline model says each takes.

The constants are data, measured on one thread of a 2-core AMD EPYC (Zen 4, AVX-512): oneDNN's direct convolution
reaches 113 to 119 GFLOP/s, the product of transformed tiles 95 to 109, and the transforms about one nanosecond for a
float of the input and one for a float of the output with F(4x4). Other processors differ in scale, much less in the
ratios that decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.passes.choice import DIRECT, Candidate, Layer, Limits
from hasten.passes.ops.native.schemas import CHUNK_BYTES
from hasten.passes.ops.winograd_conv2d.transforms import Transform, transform

TILES = {"conv2d": (2, 4, 6), "upsample_conv2d": (2, 4)}
"""Output tiles that the kernels have."""
BLOCK, LANES = 32, 16
"""Transformed weights are padded to whole blocks of output channels, and to whole vectors of input channels."""
ROWS, SEGMENT, PRODUCT_BYTES = 14, 32, 400 << 10
"""Of the kernels: tiles that are multiplied together at most, and transformed together; products of a thread."""


@dataclass(frozen=True)
class Machine:
    """One thread's rates: floating-point operations and bytes a second, seconds to transform one float of F(4x4)."""

    direct: float = 115e9
    product: float = 100e9
    bandwidth: float = 12e9
    transform: float = 1.0e-9
    call: float = 10e-6
    """Seconds that a call of the library's costs whatever its size."""
    own_call: float = 50e-6
    """The same of ours, with its barriers between threads."""


MACHINE = Machine()


@dataclass(frozen=True)
class Form:
    """Implementation name, tile, and whether it is the phases of an upsampled map."""

    name: str
    tile: int
    phases: bool

    @property
    def transform(self) -> Transform:
        return transform(self.tile, 2 if self.phases else 3)

    @property
    def frequencies(self) -> int:
        """Products a tile costs for each pair of channels."""
        return self.transform.t**2 * (4 if self.phases else 1)


def forms(op: str) -> tuple[Form, ...]:
    """Every Winograd form of ``op``, by name."""
    upsampled = op == "upsample_conv2d"
    return tuple(Form(f"winograd-{'phases-' if upsampled else ''}f{m}", m, upsampled) for m in TILES[op])


def form(name: str) -> Form | None:
    """The form called ``name``; None for the library's own."""
    return next((f for op in TILES for f in forms(op) if f.name == name), None)


def weight_bytes(layer: Layer, f: Form) -> int:
    """Bytes of the transformed weights, padding included."""
    channels = -(-layer.channels // LANES) * LANES
    return 4 * f.frequencies * channels * -(-layer.outputs // BLOCK) * BLOCK


def workspace_bytes(layer: Layer, f: Form) -> int:
    """The most that a call on any processor holds beside its operands, for a map padded to keep its size.

    Transformed tiles of a chunk, at least `ROWS` or a segment of one row; for each thread at most `PRODUCT_BYTES` of
    products, and a segment of the map. `ops/native/winograd.cpp` plans the same in `plan_for`.
    """
    line = 4 * LANES
    tile = f.frequencies * -(-layer.channels // LANES) * line
    columns = math.ceil(layer.width / f.tile)
    every = layer.batch * math.ceil(layer.height / f.tile) * columns
    chunk = max(CHUNK_BYTES // tile, ROWS, min(columns, SEGMENT) + ROWS - 1)  # whole rows of the product
    tiles = min(every + ROWS - 1, chunk)
    window = f.transform.t + (1 if f.phases else 0)
    segment = window * (SEGMENT * f.tile + window) * line
    return tiles * tile + f.frequencies * line + layer.threads * (PRODUCT_BYTES + f.frequencies * line + segment)


def predicted(layer: Layer, f: Form | None, machine: Machine = MACHINE) -> float:
    """Seconds by the roofline model; ``f`` None is the library's own."""
    scale = 2 if layer.op == "upsample_conv2d" else 1
    pixels = layer.batch * layer.height * layer.width
    reads, writes = pixels * layer.channels, pixels * scale**2 * layer.outputs
    threads = max(1, layer.threads)
    if layer.device != "cpu":  # nothing here is known of a GPU: only a measurement may choose there
        return 0.0 if f is None else math.inf
    if f is None:
        upsampled = reads * (1 + 2 * scale**2) if scale > 1 else reads  # written, then read again
        flops = 18 * pixels * scale**2 * layer.channels * layer.outputs
        traffic = 4 * (upsampled + writes + 9 * layer.channels * layer.outputs)
        return max(flops / machine.direct, traffic / machine.bandwidth) / threads + machine.call
    tiles = layer.batch * math.ceil(layer.height / f.tile) * math.ceil(layer.width / f.tile)
    grown = tiles * f.frequencies / pixels / 2.25  # of F(4x4) on whole tiles it is one
    flops = 2 * tiles * f.frequencies * layer.channels * -(-layer.outputs // BLOCK) * BLOCK
    chunks = max(1, round(tiles * 4 * f.frequencies * layer.channels / CHUNK_BYTES))
    streamed = min(chunks, 2) * weight_bytes(layer, f)  # further passes find them in the cache, or hide behind work
    product = max(flops / machine.product, streamed / machine.bandwidth)
    moved = machine.transform * grown * (reads + writes / scale**2)
    return (product + moved) / threads + machine.own_call


def candidates(layer: Layer, limits: Limits, *, forced: str | None = None) -> tuple[list[Candidate], str]:
    """``direct`` and every form that ``limits`` allow, and why there are no more.

    ``forced`` names the only form wanted.
    """
    found = [Candidate(DIRECT, predicted(layer, None))]
    if layer.dtype == "bfloat16":
        return found, "bfloat16 would lose more than a percent of every output"
    if layer.dtype == "float16" and not limits.half:
        return found, "float16 loses digits in the transforms; it is used when asked for (half)"
    if layer.dtype == "float16" and layer.device == "cpu":
        return found, "the C++ kernels compute in float32: on a CPU float16 keeps the library's convolution"
    if layer.dtype not in ("float32", "float16"):
        return found, f"there is no Winograd kernel for {layer.dtype}"
    if limits.strict_nan:
        return found, "a NaN or an infinity would spread over its whole tile, and strict-nan was asked for"
    why = ""
    if forced is None and min(layer.channels, layer.outputs) < 32:
        return found, f"{min(layer.channels, layer.outputs)} channels are too few to pay for the transforms"
    for f in forms(layer.op):
        if forced is not None and f.name != forced:
            continue
        error = f.transform.expected_error(layer.dtype, layer.channels)
        if limits.max_error is not None and error > limits.max_error:
            why = f"{f.name} is expected to be {error:.1e} off, {limits.max_error:.1e} is allowed"
            continue
        found.append(Candidate(f.name, predicted(layer, f), weight_bytes(layer, f), workspace_bytes(layer, f), error))
    return found, why


def names(op: str) -> Sequence[str]:
    """Every implementation of ``op``."""
    return (DIRECT, *(f.name for f in forms(op)))
