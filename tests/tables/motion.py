"""What AdaCache spends on still clips and on moving ones, with and without MoReg.

``python tests/tables/motion.py [--options OPTIONS …] [--count N]``: every clip of scenes-video is a run of its own, so
that each is decided on alone; the same noise is told to be still, slow and fast. Prints the computed steps of 50 by
speed, mean and standard error, and how many of the paired runs spend fewer on the still clip than on the fast one.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import hasten
from hasten.models.registry import get
from hasten.models.scenes.clips import SPEEDS
from hasten.models.scenes.data import CLASSES
from hasten.models.scenes.generate import generate
from hasten.tools.generate_cached import CachedDenoise

STEPS = 50
OPTIONS = ("codebook=30-fast", "codebook=30-fast,window=4/46,pivot=0.08")
"""The reference's, and those of this model, whose motion is far below Open-Sora's."""


def computed(engine: hasten.Engine, count: int) -> dict[str, list[int]]:
    """Computed steps of each clip, by speed; clip i of each speed has the same noise, shape and colour."""
    adapter = replace(get("scenes-video"), batch=2)
    denoise = CachedDenoise(engine, STEPS)
    found: dict[str, list[int]] = {speed: [] for speed in SPEEDS}
    for i in range(count):
        for number, speed in enumerate(SPEEDS):
            denoise.begin()
            label = number * len(CLASSES) + (5 * i) % len(CLASSES)
            generate(denoise, adapter, [label], steps=STEPS, guidance=2.0, seed=100 + i)
            found[speed].append(denoise.run.mask.count("1"))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), metavar="OPTIONS")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--target", default="onnxruntime:cpu")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print("| adacache | moreg | still | slow | fast | fewer on still than on fast |")
    print("| --- | --- | --- | --- | --- | --- |")
    for options in args.options:
        for moreg in ("false", "true"):
            text = f"adacache:{options},moreg={moreg}"
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                adapter = replace(get("scenes-video"), batch=2)
                engine = hasten.build(adapter, target=args.target, out=Path(folder) / "engine", cache=text)
                found = computed(engine, args.count)
            fewer = sum(a < b for a, b in zip(found["still"], found["fast"], strict=True))
            cells = [f"{statistics.mean(n):.1f} ± {_error(n):.1f}" for n in found.values()]
            print(f"| {options} | {moreg} | {' | '.join(cells)} | {fewer} of {args.count} |", flush=True)
            print(json.dumps({"policy": text, "computed": found}), file=sys.stderr, flush=True)
    return 0


def _error(numbers: list[int]) -> float:
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
