"""Fewest evaluations of the network that reach 95 % of 250-step DDIM's quality, for every solver, on bundled models.

    python tests/tables/solver_quality.py solvers [scenes-unet scenes-dit]
    python tests/tables/solver_quality.py guided
    python tests/tables/solver_quality.py caf [--weights FILE]
    python tests/tables/solver_quality.py render --write BENCHMARKS.md --plot tests/tables/solver_quality.png

Quality is measured twice. *Right*: the part of the pictures whose shape and colour the independent classifier names as
asked; 95 % of it is 0.95 times that of 250 steps of DDIM (Euler's method for a flow). *Fidelity*: one minus the rms
difference to the fine solution of the same equation from the same noise, 125 steps of DPM-Solver++(2M), in parts of
that solution's rms; 95 % of it is 0.95 times that of 250 steps of DDIM. It is told as PSNR, for values from -1 to 1.
Solvers that add noise make other pictures on purpose, and are judged by the first alone. There is no guidance: the
models are told the class, and that is all.

``guided`` compares classifier guidance of `scenes-unet`, which is told no class: plain (unsplit) with DDIM and PLMS,
LTSP and STSP. ``caf`` compares constant acceleration flow with DDIM and Euler's method at equal numbers of evaluations.
Raw rows go to ``out/solver_quality.jsonl``; a run that was stopped goes on. All run in engines with the loop inside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.backends.build import build, load
from hasten.backends.sampling import Sampling, Second
from hasten.errors import UsageError
from hasten.models.processes import process_of
from hasten.models.registry import get
from hasten.models.scenes import caf, noisy_classifier
from hasten.models.scenes.adapters import specification
from hasten.models.scenes.evaluate import marks
from hasten.models.scenes.subject import subject
from hasten.models.scenes.train_caf import GUIDANCE
from hasten.passes.solvers import catalog
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.table import SolverTable
from hasten.tools.generate_loop import LoopDenoise

BATCH = 16
EVALUATIONS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30)
ENOUGH = 10
"""More evaluations than these are taken only where a solver has not reached both marks."""
SHARE = 0.95
FINE, FINE_STEPS, COARSE_STEPS, STEPS = "dpm++2m:compat=none", 125, 50, 250
TIMES = "spacing=trailing,end=zero,compat=none"
LABELS = {
    f"plms:{TIMES}": "plms",
    f"pndm:{TIMES}": "pndm",
    f"ddim:{TIMES}": "ddim",
    "unipc:compat=none,order=3": "unipc, order 3",
}
SOLVERS = (
    f"ddim:{TIMES}",
    f"plms:{TIMES}",
    f"pndm:{TIMES}",
    "flow-euler:compat=none",
    *(f"{n}:compat=none" for n in ("dpm++2m", "dpm++3m", "dpm++2m-karras", "dpm++2m-sde", "dpm-2m", "dpm-3m")),
    *(f"{n}:compat=none" for n in ("dpm++2s", "dpm++3s", "unipc")),
    "unipc:compat=none,order=3",
    *(f"{n}:compat=none" for n in ("deis", "lms", "euler", "euler-ancestral", "heun")),
)
"""As published; all on times from the noisiest on, so that all solve one equation. `ipndm` has its own schedule."""
WEIGHTS = {10: (4.0, 8.0, 16.0), 20: (8.0,)}
"""The weights of the guide at each number of steps."""
PLACE = "spacing=leading,offset=1"
"""Where guided solvers begin: the squared cosine's last level has 5e-5 of signal, and guiding there divides by it."""
GUIDED = {
    "ddim, not split": "guided:solver=ddim:spacing=leading/offset=1/compat=none",
    "plms, not split": "guided:solver=plms:spacing=leading/offset=1/compat=none",
    "ltsp, order 4": f"ltsp:order=4,{PLACE}",
    "stsp, order 4": f"stsp:order=4,{PLACE}",
}
CAF_STEPS = (1, 2, 4)


