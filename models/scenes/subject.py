"""What a bundled model draws, still pictures or clips: its classes, how it is told one, and its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hasten.models.scenes import clips, data


@dataclass(frozen=True)
class Subject:
    """``classes`` by label, and ``render(count, seed, labels)`` to pixels (B, 3, S, S) or (B, F, 3, S, S) and labels.

    ``condition`` spells labels (B,), the one behind the last class among them, as the model's third input.
    """

    classes: Sequence[str]
    render: Callable[[int, int, Any], tuple[Any, Any]]
    condition: Callable[[torch.Tensor], torch.Tensor]

    @property
    def null_class(self) -> int:
        """The label that stands for "no class" under classifier-free guidance."""
        return len(self.classes)

    def latents(self, pixels: torch.Tensor, unshuffle: int) -> torch.Tensor:
        """Turn pixels into what the model sees: (B, C, H, W), or (B, C, F, H, W) for clips."""
        latents = F.pixel_unshuffle(pixels, unshuffle)
        return latents.transpose(1, 2) if latents.ndim == 5 else latents

    def pixels(self, latents: torch.Tensor, unshuffle: int) -> torch.Tensor:
        """Undo `latents`."""
        return F.pixel_shuffle(latents.transpose(1, 2) if latents.ndim == 5 else latents, unshuffle)


def _captions(labels: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(clips.captions(labels.cpu().numpy())).to(labels.device)


PICTURES = Subject(data.CLASSES, lambda n, seed, labels: data.render(n, seed, labels=labels), lambda labels: labels)
CLIPS = Subject(clips.CLASSES, lambda n, seed, labels: clips.render(n, seed, labels=labels), _captions)


def subject(spec: Mapping[str, Any]) -> Subject:
    """Say what the model of a bundled ``<stem>.json`` draws."""
    return CLIPS if "video_length" in spec["config"] else PICTURES


class Pixels(nn.Module):
    """The decoder of a bundled ``<stem>.json``: latents to pixels in [-1, 1], which are the same values."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.subject, self.unshuffle = subject(spec), int(spec["unshuffle"])

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, 3, S, S), or clips (B, C, F, H, W) to (B, F, 3, S, S)."""
        return self.subject.pixels(latents, self.unshuffle).clamp(-1, 1)
