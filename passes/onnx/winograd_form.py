"""F(4x4, 3x3) in standard ONNX operators, in the form that ONNX Runtime's CPU provider runs fastest.

Of some twenty forms that were timed (2 threads, float32), the fastest: the input transform is one convolution of single
maps with 36 outputs, 6x6 taps and stride 4; the products are a 1x1 convolution in 36 groups, whose kernel adds 128
channels at a time where MatMul adds all of them up in a row (errors of 1.1e-6 and 2.6e-6 at 1280 channels); the output
transform is two products with a transpose of runs of tiles between them. The bias is added to the products, scaled so
that the output transform makes ones of it. Large maps go through in strips of rows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.passes.ops.winograd_conv2d.transforms import Matrix, transform

if TYPE_CHECKING:
    from hasten.passes.onnx.view import OnnxView

Array = npt.NDArray[np.float64]
TILE, TAPS, T = 4, 3, 6
STRIP_BYTES = 24 << 20
"""Transformed tiles that are alive at once: 128 channels at 256x256 take 71 ms in four strips and 80 ms in one."""
RUN = 16
"""Tiles of a row whose outputs are put in place by one product."""


@dataclass(frozen=True)
class Plan:
    """How a map of ``outputs`` channels and (height, width) results is cut: ``strips`` of (first, count) tile rows."""

    height: int
    width: int
    columns: int
    run: int
    strips: tuple[tuple[int, int], ...]


def plan(batch: int, channels: int, height: int, width: int) -> Plan:
    """The cut of a map whose result has (height, width) numbers; columns of tiles are whole runs."""
    tiles = math.ceil(width / TILE)
    run = tiles if tiles <= RUN else min(range(RUN, RUN // 2 - 1, -1), key=lambda r: math.ceil(tiles / r) * r)
    columns = math.ceil(tiles / run) * run
    rows = math.ceil(height / TILE)
    each = max(1, STRIP_BYTES // (4 * batch * channels * T * T * columns))
    count = math.ceil(rows / each)
    cuts = [rows * i // count for i in range(count + 1)]
    return Plan(height, width, columns, run, tuple((a, b - a) for a, b in itertools.pairwise(cuts)))


@cache
def _matrices() -> tuple[Array, Array, Array, Array]:
    """B^T, G, A^T, and z with A^T z = 1."""
    made = transform(TILE, TAPS)

    def array(matrix: Matrix) -> Array:
        return np.array([[float(x) for x in row] for row in matrix])

    at = array(made.at)
    return array(made.bt), array(made.g), at, np.linalg.pinv(at) @ np.ones(TILE)


def write(
    view: OnnxView, x: str, weight: Array, bias: Array | None, padding: tuple[int, ...], cut: Plan, at: str
) -> str:
    """Emit the convolution of ``x`` (B, C, H, W) with ``weight`` (K, C, 3, 3); returns (B, K, height, width)."""
    return _Writer(view, x, weight, bias, padding, cut, at).whole()


class _Writer:
    def __init__(
        self,
        view: OnnxView,
        x: str,
        weight: Array,
        bias: Array | None,
        padding: tuple[int, ...],
        cut: Plan,
        at: str,
    ) -> None:
        self.view, self.x, self.at, self.cut = view, x, at, cut
        self.top, self.left = padding[:2]
        self.outputs, self.channels = weight.shape[:2]
        shape = view.shape(x)
        assert shape is not None
        self.height, self.map_width = int(shape[2]), int(shape[3])
        bt, g, a, z = _matrices()
        self.input = self.floats(np.einsum("ij,kl->ikjl", bt, bt).reshape(T * T, 1, T, T))
        u = np.einsum("ij,kcjl,ml->imkc", g, weight.astype(np.float64), g)
        self.weight = self.floats(u.reshape(T * T * self.outputs, self.channels, 1, 1))
        self.bias = None if bias is None else self.floats(np.einsum("i,j,k->ijk", z, z, bias).reshape(-1))
        self.rows = self.floats(a)
        across = np.zeros((cut.run, TILE, T, cut.run))
        across[np.arange(cut.run), :, :, np.arange(cut.run)] = a
        self.across = self.floats(across.reshape(TILE * cut.run, T * cut.run).T)

    def floats(self, content: Array) -> str:
        return self.view.emit_constant(np.ascontiguousarray(content, dtype=np.float32), at=self.at)

    def node(self, op: str, *inputs: str | None, **attrs: Any) -> str:
        return self.view.node_at(op, list(inputs), attrs, at=self.at)

    def integers(self, *numbers: int) -> str:
        return self.view.emit_constant(np.asarray(numbers, dtype=np.int64), at=self.at)

    def reshape(self, value: str, *shape: int) -> str:
        return self.node("Reshape", value, self.integers(*shape))

    def whole(self) -> str:
        parts = [self.strip(first, count) for first, count in self.cut.strips]
        made = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=2)
        height = TILE * sum(count for _, count in self.cut.strips)
        ends = [(2, self.cut.height, height), (3, self.cut.width, TILE * self.cut.columns)]
        cropped = [(axis, end) for axis, end, now in ends if end != now]
        if cropped:
            axes, last = zip(*cropped, strict=True)
            zeros = self.integers(*(0 for _ in axes))
            made = self.node("Slice", made, zeros, self.integers(*last), self.integers(*axes))
        return made

    def strip(self, first: int, count: int) -> str:
        """The results of ``count`` rows of tiles from ``first`` on, (B, K, 4 count, 4 columns)."""
        columns, run = self.cut.columns, self.cut.run
        begin = first * TILE - self.top
        end = begin + count * TILE + TAPS - 1
        x, held = self.x, (max(0, begin), max(1, min(self.height, end)))
        if held != (0, self.height):
            x = self.node("Slice", x, self.integers(held[0]), self.integers(held[1]), self.integers(2))
        right = columns * TILE + TAPS - 1 - self.left - self.map_width
        pads = [held[0] - begin, self.left, end - held[1], right]
        x = self.reshape(x, -1, 1, held[1] - held[0], self.map_width)
        v = self.node("Conv", x, self.input, kernel_shape=[T, T], strides=[TILE, TILE], pads=pads)
        v = self.reshape(v, -1, self.channels, T * T, count * columns)
        v = self.node("Transpose", v, perm=[0, 2, 1, 3])
        v = self.reshape(v, -1, T * T * self.channels, count, columns)
        m = self.node("Conv", v, self.weight, self.bias, kernel_shape=[1, 1], group=T * T)
        m = self.reshape(m, -1, T, T * self.outputs * count * columns)
        m = self.node("MatMul", self.rows, m)
        m = self.reshape(m, -1, TILE, T, self.outputs, count, columns // run, run)
        m = self.node("Transpose", m, perm=[0, 3, 4, 1, 5, 2, 6])
        m = self.node("MatMul", self.reshape(m, -1, T * run), self.across)
        return self.reshape(m, -1, self.outputs, TILE * count, TILE * columns)