class Runs:
    """One model's sampler in an engine, and the rows that are known of it."""

    def __init__(self, name: str, args: argparse.Namespace, *, guided: bool = False, scale: float = 1.0) -> None:
        self.name, self.args, self.scale = name, args, scale
        self.stem = f"{name}{'-guided' if guided else ''}{f'-{scale:g}' if scale != 1 else ''}"
        self.process = Process.of(process_of(name) or {})
        self.drawn, self.unshuffle = subject(specification(name)), specification(name)["unshuffle"]
        self.label = torch.arange(args.count) % len(self.drawn.classes)
        adapter = dataclasses.replace(get(name), batch=BATCH if scale == 1 else 2 * BATCH)
        folder = args.engines / self.stem
        if not folder.exists():
            options: dict[str, Any] = {"rows": STEPS, "noise": "seed"}
            if guided:
                second = Second(*noisy_classifier.guide(BATCH))
                sampling = Sampling(GUIDED["stsp, order 4"], second=second, **options)
            else:
                sampling = Sampling(guidance=scale, **options)
            build(adapter, target=args.target, out=folder, sampling=sampling)
        self.denoise = LoopDenoise(load(folder), adapter)

    def pictures(self, table: SolverTable, count: int | None = None) -> torch.Tensor:
        """So many pictures, classes in turn, in [-1, 1]; chunk i from the noise of seed i."""
        made = [
            self.denoise.generate(part, solver=table, seed=i)
            for i, part in enumerate(self.label[: count or self.args.count].split(BATCH))
        ]
        return torch.cat(made)

    def judged(self, pictures: torch.Tensor) -> float:
        found = marks(pictures, self.label[: len(pictures)])
        return found["all"] if "all" in found else found["both"]

    def solution(self) -> torch.Tensor:
        """The fine solution of the first chunk, made once; in fewer steps where it is for coarse solvers alone."""
        path = self.args.engines / f"{self.stem}-fine.pt"
        if not path.exists():
            steps = FINE_STEPS if self.scale == 1 else COARSE_STEPS
            torch.save(self.pictures(catalog.build(FINE, self.process, steps), BATCH), path)
        return torch.load(path, weights_only=True)


def psnr(pictures: torch.Tensor, solution: torch.Tensor) -> float:
    """Decibels, of as many pictures together as the solution has; values are from -1 to 1."""
    error = (pictures[: len(solution)] - solution).double().square().mean().item()
    return float(10 * torch.log10(torch.tensor(4 / max(error, 1e-12))))


def level(decibels: float, rms: float) -> float:
    """The PSNR at which fidelity is `SHARE` of what it is at ``decibels``; ``rms`` is that of the solution."""
    fidelity = 1 - 2 * 10 ** (-decibels / 20) / rms
    return float(20 * np.log10(2 / (rms * (1 - SHARE * fidelity))))


def table_at(text: str, process: Process, evaluations: int) -> SolverTable | None:
    """The table of most steps that has at most ``evaluations`` rows; None where there is none."""
    for steps in range(evaluations, 0, -1):
        try:
            table = catalog.build(text, process, steps)
        except UsageError:
            continue  # some need more steps, or cannot end so
        if len(table) <= evaluations:
            return table
    return None


def tables(process: Process) -> Iterator[tuple[str, list[SolverTable]]]:
    """Every solver that applies to the process, with its tables of different numbers of evaluations."""
    for text in SOLVERS:
        found: dict[int, SolverTable] = {}
        for evaluations in EVALUATIONS:
            table = table_at(text, process, evaluations)
            if table is not None:
                found[len(table)] = table
        if found:
            yield text, list(found.values())


def solvers(name: str, args: argparse.Namespace) -> None:
    """Both measures of every solver at every number of evaluations."""
    runs = Runs(name, args)
    solution = runs.solution()
    plain = "flow-euler:compat=none" if runs.process.is_flow else f"ddim:{TIMES}"
    cells = {"kind": "solvers", "model": name}
    if not known(args.jsonl, cells | {"solver": plain, "evaluations": STEPS}):
        note(args.jsonl, cells | row(runs, plain, catalog.build(plain, runs.process, STEPS), solution, args.count))
    first = next(r for r in read(args.jsonl) if same(r, cells | {"solver": plain, "evaluations": STEPS}))
    rms = solution.square().mean().sqrt().item()
    wanted = {"right": SHARE * first["right"], "psnr_db": level(first["psnr_db"], rms)}
    if not known(args.jsonl, {"kind": "marks", "model": name}):
        note(args.jsonl, {"kind": "marks", "model": name, "rms": rms, **wanted})
    for text, found in tables(runs.process):
        reached = {"right": False, "psnr_db": bool(found[0].noisy)}
        for table in found:
            if len(table) > args.most or (len(table) > ENOUGH and all(reached.values())):
                break
            key = cells | {"solver": text, "evaluations": len(table)}
            if not known(args.jsonl, key):
                # what is right already is seen no better by more pictures
                count = BATCH if reached["right"] else args.count
                note(args.jsonl, cells | row(runs, text, table, solution, count))
            got = next(r for r in read(args.jsonl) if same(r, key))
            reached = {m: r or (got[m] or 0) >= wanted[m] for m, r in reached.items()}


