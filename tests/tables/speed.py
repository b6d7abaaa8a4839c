"""Plain Inductor and plain ONNX Runtime against hasten on the same, side by side in one run.

``python tests/tables/speed.py [--rounds N] [--write BENCHMARKS.md] [MODEL …]``. Every round runs each implementation
once, in turn, so that a change of the machine's speed meets all of them; a ratio is taken within a round, and quoted
as median with the 20th and 80th percentile. Above one is faster.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import hasten
from hasten.models import registry
from hasten.models.adapter import Adapter

MODELS = (
    "scenes-unet",
    "scenes-dit",
    "sd15-unet-reduced",
    "sd15-vae-decoder-reduced",
    "dit-xl-2-reduced",
    "flux-dev-reduced",
)
PAIRS = (("hasten inductor", "inductor"), ("hasten aoti", "inductor"), ("hasten onnxruntime", "onnxruntime"))
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
Run = Callable[[], object]


def implementations(adapter: Adapter, folder: Path, threads: int) -> dict[str, Run]:
    """Everything that is compared, compiled and warm."""
    module, inputs = adapter.module(), adapter.example_inputs()
    made: dict[str, Run] = {"eager": lambda: module(**inputs)}
    for name, backend in (("inductor", "inductor"), ("hasten inductor", "hasten")):
        torch._dynamo.reset()
        compiled = torch.compile(adapter.module(), backend=backend)
        made[name] = lambda compiled=compiled: compiled(**inputs)
        made[name]()
    engine = hasten.build(adapter.name, target="aoti:cpu", out=folder / "aoti")
    made["hasten aoti"] = lambda: engine(**inputs)
    made["onnxruntime"] = plain_onnxruntime(adapter, folder, threads)
    session = hasten.build(adapter.name, target="onnxruntime:cpu", out=folder / "onnxruntime")
    arrays = {k: v.numpy() for k, v in inputs.items()}
    made["hasten onnxruntime"] = lambda: session(**arrays)
    return made


def plain_onnxruntime(adapter: Adapter, folder: Path, threads: int) -> Run:
    """What a user gets without us: torch's exporter, then ONNX Runtime with all its optimisations."""
    import onnxruntime

    inputs = adapter.example_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(adapter.module(), (), kwargs=inputs, dynamo=True, opset_version=23, verbose=False)
    program.save(folder / "plain.onnx", external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "plain.onnx"), options, providers=["CPUExecutionProvider"])
    feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    return lambda: session.run(None, feed)


def measure(made: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, one list an implementation, interleaved.

    Before its timed call each waits until the threads of the one before have stopped spinning, and runs once untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        names = list(made) if number % 2 else list(made)[::-1]
        for name in names:
            time.sleep(0.02)
            made[name]()
            started = time.perf_counter()
            made[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    ratios = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    return statistics.median(ratios), float(np.quantile(ratios, 0.2)), float(np.quantile(ratios, 0.8))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="replace the table between the marks of this file")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    lines = [
        "| model | eager ms | Inductor ms | hasten, Inductor ms | hasten, AOTInductor ms | ONNX Runtime ms "
        "| hasten, ONNX Runtime ms | hasten/Inductor | hasten AOTI/Inductor | hasten/ONNX Runtime |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            made = implementations(registry.get(name), Path(folder), args.threads)
            seconds = measure(made, args.rounds)
        ratios = {f"{a} / {b}": ratio(seconds, a, b) for a, b in PAIRS}
        print(json.dumps({"model": name, "seconds": seconds, "ratios": ratios}), flush=True)
        order = ("eager", "inductor", "hasten inductor", "hasten aoti", "onnxruntime", "hasten onnxruntime")
        cells = [f"{statistics.median(seconds[n]) * 1e3:.1f}" for n in order]
        cells += [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in ratios.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    where = f"{processor()}, {args.threads} threads, float32, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "onnxruntime", "diffusers"))
    text = f"{where}; {packages}.\n\n{table}\n"
    print(text, file=sys.stderr)
    if args.write is not None:
        before, _, rest = args.write.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        args.write.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return 0


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return found[0].partition(":")[2].strip() if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
