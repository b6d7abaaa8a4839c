"""``python -m hasten.models.scenes.classifier train``: a judge of pictures that no generator was trained with.

A small CNN with two heads, shape and colour, trained on freshly rendered scenes. `evaluate` asks it whether a
generated picture shows what it was asked to show.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from hasten.models.scenes.data import COLOURS, SHAPES, render
from hasten.models.scenes.weights import read, write

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
STEPS, BATCH, RATE = 1500, 64, 3e-3
HELD_OUT = 7_000_000  # a seed that no training batch has, here or in train.py


class Classifier(nn.Module):
    """Pictures (B, 3, 32, 32) in [-1, 1] to logits of shape (B, 4) and of colour (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.shape = nn.Linear(64 * 4, len(SHAPES))
        self.colour = nn.Linear(64 * 4, len(COLOURS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify a batch."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        x = x.flatten(1)
        return self.shape(x), self.colour(x)


def train(steps: int = STEPS, *, weights: Path = WEIGHTS) -> float:
    """Train from scratch, save, and return the accuracy (shape and colour both right) on held-out scenes."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        images, shape, colour = _batch(BATCH, seed=3_000_000 + step)
        # Generated pictures are never free of noise; the judge must not mind a little.
        images = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(step))
        shape_logits, colour_logits = model(images)
        loss = F.cross_entropy(shape_logits, shape) + F.cross_entropy(colour_logits, colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"classifier step {step + 1}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    write(model.state_dict(), weights)
    images, shape, colour = _batch(2048, seed=HELD_OUT)
    return accuracy(model, images, shape, colour)["both"]


def load(weights: Path = WEIGHTS) -> Classifier:
    """Return the trained classifier in evaluation mode."""
    tensors = read(weights, "the scenes classifier", "hasten.models.scenes.classifier train")
    model = Classifier()
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def accuracy(model: Classifier, images: torch.Tensor, shape: torch.Tensor, colour: torch.Tensor) -> dict[str, float]:
    """Return the fractions of pictures whose shape, colour and both are recognised."""
    with torch.no_grad():
        shape_logits, colour_logits = model(images)
    right_shape, right_colour = shape_logits.argmax(1) == shape, colour_logits.argmax(1) == colour
    return {
        "shape": right_shape.float().mean().item(),
        "colour": right_colour.float().mean().item(),
        "both": (right_shape & right_colour).float().mean().item(),
    }


def _batch(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scenes = render(count, seed)
    label = torch.from_numpy(scenes.labels)
    return torch.from_numpy(scenes.images), label // len(COLOURS), label % len(COLOURS)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hasten.models.scenes.classifier", description=__doc__)
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    print(f"{WEIGHTS}: {train(args.steps):.4f} of held-out scenes right in shape and colour")
    return 0


if __name__ == "__main__":
    sys.exit(main())
