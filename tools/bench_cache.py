"""``hasten bench MODEL --cache POLICY``: speed against quality of step caches, on a bundled model with trained weights.

Every setting generates the same pictures as the engine that computes every step, from the same noise. Speed is the wall
clock of whole runs against the same engine forced to compute every step, in turns; quality is PSNR and SSIM to those
pictures, and how often the independent classifier names what was asked for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.tools.bench_sweep import GUIDANCE, Panel, adapters, draw, labels_of, right, rounds, thresholds_of
from hasten.tools.console import Console, table
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
    if len(args.steps or [50]) != 1:
        raise UsageError(
            "--steps: a sweep over caches alone has one number of steps; give one, or solvers to sweep over as well"
        )
    found: list[Setting] = []
    for adapter in adapters(args, "--cache"):
        for policy in args.cache:
            found += _curve(adapter, policy, args, console)
    console.document({"settings": [asdict(s) for s in found]})
    console.show(_table(found))
    if args.plot is not None:
        draw(_panels(found), args.plot)
        console.show("", f"wrote {args.plot}")
    return 0


def _curve(adapter: Adapter, policy: str, args: argparse.Namespace, console: Console) -> list[Setting]:
    import tempfile

    from hasten.backends.build import build
    from hasten.backends.step_cache import Caching

    (steps,) = args.steps or [50]
    if (caching := Caching.of(policy)) is not None:
        caching.check_calls(steps)  # before an engine is built that could not run
    with tempfile.TemporaryDirectory(prefix="hasten-bench-") as folder:
        with console.progress(f"building {adapter.name} with {policy}") as tell:
            engine = build(adapter, target=args.cache_target, out=Path(folder) / "engine", cache=policy, progress=tell)
        with console.progress(f"{adapter.name}, {policy}") as tell:
            return _settings(adapter, engine, policy, steps, args, tell)


def _settings(
    adapter: Adapter,
    engine: Engine,
    policy: str,
    steps: int,
    args: argparse.Namespace,
    tell: Callable[[str, float], None],
) -> list[Setting]:
    from hasten.models.scenes.generate import generate

    denoise, labels = CachedDenoise(engine, steps), labels_of(adapter, args.count)
    thresholds = thresholds_of(policy, args.thresholds)

    def run(begin: Callable[[], Any]) -> tuple[torch.Tensor, str]:
        begin()
        pictures = generate(denoise, adapter, labels, steps=steps, guidance=GUIDANCE, seed=args.seed)
        return pictures, denoise.run.mask

    begin: dict[float | str | None, Callable[[], Any]] = {ALL: lambda: denoise.begin("1" * steps)}
    begin |= {t: partial(denoise.begin, threshold=t) for t in thresholds}
    step = denoise.step_seconds(tuple(adapter.example_inputs().values()), 5)
    made, times = rounds({key: partial(run, start) for key, start in begin.items()}, args.rounds, tell)
    whole, _ = made[ALL]
    rows = []
    for key in thresholds:
        pictures, mask = made[key]
        ratios = sorted(a / b for a, b in zip(times[ALL].seconds, times[key].seconds, strict=True))
        computed = mask.count("1")
        reused = step["reused"]["median"] / step["computed"]["median"]
        rows.append(
            Setting(
                model=adapter.name,
                policy=policy,
                threshold=key,
                mask=mask,
                computed=computed,
                steps=steps,
                predicted=steps / (computed + (steps - computed) * reused),
                speedup=statistics.median(ratios),
                p20=ratios[round(0.2 * (len(ratios) - 1))],
                p80=ratios[round(0.8 * (len(ratios) - 1))],
                psnr_db=psnr(whole, pictures),
                ssim=ssim(whole, pictures),
                accuracy=right(pictures, labels),
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


def _panels(settings: Sequence[Setting]) -> list[Panel]:
    """One panel a model, one line a policy: speed to the right, PSNR upwards."""
    made = []
    for model in dict.fromkeys(s.model for s in settings):
        lines: dict[str, list[tuple[float, float]]] = {}
        for s in settings:
            if s.model == model and s.psnr_db is not None:
                lines.setdefault(s.policy.partition(",")[0], []).append((s.speedup, s.psnr_db))
        made.append(Panel(model, "times as fast as computing every step", "PSNR to that, dB", lines))
    return made
