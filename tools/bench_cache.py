"""``hasten bench MODEL --cache POLICY``: speed against quality of step caches, on a bundled model with trained weights.

Every setting generates the same pictures as the engine that computes every step, from the same noise. Speed is the wall
clock of whole runs against the same engine forced to compute every step, in turns; quality is PSNR and SSIM to those
pictures, and how often the independent classifier names what was asked for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError, nearest, need
from hasten.tools.console import Console, table
from hasten.tools.files import replace as replace_file
from hasten.tools.generate_cached import CachedDenoise
from hasten.tools.quality import psnr, ssim

if TYPE_CHECKING:
    import torch

    from hasten.backends.engine import Engine
    from hasten.models.adapter import Adapter

ALL = "every step computed"


@dataclass(frozen=True)
class Setting:
    """One point of a curve. ``speedup`` is measured (median, 20th and 80th percentile), over computing every step."""

    model: str
    policy: str
    threshold: float | None
    mask: str
    computed: int
    steps: int
    predicted: float
    speedup: float
    p20: float
    p80: float
    psnr_db: float | None
    ssim: float
    accuracy: float
    state_bytes: int


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure every policy at every threshold, show, draw."""
    from hasten.models.registry import BUNDLED, get

    if args.plot is not None:
        need("matplotlib", extra="bench")
    found: list[Setting] = []
    for name in args.sources:
        if name not in BUNDLED:
            raise UsageError(
                f"--cache measures quality on trained models, and {name!r} is none; there are {', '.join(BUNDLED)}."
                f"{nearest(name, BUNDLED)}"
            )
    if not args.sources:
        raise UsageError("--cache: name a bundled model, such as scenes-dit")
    for name in args.sources:
        adapter = replace(get(name), batch=2 * args.count)
        for policy in args.cache:
            found += _curve(adapter, policy, args, console)
    console.document({"settings": [asdict(s) for s in found]})
    console.show(_table(found))
    if args.plot is not None:
        _draw(found, args.plot)
        console.show("", f"wrote {args.plot}")
    return 0


def _curve(adapter: Adapter, policy: str, args: argparse.Namespace, console: Console) -> list[Setting]:
    import tempfile

    from hasten.backends.build import build
    from hasten.backends.step_cache import Caching
    from hasten.passes.steps.catalog import canonical

    if (caching := Caching.of(policy)) is not None:
        caching.check_calls(args.steps)  # before an engine is built that could not run
    thresholds: Sequence[float | None] = args.thresholds or [None]
    if "threshold=" not in canonical(policy):
        thresholds = [None]
    with tempfile.TemporaryDirectory(prefix="hasten-bench-") as folder:
        with console.progress(f"building {adapter.name} with {policy}") as tell:
            engine = build(adapter, target=args.cache_target, out=Path(folder) / "engine", cache=policy, progress=tell)
        with console.progress(f"{adapter.name}, {policy}") as tell:
            return _settings(adapter, engine, policy, thresholds, args, tell)


def _settings(
    adapter: Adapter,
    engine: Engine,
    policy: str,
    thresholds: Sequence[float | None],
    args: argparse.Namespace,
    tell: Callable[[str, float], None],
) -> list[Setting]:
    import torch

    from hasten.models.scenes.adapters import specification
    from hasten.models.scenes.evaluate import marks
    from hasten.models.scenes.generate import generate
    from hasten.models.scenes.subject import subject

    denoise, steps = CachedDenoise(engine, args.steps), args.steps
    classes = len(subject(specification(adapter.name)).classes)
    labels = [(5 * i) % classes for i in range(args.count)]
    begin: dict[float | str | None, Callable[[], Any]] = {ALL: lambda: denoise.begin("1" * steps)}
    begin |= {t: partial(denoise.begin, threshold=t) for t in thresholds}
    pictures: dict[float | str | None, torch.Tensor] = {}
    masks: dict[float | str | None, str] = {}
    seconds: dict[float | str | None, list[float]] = {key: [] for key in begin}
    step = denoise.step_seconds(tuple(adapter.example_inputs().values()), 5)
    for turn in range(args.rounds + 1):  # the first is not timed
        for key, start in begin.items():
            tell(f"round {turn} of {args.rounds}", turn / (args.rounds + 1))
            start()
            began = time.perf_counter()
            pictures[key] = generate(denoise, adapter, labels, steps=steps, guidance=2.0, seed=args.seed)
            if turn:
                seconds[key].append(time.perf_counter() - began)
            masks[key] = denoise.run.mask
    rows = []
    for key in thresholds:
        ratios = sorted(a / b for a, b in zip(seconds[ALL], seconds[key], strict=True))
        computed = masks[key].count("1")
        reused = step["reused"]["median"] / step["computed"]["median"]
        rows.append(
            Setting(
                model=adapter.name,
                policy=policy,
                threshold=key,
                mask=masks[key],
                computed=computed,
                steps=steps,
                predicted=steps / (computed + (steps - computed) * reused),
                speedup=statistics.median(ratios),
                p20=ratios[round(0.2 * (len(ratios) - 1))],
                p80=ratios[round(0.8 * (len(ratios) - 1))],
                psnr_db=psnr(pictures[ALL], pictures[key]),
                ssim=ssim(pictures[ALL], pictures[key]),
                accuracy=marks(pictures[key], torch.tensor(labels))["both"],
                state_bytes=sum(s["bytes"] for s in engine.manifest.state),
            )
        )
    return rows


def _table(settings: Sequence[Setting]) -> Any:
    shown = table(
        "model", "policy", ">threshold", ">computed", ">predicted", ">faster", ">p20 to p80", ">PSNR", ">SSIM", ">right"
    )
    for s in settings:
        shown.add_row(
            s.model,
            s.policy,
            "" if s.threshold is None else f"{s.threshold:g}",
            f"{s.computed} of {s.steps}",
            f"{s.predicted:.2f}x",
            f"{s.speedup:.2f}x",
            f"{s.p20:.2f}x to {s.p80:.2f}x",
            "identical" if s.psnr_db is None else f"{s.psnr_db:.1f} dB",
            f"{s.ssim:.3f}",
            f"{s.accuracy:.1%}",
        )
    return shown


def _draw(settings: Sequence[Setting], path: Path) -> None:
    """One panel a model, one line a policy: speed to the right, PSNR upwards."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(s.model for s in settings))
    figure = Figure(figsize=(6 * len(models), 4.5), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for policy in dict.fromkeys(s.policy for s in settings if s.model == model):
            points = [s for s in settings if s.model == model and s.policy == policy and s.psnr_db is not None]
            points.sort(key=lambda s: s.speedup)
            panel.plot([s.speedup for s in points], [s.psnr_db for s in points], "o-", label=policy.partition(",")[0])
        panel.set(title=model, xlabel="times as fast as computing every step", ylabel="PSNR to that, dB")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=150))
