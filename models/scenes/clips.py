"""`clips`: scenes whose shape moves to the left or right, rendered with numpy, deterministic from a seed.

A class is a scene's class and a speed: ``label = speed * len(data.CLASSES) + scene``. Direction, place, size, tint and
background vary from clip to clip and, but for the place, stay what they are through a clip. Shapes are upright, and at
most a corner of one leaves the picture.

A model is told the class by a caption of three words, shape, colour and speed, each the unit vector of its place in
`WORDS`; the word ``nothing``, three times, is the caption of no class under classifier-free guidance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hasten.models.scenes import data

Array = npt.NDArray[np.float32]

FRAMES = 8
SPEEDS = ("still", "slow", "fast")
PIXELS_A_FRAME = (0.0, 0.9, 1.8)
"""Of a picture 32 pixels wide; of a wider one, the same part of it."""
CLASSES = tuple(f"{speed} {scene}" for speed in SPEEDS for scene in data.CLASSES)
NULL_CLASS = len(CLASSES)
WORDS = (*data.SHAPES, *data.COLOURS, *SPEEDS, "nothing")


class Clips(NamedTuple):
    """A batch: ``frames`` (B, F, 3, S, S) float32 in [-1, 1], ``labels`` (B,) int64."""

    frames: Array
    labels: npt.NDArray[np.int64]


def render(
    count: int, seed: int, frames: int = FRAMES, size: int = 32, labels: npt.NDArray[np.int64] | None = None
) -> Clips:
    """Render ``count`` clips of ``frames`` pictures. The same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    if labels is None:
        labels = rng.integers(0, len(CLASSES), count)
    elif len(labels) != count:
        raise ValueError(f"render: {count} clips were asked for with {len(labels)} labels; give one label a clip")
    speed, scene = np.divmod(labels, len(data.CLASSES))
    shape, colour = np.divmod(scene, len(data.COLOURS))

    radius = rng.uniform(0.21, 0.26, count)
    way = rng.choice([-1, 1], count)
    step = np.array(PIXELS_A_FRAME)[speed] / 32 * np.stack([way, np.zeros(count)])
    half = np.abs(step) * (frames - 1) / 2
    middle = rng.uniform(radius + half + 0.03, 0.97 - radius - half)
    tint = np.clip(data.RGB[colour] + rng.uniform(-0.08, 0.08, (count, 3)), 0, 1)
    backdrop = data.background(rng, count, size)

    clock = np.arange(frames) - (frames - 1) / 2
    centre = middle[:, :, None] + step[:, :, None] * clock
    shape, radius, tint, backdrop = (np.repeat(value, frames, axis=0) for value in (shape, radius, tint, backdrop))
    pictures = data.paint(shape, radius, np.zeros_like(radius), tint, backdrop, centre.reshape(2, -1))
    return Clips(pictures.reshape(count, frames, 3, size, size), labels.astype(np.int64))


def captions(labels: npt.NDArray[np.int64]) -> Array:
    """Spell labels (B,), `NULL_CLASS` among them, as captions (B, 3, len(WORDS))."""
    speed, scene = np.divmod(labels, len(data.CLASSES))
    shape, colour = np.divmod(scene, len(data.COLOURS))
    words = np.stack([shape, len(data.SHAPES) + colour, len(data.SHAPES) + len(data.COLOURS) + speed], axis=1)
    words[labels == NULL_CLASS] = len(WORDS) - 1
    return np.eye(len(WORDS), dtype=np.float32)[words]
