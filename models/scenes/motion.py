"""How fast a clip's shape moves, measured from its pixels, and how many clips show what was asked for."""

from __future__ import annotations

import torch

from hasten.models.scenes import clips, data
from hasten.models.scenes.classifier import Classifier

GREY = 0.3
"""Channels of a background differ by less than this part of white, those of a shape by more than twice as much."""


def centroids(frames: torch.Tensor) -> torch.Tensor:
    """Find the middle of the coloured pixels, (B, F, 2), x before y, in parts of the width, of clips (B, F, 3, S, S).

    A frame without any coloured pixel has its middle in the middle of the picture.
    """
    colourful = ((frames.amax(2) - frames.amin(2)) / 2 - GREY).clamp(min=0) + 1e-9
    axis = (torch.arange(frames.shape[-1]) + 0.5) / frames.shape[-1]
    mass = colourful.sum((2, 3))
    return torch.stack([(colourful * axis).sum((2, 3)) / mass, (colourful * axis[:, None]).sum((2, 3)) / mass], dim=2)


def straight_lines(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit an even motion to the centroids by least squares.

    Returns its speed (B,) in pixels a frame, and (B,) the root mean square, in pixels, of how far the centroids are
    from it. Both are in pixels of a picture 32 pixels wide.
    """
    place = centroids(frames) * 32
    clock = torch.arange(place.shape[1]) - (place.shape[1] - 1) / 2
    clock = clock[None, :, None]
    velocity = (place * clock).sum(1, keepdim=True) / clock.square().sum()
    off = place - place.mean(1, keepdim=True) - velocity * clock
    return velocity[:, 0].norm(dim=1), off.square().sum(2).mean(1).sqrt()


def accuracy(judge: Classifier, frames: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Judge clips (B, F, 3, 32, 32).

    ``shape``, ``colour``: the fractions of clips that the classifier recognises, by the sum of its log-probabilities
    over the frames. ``speed``: of clips whose measured speed is nearer to the right one than to the others. ``all``:
    of clips of which all three are right. ``frames``: of single frames whose shape and colour are right. ``wobble``:
    the mean distance from an even motion, in pixels. ``still``, ``slow``, ``fast``: mean speeds, in pixels a frame.
    """
    speed, scene = labels // len(data.CLASSES), labels % len(data.CLASSES)
    asked = {"shape": scene // len(data.COLOURS), "colour": scene % len(data.COLOURS)}
    with torch.no_grad():
        logits = judge(frames.flatten(0, 1))
    right = {}
    frame = torch.ones(frames.shape[:2], dtype=torch.bool)
    for (name, wanted), part in zip(asked.items(), logits, strict=True):
        chances = part.log_softmax(1).unflatten(0, frames.shape[:2])
        right[name] = chances.sum(1).argmax(1) == wanted
        frame &= chances.argmax(2) == wanted[:, None]
    measured, wobble = straight_lines(frames)
    right["speed"] = (measured[:, None] - torch.tensor(clips.PIXELS_A_FRAME)).abs().argmin(1) == speed
    right["all"] = torch.stack(list(right.values())).all(0)
    marks = {name: value.float().mean().item() for name, value in right.items()}
    means = {name: measured[speed == i].mean().item() for i, name in enumerate(clips.SPEEDS)}
    return {**marks, "frames": frame.float().mean().item(), "wobble": wobble.mean().item(), **means}
