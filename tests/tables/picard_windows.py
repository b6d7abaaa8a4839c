"""What a sweep of Picard sampling costs beside the network's own call: as one compiled graph, and around the network.

    python tests/tables/picard_windows.py [--models NAME ...] [--windows N ...] [--batches N ...] [--rounds N]
        [--target NAME] [--engines DIR]

Three things take turns on one processor, in a run of 20 steps with guidance and tolerance 0.1: the engine of the
network called as often as there are sweeps, with the same inputs; `picard` around that engine; and the engine of a
`PicardWindow`. Prints one row a case: how much longer than the network alone the two take, and how much longer the
second takes than the third, median of the rounds' ratios (20th to 80th percentile), after a check that both make the
same latents in as many sweeps. Engines are kept in DIR, and built only where they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch
from loops import beyond

import hasten
from hasten.backends.picard_window import PicardWindow
from hasten.models.registry import get
from hasten.models.scenes.generate import initial_noise, solver
from hasten.tools.picard_member import Member, Settings
from hasten.tools.timing import Times, take_turns

STEPS, GUIDANCE, TOLERANCE = 20, 2.0, 0.1


def member(folder: Path, model: str, target: str, pictures: int, window: int, *, compiled: bool) -> Member:
    """What `hasten generate --picard` runs, with an engine for as many pictures."""
    adapter = get(model)
    out = folder / f"{model}-{target.partition(':')[0]}-{pictures}-{window}-{'window' if compiled else 'network'}"
    if not out.exists():
        if compiled:
            width = solver(adapter, STEPS).width
            given = adapter.example_inputs(pictures)
            sweep = PicardWindow(adapter.module(), given, window=window, history=width, guided=True)
            hasten.build(sweep, target=target, out=out, example_kwargs=sweep.examples())
        else:
            hasten.build(dataclasses.replace(adapter, batch=2 * window * pictures), target=target, out=out)
    return Member(
        Settings(
            engine=str(out),
            model=model,
            samples=window * pictures,
            labels=tuple((5 * i) % 16 for i in range(pictures)),
            guidance=GUIDANCE,
            solver=None,
            steps=STEPS,
            window=window,
            tolerance=TOLERANCE,
            acceleration=0,
            processes=1,
            threads=1,
            compiled=compiled,
        )
    )


def measure(folder: Path, model: str, target: str, pictures: int, window: int, rounds: int) -> tuple[int, list[Times]]:
    """The sweeps of a run, and seconds of it: the network alone, `picard` around it, and compiled windows."""
    around, inside = (member(folder, model, target, pictures, window, compiled=c) for c in (False, True))
    noise, inputs = initial_noise(get(model), pictures, 0), get(model).example_inputs(2 * window * pictures)
    expected, found = around.run(noise, []), inside.run(noise, [])
    torch.testing.assert_close(found.result, expected.result, rtol=5e-5, atol=5e-5)
    assert found[1:] == expected[1:]

    def network() -> None:
        for _ in range(found.sweeps):
            around.engine(**inputs)

    return found.sweeps, take_turns([network, lambda: around.run(noise, []), lambda: inside.run(noise, [])], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["scenes-dit", "scenes-unet"])
    parser.add_argument("--windows", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--batches", nargs="*", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", default="onnxruntime:cpu")
    parser.add_argument("--engines", type=Path, default=Path("out/picard-windows"))
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    given.engines.mkdir(parents=True, exist_ok=True)
    print("| model, pictures, window | sweeps | network, ms | `picard` around it | compiled | `picard` to compiled |")
    print("| --- | --- | --- | --- | --- | --- |")
    with torch.no_grad():
        for model in given.models:
            for pictures in given.batches:
                for window in given.windows:
                    case = (given.engines, model, given.target, pictures, window, given.rounds)
                    sweeps, (alone, around, inside) = measure(*case)
                    cells = [_longer(around, alone), _longer(inside, alone), _longer(around, inside)]
                    head = f"{model}, {pictures}, {window} | {sweeps} | {1e3 * alone.median / sweeps:.2f}"
                    print(f"| {head} | {' | '.join(cells)} |", flush=True)


def _longer(one: Times, other: Times) -> str:
    return beyond(Times(tuple(a / b for a, b in zip(one.seconds, other.seconds, strict=True))))


if __name__ == "__main__":
    main()
