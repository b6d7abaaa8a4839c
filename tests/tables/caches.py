"""Step caches beside each other: hasten's, diffusers' hooks and cache-dit on the same weights, noise and steps.

``python tests/tables/caches.py quality|time MODEL … --jsonl FILE`` measures and appends; ``render`` writes the table
and the plot. Quality is PSNR and SSIM to the pictures of the engine that computes every step, and how often the
independent classifier names what was asked for. Time is the wall clock of whole runs, settings in turns, each round
with the same implementation computing every step: an engine for hasten, PyTorch, eager or compiled, for the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cache_peers import FORMS, STEPS, Peer, PeerDenoise, peers
from cache_settings import Own, ratios, settings

import hasten
from hasten.models.adapter import Adapter
from hasten.models.registry import get
from hasten.models.scenes.adapters import specification
from hasten.models.scenes.evaluate import marks
from hasten.models.scenes.generate import generate
from hasten.models.scenes.subject import subject
from hasten.tools.generate_cached import CachedDenoise
from hasten.tools.quality import psnr, ssim

GUIDANCE, SEED = 2.0, 7
UNCACHED = Own("every step computed", "", "mask:bits=" + "1" * STEPS, mask="1" * STEPS)


class Bench:
    """One model, its engines by what they were built with, and its noise and labels."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.adapter: Adapter = replace(get(name), batch=2 * args.batch)
        self.args = args
        self.folder: Path = args.engines
        self.folder.mkdir(parents=True, exist_ok=True)
        self.classes = len(subject(specification(name)).classes)
        output = ",granularity=output,payload=value" if name == "scenes-unet" else ""
        self.uncached = replace(UNCACHED, build=UNCACHED.build + output)

    def engine(self, text: str) -> Any:
        """Built once, then loaded."""
        key = hashlib.sha256(f"{self.args.target} {self.args.batch} {text}".encode()).hexdigest()[:12]
        out = self.folder / f"{self.adapter.name}-{key}"
        if not out.exists():
            hasten.build(self.adapter, target=self.args.target, out=out, cache=text)
        threads = {"threads": self.args.threads} if self.args.target.startswith("onnxruntime") else {}
        return hasten.load(out, **threads)

    def own(self, setting: Own) -> tuple[Callable[..., torch.Tensor], Callable[[], object], Callable[[], int]]:
        """(denoise, what begins a run, how many steps computed)."""
        denoise = CachedDenoise(self.engine(setting.build), STEPS)

        def begin() -> object:
            return denoise.begin(setting.mask, threshold=setting.threshold)

        return denoise, begin, lambda: denoise.run.mask.count("1")

    def peer(
        self, peer: Peer | None, *, form: str
    ) -> tuple[Callable[..., torch.Tensor], Callable[[], object], Callable[[], int | None]]:
        denoise = PeerDenoise(self.adapter, peer, form=form)
        return denoise, denoise.begin, lambda: denoise.computed

    def pictures(self, denoise: Any, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run number ``chunk``, and its labels."""
        labels = [(5 * (self.args.batch * chunk + i)) % self.classes for i in range(self.args.batch)]
        made = generate(denoise, self.adapter, labels, steps=STEPS, guidance=GUIDANCE, seed=SEED + chunk)
        return made, torch.tensor(labels)


def contenders(bench: Bench, args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """What is asked for of one model: a row's first cells, and what makes its denoiser."""
    name = bench.adapter.name
    rows: list[tuple[dict[str, Any], Callable[[], Any]]] = [
        (_cells(name, "hasten", s.method, s.setting, "engine"), lambda s=s: bench.own(s))
        for s in settings(name, STEPS, args.calibrations)
    ]
    found = peers(name, ratios(name, args.calibrations))
    for form in FORMS:
        rows += [
            (_cells(name, p.library, p.method, p.setting, form), lambda p=p, form=form: bench.peer(p, form=form))
            for p in found
        ]
    for cells, make in rows:
        if re.search(args.only, " ".join(map(str, cells.values()))):
            yield cells, make


def _cells(model: str, library: str, method: str, setting: str, form: str) -> dict[str, Any]:
    return {"model": model, "library": library, "method": method, "setting": setting, "form": form}


def quality(bench: Bench, args: argparse.Namespace) -> None:
    """PSNR, SSIM and accuracy of each setting, over ``count`` pictures."""
    chunks = range(args.count // args.batch)
    path = bench.folder / f"{bench.adapter.name}-uncached-{args.count}.pt"
    if not path.exists():
        denoise, begin, _ = bench.own(bench.uncached)
        torch.save(_run(bench, denoise, begin, chunks)[0], path)
    expected = torch.load(path, weights_only=True)
    labels = torch.cat([_labels(bench, c) for c in chunks])
    own = marks(expected, labels)
    key = "all" if "all" in own else "both"
    stop = time.monotonic() + args.seconds
    for cells, make in contenders(bench, args):
        if time.monotonic() > stop:
            return
        if cells["form"] in FORMS[1:] or _known(args.jsonl, "quality", cells, args.count):
            continue
        try:
            denoise, begin, computed = make()
            pictures, counts = _run(bench, denoise, begin, chunks, computed)
        except Exception as error:  # what a library refuses is a finding, not the end of the table
            _append(args.jsonl, {"kind": "quality", **cells, "count": args.count, "error": _said(error)})
            continue
        row = {
            "count": args.count,
            "batch": args.batch,
            "computed": statistics.mean(c for c in counts if c is not None),
            "psnr_db": psnr(expected, pictures),
            "ssim": ssim(expected, pictures),
            "accuracy": marks(pictures, labels)[key],
            "uncached_accuracy": own[key],
        }
        _append(args.jsonl, {"kind": "quality", **cells, **row})


def _run(
    bench: Bench, denoise: Any, begin: Callable[[], object], chunks: Sequence[int], computed: Any = lambda: None
) -> tuple[torch.Tensor, list[Any]]:
    made, counts = [], []
    for chunk in chunks:
        begin()
        made.append(bench.pictures(denoise, chunk)[0])
        counts.append(computed())
    return torch.cat(made), counts


def _labels(bench: Bench, chunk: int) -> torch.Tensor:
    batch = bench.args.batch
    return torch.tensor([(5 * (batch * chunk + i)) % bench.classes for i in range(batch)])


def timed(bench: Bench, args: argparse.Namespace) -> None:
    """Wall clock of each setting against the same implementation uncached, in turns, until ``seconds`` are over."""
    stop = time.monotonic() + args.seconds
    waiting = [(c, m) for c, m in contenders(bench, args) if not _known(args.jsonl, "time", c, None)]
    while waiting and time.monotonic() < stop:
        form = waiting[0][0]["form"]
        group, waiting = waiting[: args.group], waiting[args.group :]
        group, back = [w for w in group if w[0]["form"] == form], [w for w in group if w[0]["form"] != form]
        waiting = [*back, *waiting]
        plain = bench.own(bench.uncached) if form == "engine" else bench.peer(None, form=form)
        made: list[tuple[dict[str, Any], Any]] = []
        for cells, make in group:
            try:
                made.append((cells, make()))
            except Exception as error:  # noqa: PERF203
                _append(args.jsonl, {"kind": "time", **cells, "error": _said(error)})
        _time_group(bench, plain, made, args)


def _time_group(bench: Bench, plain: Any, made: Sequence[tuple[dict[str, Any], Any]], args: argparse.Namespace) -> None:
    seconds: dict[int, list[float]] = {}
    counts: dict[int, int | None] = {}
    errors: dict[int, str] = {}
    for turn in range(args.rounds + 1):  # the first is not timed
        for i, (denoise, begin, computed) in enumerate((plain, *(m for _, m in made))):
            if i in errors:
                continue
            begin()
            began = time.perf_counter()
            try:
                bench.pictures(denoise, 0)
            except Exception as error:
                errors[i] = _said(error)
                continue
            if turn:
                seconds.setdefault(i, []).append(time.perf_counter() - began)
            counts[i] = computed()
    for i, (cells, _) in enumerate(made, 1):
        if i in errors:
            _append(args.jsonl, {"kind": "time", **cells, "error": errors[i]})
            continue
        gains = sorted(a / b for a, b in zip(seconds[0], seconds[i], strict=True))
        row = {
            "computed": counts[i],
            "seconds": statistics.median(seconds[i]),
            "uncached_seconds": statistics.median(seconds[0]),
            "gain": statistics.median(gains),
            "p20": gains[round(0.2 * (len(gains) - 1))],
            "p80": gains[round(0.8 * (len(gains) - 1))],
            "rounds": args.rounds,
            "threads": args.threads,
        }
        _append(args.jsonl, {"kind": "time", **cells, **row})


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def _known(path: Path, kind: str, cells: dict[str, Any], count: int | None) -> bool:
    """Whether a row is in the file already, so that an interrupted table goes on."""
    if not path.exists():
        return False
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return any(
        r["kind"] == kind and all(r[k] == v for k, v in cells.items()) and (count is None or r["count"] == count)
        for r in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "time", "render"))
    parser.add_argument("models", nargs="*", default=["scenes-dit", "scenes-unet"])
    parser.add_argument("--jsonl", type=Path, default=Path("out/caches.jsonl"))
    parser.add_argument("--engines", type=Path, default=Path("out/cache-engines"), help="where engines are kept")
    parser.add_argument("--calibrations", type=Path, default=Path("out/calibrations"))
    parser.add_argument("--target", default="onnxruntime:cpu")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose cells it is found in")
    parser.add_argument("--count", type=int, default=64, help="pictures that quality is judged on")
    parser.add_argument("--batch", type=int, default=8, help="pictures of one run; the model sees twice as many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--group", type=int, default=6, help="settings that are timed in turns with one uncached run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other setting after these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="render: replace the table between the marks of this file")
    parser.add_argument("--plot", type=Path, help="render: draw the curves")
    args = parser.parse_args(argv)
    if args.what == "render":
        from cache_render import render

        return render(args.jsonl, args.write, args.plot)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        for name in args.models:
            {"quality": quality, "time": timed}[args.what](Bench(name, args), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
