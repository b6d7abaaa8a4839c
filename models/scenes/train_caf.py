"""``python -m hasten.models.scenes.train_caf``: train constant acceleration flow on `scenes` (Park et al., 2411.00322).

First pairs of noise and picture are made with the bundled `scenes-dit` by a deterministic solver (reflow, Liu et al.,
2209.03003), guided, so that the new networks need no guidance; they are kept in the run's folder. Then both networks
learn at once: the velocity ``h (x_1 - x_0)`` at the noise, and for the way back at the picture; and the acceleration on
the way that the predicted velocity gives, which it is told (the authors' initial velocity conditioning). Every batch is
a function of its step number alone. The mean of the weights is saved, in float16.

On one core the pairs take about eight minutes and the steps a quarter of an hour.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.errors import UsageError
from hasten.models.processes import process_of
from hasten.models.registry import get
from hasten.models.scenes.caf import TEACHER, WEIGHTS, H, backwards, untrained
from hasten.models.scenes.data import CLASSES
from hasten.models.scenes.generate import Denoise, generate, initial_noise
from hasten.models.scenes.weights import halved, write
from hasten.passes.solvers import catalog

SOLVER, EVALUATIONS, GUIDANCE = "dpm++2m", 12, 2.0
PAIRS, STEPS, BATCH, RATE = 3424, 800, 32, 5e-4
"""What the figures of BENCHMARKS.md were trained with."""
FIRST_SEED = 40_000
"""Chunks of pairs have seeds of their own from here on, which no picture that is judged has."""
CHUNK = 32
INVERTED = 0.25
"""The part of a batch on which the velocity is learnt at the picture."""
DECAY = 0.99


def pairs(count: int, path: Path, *, denoise: Denoise | None = None) -> dict[str, torch.Tensor]:
    """Noise and picture (N, 3, 32, 32) float16 and label (N,), classes in turn; going on from ``path``."""
    found = load_file(path) if path.is_file() else {}
    adapter = get(TEACHER)
    denoise = denoise or adapter.module()
    table = catalog.build(SOLVER, process_of(TEACHER) or {}, EVALUATIONS)
    while (done := len(found.get("label", ()))) < count:
        label = torch.arange(done, done + CHUNK) % len(CLASSES)
        seed = FIRST_SEED + done // CHUNK
        picture = generate(denoise, adapter, label, guidance=GUIDANCE, seed=seed, table=table)
        made = {"noise": initial_noise(adapter, CHUNK, seed).half(), "picture": picture.half(), "label": label}
        found = {name: torch.cat([found[name], new]) if found else new for name, new in made.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write(found, path)
        print(f"pairs {done + CHUNK}/{count}", file=sys.stderr, flush=True)
    return {name: tensor[:count] for name, tensor in found.items()}


def losses_at(
    model: nn.Module, known: dict[str, torch.Tensor], step: int, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of velocity and acceleration on batch ``step``, both in terms of ``x_0 - x_1``.

    A Huber loss: an edge that is somewhere is rather put somewhere than blurred.
    """
    rng = torch.Generator().manual_seed(step)
    chosen = torch.randint(0, len(known["label"]), (batch,), generator=rng)
    x0, x1, label = known["noise"][chosen].float(), known["picture"][chosen].float(), known["label"][chosen]
    # scenes seen in a mirror are scenes, and what mirrors the noise may mirror the picture
    mirrored = (torch.rand(batch, generator=rng) < 0.5).view(-1, 1, 1, 1)
    x0, x1 = torch.where(mirrored, x0.flip(3), x0), torch.where(mirrored, x1.flip(3), x1)
    target = x0 - x1
    end = (torch.arange(batch) < round(INVERTED * batch)).float()
    at_end = end.view(-1, 1, 1, 1)
    start = torch.where(at_end > 0, x1, x0)
    # near the noise, where one or two steps begin, more often
    time = torch.rand(batch, generator=rng) ** 2
    t = time.view(-1, 1, 1, 1)
    # Of sequences as short as these, PyTorch's plain attention has the faster backward on a CPU.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        first = backwards(model, start, torch.zeros_like(start), end, label).float()
        velocity = -H * first.detach()
        along = (1 - t * t) * x0 + t * t * x1 + velocity * (t - t * t)
        second = backwards(model, along, velocity, time, label).float()
    return F.huber_loss(first, target, delta=0.2), F.huber_loss(second, target, delta=0.2)


def train(
    known: dict[str, torch.Tensor],
    steps: int,
    *,
    batch: int = BATCH,
    rate: float = RATE,
    model: nn.Module | None = None,
    weights: Path = WEIGHTS,
) -> Path:
    """Train ``model`` (the bundled weights' unless given) on the pairs, and save the mean of its weights."""
    if not len(known["label"]):
        raise UsageError("train_caf: there are no pairs to learn from; give --pairs of 32 or more")
    model = (model or untrained()).requires_grad_(True)
    mean = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.99))
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        velocity, acceleration = losses_at(model, known, step, batch)
        optimizer.zero_grad()
        (velocity + acceleration).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                mean[key].lerp_(value, 1 - decay)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            said = f"velocity {velocity.item():.4f} acceleration {acceleration.item():.4f}"
            print(f"caf step {step + 1}/{steps} {said}", file=sys.stderr, flush=True)
    return write(halved(mean), weights)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hasten.models.scenes.train_caf", description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE, help="peak learning rate")
    parser.add_argument("--run", type=Path, default=Path("runs/scenes"), help="where the pairs are kept")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the result goes")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    known = pairs(args.pairs, args.run / "caf_pairs.safetensors")
    print(train(known, args.steps, batch=args.batch, rate=args.rate, weights=args.weights))
    return 0


if __name__ == "__main__":
    sys.exit(main())
