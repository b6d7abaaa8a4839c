"""What a step of a sampler costs beside the network's own call: the loop in the engine, and a Python loop.

    python tests/tables/loops.py [--models NAME ...] [--targets NAME ...] [--batches N ...] [--rounds N] [--threads N]
        [--engines DIR]

Three things take turns, 20 steps each: the engine of one step called 20 times with the same inputs, which is the
network alone; a Python loop over that engine (`passes.solvers.sample`, guidance as a batch of twice the pictures); and
the engine that holds the loop. All have as many threads as processors, one unless told. Prints one row a case: how much
longer than the network alone the two take, median of the rounds' ratios (20th to 80th percentile), after a check that
both make the same latents. Engines are kept in DIR, and built only where they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch

import hasten
from hasten.backends.engine import Engine
from hasten.models.processes import process_of
from hasten.models.registry import get
from hasten.models.scenes.generate import initial_noise
from hasten.passes.solvers import catalog
from hasten.passes.solvers.sample import sample
from hasten.tools.generate_loop import LoopDenoise
from hasten.tools.timing import Times, take_turns

STEPS, GUIDANCE = 20, 2.0


def engines(folder: Path, model: str, target: str, pictures: int, threads: int) -> tuple[Engine, Engine]:
    """The engine of one step and the one with the loop, for as many pictures."""
    adapter = dataclasses.replace(get(model), batch=2 * pictures)
    made = []
    for kind, sampling in (("step", None), ("loop", hasten.Sampling(steps=STEPS, guidance=GUIDANCE))):
        out = folder / f"{model}-{target.partition(':')[0]}-{pictures}-{kind}"
        if not out.exists():
            hasten.build(adapter, target=target, out=out, sampling=sampling)
        # ONNX Runtime would place a thread on every processor, whatever this process is bound to
        made.append(hasten.load(out, threads=threads if target.startswith("onnxruntime") else None))
    return made[0], made[1]


def measure(
    folder: Path, model: str, target: str, pictures: int, rounds: int, threads: int
) -> tuple[Times, list[Times]]:
    """Seconds of a step of the network alone; and of both loops in parts of that, round by round."""
    step, whole = engines(folder, model, target, pictures, threads)
    adapter = dataclasses.replace(get(model), batch=2 * pictures)
    labels = [(5 * i) % 16 for i in range(pictures)]
    inner = LoopDenoise(whole, adapter)
    condition = inner.subject.condition(torch.tensor(labels + [inner.subject.null_class] * pictures))
    names = [t.name for t in step.inputs]
    inputs = dict(adapter.example_inputs())
    table = catalog.build(whole.manifest.loop["solver"], process_of(model) or {}, STEPS)
    noise = initial_noise(adapter, pictures, 0)

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        given = (torch.cat([x, x]), torch.full((2 * pictures,), time), condition)
        told, untold = next(iter(step(**dict(zip(names, given, strict=True))).values())).chunk(2)
        return untold + GUIDANCE * (told - untold)

    def network() -> None:
        for _ in range(STEPS):
            step(**inputs)

    calls = (network, lambda: sample(denoise, table, noise), lambda: inner.sample(labels, latents=noise).latents)
    _, expected, found = (call() for call in calls)
    torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)
    alone, *loops = take_turns(calls, rounds)
    parts = [Times(tuple(b / a for a, b in zip(alone.seconds, t.seconds, strict=True))) for t in loops]
    return Times(tuple(s / STEPS for s in alone.seconds)), parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["scenes-unet", "scenes-dit"])
    parser.add_argument("--targets", nargs="*", default=["aoti:cpu", "onnxruntime:cpu"])
    parser.add_argument("--batches", nargs="*", type=int, default=[2, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", type=Path, default=Path("out/loops"))
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    torch.set_num_threads(given.threads)
    given.engines.mkdir(parents=True, exist_ok=True)
    print(
        "| model, target, pictures | network, ms | the loop in the engine | a Python loop over an engine of one step |"
    )
    print("| --- | --- | --- | --- |")
    with torch.no_grad():
        for model in given.models:
            for target in given.targets:
                for pictures in given.batches:
                    alone, (python, inner) = measure(
                        given.engines, model, target, pictures, given.rounds, given.threads
                    )
                    cells = (beyond(inner), beyond(python))
                    print(
                        f"| {model}, {target}, {pictures} | {1e3 * alone.median:.2f} | {' | '.join(cells)} |",
                        flush=True,
                    )


def beyond(part: Times) -> str:
    """How much longer, of the ratios of a case's rounds: median (20th to 80th percentile)."""
    median, low, high = (100 * (q - 1) for q in (part.median, part.quantile(0.2), part.quantile(0.8)))
    return f"{median:.1f} % ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