def row(runs: Runs, text: str, table: SolverTable, solution: torch.Tensor, count: int) -> dict[str, Any]:
    began = time.perf_counter()
    pictures = runs.pictures(table, count)
    return {
        "count": count,
        "solver": text,
        "evaluations": len(table),
        "right": runs.judged(pictures),
        "psnr_db": None if table.noisy else psnr(pictures, solution),
        "seconds": time.perf_counter() - began,
    }


def guided(args: argparse.Namespace) -> None:
    """Accuracy of classifier guidance, split and not."""
    runs = Runs(noisy_classifier.MODEL, args, guided=True)
    for steps, weights in WEIGHTS.items():
        for label, text in GUIDED.items():
            for weight in (0.0, *weights):
                if weight == 0 and (label != "ddim, not split" or steps > 10):
                    continue
                cells = {"kind": "guided", "model": runs.name, "count": args.count, "method": label}
                cells |= {"steps": steps, "weight": weight}
                if known(args.jsonl, cells):
                    continue
                table = catalog.build(f"{text},weight={weight}", runs.process, steps)
                asked = {n: int((table.network == i).sum()) for i, n in enumerate(("network", "guide"))}
                note(args.jsonl, cells | asked | {"right": runs.judged(runs.pictures(table))})


def constant_acceleration(args: argparse.Namespace) -> None:
    """CAF beside the plain solvers, at the same number of evaluations and from the same noise.

    Those are guided, which CAF learnt from its pairs: an evaluation of theirs is two calls of the network.
    """
    networks = caf.load(args.weights)
    both = {name: Runs(name, args, scale=GUIDANCE) for name in ("scenes-dit", "scenes-unet")}
    dit = both["scenes-dit"]
    for steps in CAF_STEPS:
        cells = {"kind": "caf", "count": args.count, "evaluations": steps + 1}
        if not known(args.jsonl, cells | {"method": "caf"}):
            made = [caf.generate(networks, part, steps=steps, seed=i) for i, part in enumerate(dit.label.split(BATCH))]
            note(args.jsonl, cells | {"method": "caf"} | compared(dit, torch.cat(made)))
        for name, text in (
            ("scenes-dit", "flow-euler:compat=none"),
            ("scenes-dit", "dpm++2m:compat=none"),
            ("scenes-unet", f"ddim:{TIMES}"),
        ):
            key = cells | {"method": f"{name} {text}"}
            if not known(args.jsonl, key):
                table = catalog.build(text, both[name].process, steps + 1)
                note(args.jsonl, key | compared(both[name], both[name].pictures(table)))


def compared(runs: Runs, pictures: torch.Tensor) -> dict[str, float]:
    return {"right": runs.judged(pictures), "psnr_db": psnr(pictures, runs.solution())}


def note(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def same(row: dict[str, Any], cells: dict[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in cells.items())


def known(path: Path, cells: dict[str, Any]) -> bool:
    """Whether a row is in the file already, so that an interrupted table goes on."""
    return any(same(r, cells) for r in read(path))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("solvers", "guided", "caf", "render"))
    parser.add_argument("models", nargs="*", default=["scenes-unet", "scenes-dit"], help="solvers: also scenes-video")
    parser.add_argument("--jsonl", type=Path, default=Path("out/solver_quality.jsonl"))
    parser.add_argument("--engines", type=Path, default=Path("out/solver-engines"), help="where engines are kept")
    parser.add_argument("--target", default="onnxruntime:cpu")
    parser.add_argument("--count", type=int, default=64, help="pictures that quality is judged on")
    parser.add_argument(
        "--most", type=int, default=EVALUATIONS[-1], help="solvers: take no more evaluations than these"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, default=caf.WEIGHTS, help="caf: of the networks")
    parser.add_argument("--write", type=Path, help="render: replace the tables between the marks of this file")
    parser.add_argument("--plot", type=Path, help="render: draw the curves")
    args = parser.parse_args(argv)
    if args.what == "render":
        from solver_quality_render import render

        return render(args.jsonl, args.write, args.plot)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    args.engines.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if args.what == "solvers":
            for name in args.models:
                solvers(name, args)
        else:
            {"guided": guided, "caf": constant_acceleration}[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
