"""``python -m hasten.models.scenes.noisy_classifier train``: a classifier of noisy scenes, whose gradient guides.

It sees what `scenes-unet` sees, latents with the noise of a training time and that time, and says which of the 16
classes they are: log p(y | x_t) (Dhariwal & Nichol, 2105.05233, section 4). What it knows at which noise level is kept
in ``noisy_classifier.json``. It is no judge of what it guided: `classifier` is, which shares nothing with it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hasten.models.scenes.adapters import specification
from hasten.models.scenes.classifier import HELD_OUT
from hasten.models.scenes.data import CLASSES
from hasten.models.scenes.subject import subject
from hasten.models.scenes.weights import halved, read, write
from hasten.passes.solvers.schedule import alpha_bar

MODEL = "scenes-unet"
"""Whose process, latents and times it is trained on."""
WEIGHTS = Path(__file__).parent / "noisy_classifier.safetensors"
ACCURACY = WEIGHTS.with_suffix(".json")
STEPS, BATCH, RATE = 2500, 128, 2e-3
LEVELS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
"""The training times at which the accuracy is kept."""


class NoisyClassifier(nn.Module):
    """Latents (B, 12, 16, 16) and times (B,), 0 to 999, to logits of the classes (B, 16).

    Every activation is smooth, for what is wanted of it is its gradient.
    """

    WIDTHS = (12, 48, 64, 96, 96)
    STRIDES = (1, 2, 1, 2)
    EMBEDDING = 64

    def __init__(self) -> None:
        super().__init__()
        sizes = zip(self.WIDTHS, self.WIDTHS[1:], self.STRIDES, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in self.WIDTHS[1:])
        self.time = nn.Linear(self.EMBEDDING, 128)
        self.scales = nn.ModuleList(nn.Linear(128, 2 * b) for b in self.WIDTHS[1:])
        self.head = nn.Linear(self.WIDTHS[-1] * 16, len(CLASSES))

    def forward(self, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Classify a batch."""
        half = self.EMBEDDING // 2
        rates = torch.exp(torch.arange(half, device=times.device) * (-math.log(1000) / half))
        angles = times.float()[:, None] * rates
        told = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)))
        x = latents
        for convolution, norm, scale in zip(self.convolutions, self.norms, self.scales, strict=True):
            gain, shift = scale(told)[:, :, None, None].chunk(2, 1)
            x = F.silu(norm(convolution(x)) * (1 + gain) + shift)
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


def noisy(count: int, seed: int, times: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render ``count`` scenes of ``seed`` with the noise of ``times`` (one, or one each): latents, times, labels."""
    spec = specification(MODEL)
    drawn = subject(spec)
    pixels, labels = drawn.render(count, seed, None)
    image = drawn.latents(torch.from_numpy(pixels), spec["unshuffle"])
    time = torch.as_tensor(times).expand(count)
    bar = torch.from_numpy(alpha_bar(spec["schedule"])).float()[time].view(-1, 1, 1, 1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return bar.sqrt() * image + (1 - bar).sqrt() * noise, time.float(), torch.from_numpy(labels)


def train(steps: int = STEPS, *, batch: int = BATCH, weights: Path = WEIGHTS) -> dict[str, Any]:
    """Train from scratch, save in float16, and keep and return the accuracy on held-out scenes by noise level."""
    torch.manual_seed(0)
    model = NoisyClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        times = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(step))
        latents, time, labels = noisy(batch, 5_000_000 + step, times)
        loss = F.cross_entropy(model(latents, time), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"noisy classifier step {step + 1}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    write(halved(model.state_dict()), weights)
    result = {"training_steps": steps, "batch": batch, "count": 1024, "by_time": accuracy(load(weights), 1024)}
    kept, part = weights.with_suffix(".json"), weights.with_suffix(".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, kept)
    return result


def load(weights: Path = WEIGHTS) -> NoisyClassifier:
    """Return the trained classifier in evaluation mode, in float32."""
    tensors = read(weights, "the classifier of noisy scenes", "hasten.models.scenes.noisy_classifier train")
    model = NoisyClassifier()
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def guide(batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """``grad_x log p(y | x_t)`` as a forward network for ``batch`` pictures, and examples of its inputs."""
    from hasten.passes.fx.gradient import LogProbabilityGradient

    latents, time, labels = noisy(batch, HELD_OUT, 500)
    made = LogProbabilityGradient(load(), latents, time)
    # names and types are those of the model that it guides
    return made.eval(), {"sample": latents, "timestep": time, "guide_labels": labels}


def accuracy(model: NoisyClassifier, count: int) -> dict[str, dict[str, float]]:
    """Classify ``count`` held-out scenes at each of `LEVELS`: the noise level, and the fraction that is right."""
    bars = alpha_bar(specification(MODEL)["schedule"])
    found = {}
    for level in LEVELS:
        latents, time, labels = noisy(count, HELD_OUT + 1, level)
        with torch.no_grad():
            right = (model(latents, time).argmax(1) == labels).float().mean().item()
        found[str(level)] = {"noise": float((1 - bars[level]) ** 0.5), "accuracy": right}
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hasten.models.scenes.noisy_classifier", description=__doc__)
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result = train(args.steps, batch=args.batch)
    for level, found in result["by_time"].items():
        print(f"time {level:>4}, noise {found['noise']:.3f}: {found['accuracy']:.3f} right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
