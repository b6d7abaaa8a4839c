"""``python -m hasten.models.scenes.evaluate unet|dit|video``: how many pictures show what was asked for.

The independent classifier judges generated pictures and freshly rendered ones with the same labels; of clips, their
motion is measured besides. What comes of it is kept in ``quality.json``, next to the weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hasten.models.registry import get
from hasten.models.scenes import classifier, motion
from hasten.models.scenes.adapters import specification
from hasten.models.scenes.data import COLOURS
from hasten.models.scenes.generate import Denoise, generate
from hasten.models.scenes.subject import subject

FOLDER = Path(__file__).parent
QUALITY = FOLDER / "quality.json"
CHUNK = 32


def evaluate(
    name: str,
    *,
    steps: int = 50,
    guidance: float = 2.0,
    count: int = 256,
    seed: int = 0,
    denoise: Denoise | None = None,
) -> dict[str, Any]:
    """Judge ``count`` outputs of ``scenes-<name>``, classes in turn; ``denoise`` is its module unless given."""
    adapter = get(f"scenes-{name}")
    denoise = denoise or adapter.module()
    drawn = subject(specification(adapter.name))
    label = torch.arange(count) % len(drawn.classes)
    chunks = [
        generate(denoise, adapter, part, steps=steps, guidance=guidance, seed=seed + i)
        for i, part in enumerate(label.split(CHUNK))
    ]
    real, _ = drawn.render(count, classifier.HELD_OUT + 1, label.numpy())
    return {
        "generated": marks(torch.cat(chunks), label),
        "real": marks(torch.from_numpy(real), label),
        "steps": steps,
        "guidance": guidance,
        "count": count,
        "seed": seed,
        "training_steps": training_steps(name),
    }


def marks(pixels: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """Judge pictures (B, 3, 32, 32) or clips (B, F, 3, 32, 32), as `classifier.accuracy` and `motion.accuracy` do."""
    judge = classifier.load()
    if pixels.ndim == 5:
        return motion.accuracy(judge, pixels, label)
    return classifier.accuracy(judge, pixels, label // len(COLOURS), label % len(COLOURS))


def training_steps(name: str) -> int | None:
    """Return the last step of a model's loss curve, or None where the curve is not there."""
    path = FOLDER / f"{name}_loss.csv"
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        return int(list(csv.DictReader(file))[-1]["step"])


def keep(name: str, result: dict[str, Any], path: Path = QUALITY) -> None:
    """Replace one model's entry in the file of results."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[f"scenes-{name}"] = result
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
    os.replace(part, path)


def table(name: str, result: dict[str, Any]) -> str:
    """Spell a result as a table."""
    made = "clips" if "speed" in result["real"] else "pictures"
    lines = [f"scenes-{name}: {result['count']} {made}, {result['steps']} steps, guidance {result['guidance']:g}"]
    lines += [f"{'':10}" + "".join(f"{mark:>8}" for mark in result["real"])]
    for kind in ("generated", "real"):
        lines.append(f"{kind:10}" + "".join(f"{value:8.3f}" for value in result[kind].values()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hasten.models.scenes.evaluate", description=__doc__)
    parser.add_argument("model", choices=["unet", "dit", "video"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    options = {"steps": args.steps, "guidance": args.guidance, "count": args.count, "seed": args.seed}
    result = evaluate(args.model, **options)
    keep(args.model, result)
    print(table(args.model, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
