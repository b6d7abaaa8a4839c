"""`scenes`: one coloured shape on a smooth background, rendered with numpy, deterministic from a seed.

A class is a shape and a colour: ``label = shape * len(COLOURS) + colour``. Position, size, tilt, tint and background
vary. Edges are antialiased by a signed distance of one pixel, so a picture has no aliasing that a model would have to
learn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
NULL_CLASS = len(CLASSES)
"""The label that stands for "no class" under classifier-free guidance."""

RGB = np.array([[0.90, 0.12, 0.12], [0.10, 0.75, 0.20], [0.15, 0.25, 0.95], [0.98, 0.85, 0.10]], np.float32)


class Scenes(NamedTuple):
    """A batch: ``images`` (B, 3, S, S) float32 in [-1, 1], ``labels`` (B,) int64."""

    images: Array
    labels: npt.NDArray[np.int64]


def render(count: int, seed: int, size: int = 32, labels: npt.NDArray[np.int64] | None = None) -> Scenes:
    """Render ``count`` scenes of ``size`` x ``size`` pixels. The same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    if labels is None:
        labels = rng.integers(0, len(CLASSES), count)
    elif len(labels) != count:
        raise ValueError(f"render: {count} scenes were asked for with {len(labels)} labels; give one label a scene")
    shape, colour = np.divmod(labels, len(COLOURS))

    radius = rng.uniform(0.24, 0.36, count)
    centre = rng.uniform(radius + 0.04, 0.96 - radius, (2, count))
    tilt = rng.uniform(-0.3, 0.3, count)
    tint = np.clip(RGB[colour] + rng.uniform(-0.08, 0.08, (count, 3)), 0, 1)

    return Scenes(paint(shape, radius, tilt, tint, background(rng, count, size), centre), labels.astype(np.int64))


def paint(
    shape: npt.NDArray[np.int64],
    radius: npt.NDArray[np.float64],
    tilt: npt.NDArray[np.float64],
    tint: npt.NDArray[np.float64],
    background: npt.NDArray[np.float64],
    centre: npt.NDArray[np.float64],
) -> Array:
    """Paint a shape on each background (N, 3, S, S) in [0, 1]; the pictures are float32 in [-1, 1].

    ``tint`` is (N, 3) in [0, 1]; ``radius`` (N,) and ``centre`` (2, N), x before y, are parts of the picture's width;
    ``tilt`` (N,) is in radians.
    """
    size = background.shape[-1]
    axis = (np.arange(size) + 0.5) / size
    dx = axis[None, None, :] - centre[0][:, None, None]
    dy = axis[None, :, None] - centre[1][:, None, None]
    cos, sin = np.cos(tilt)[:, None, None], np.sin(tilt)[:, None, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    inside = _signed_distance(shape, x, y, radius[:, None, None])
    cover = np.clip(0.5 - inside * size, 0, 1)[:, None]
    picture = background * (1 - cover) + tint[:, :, None, None] * cover
    return (picture * 2 - 1).astype(np.float32)


def background(rng: np.random.Generator, count: int, size: int) -> npt.NDArray[np.float64]:
    """Blend two greyish colours linearly along a random direction, (count, 3, size, size) in [0, 1]."""
    axis = (np.arange(size) + 0.5) / size
    grey = rng.uniform(0.25, 0.75, (2, count, 1))
    ends = np.clip(grey + rng.uniform(-0.08, 0.08, (2, count, 3)), 0, 1)
    angle = rng.uniform(0, 2 * np.pi, count)[:, None, None]
    x, y = axis[None, None, :] - 0.5, axis[None, :, None] - 0.5
    ramp = 0.5 + (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)
    return ends[0][:, :, None, None] * ramp[:, None] + ends[1][:, :, None, None] * (1 - ramp[:, None])


def _signed_distance(
    shape: npt.NDArray[np.int64],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    r: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Negative inside the shape; exact near edges, which is all that antialiasing needs."""
    ax, ay = np.abs(x), np.abs(y)
    side, bar, arm = 0.82 * r, 0.34 * r, r
    circle = np.hypot(x, y) - 0.92 * r
    square = np.maximum(ax, ay) - side
    triangle = np.maximum(y - 0.7 * r, 0.866 * ax - 0.5 * y - 0.55 * r)
    cross = np.minimum(np.maximum(ax - bar, ay - arm), np.maximum(ax - arm, ay - bar))
    return np.choose(shape[:, None, None], [circle, square, triangle, cross])
