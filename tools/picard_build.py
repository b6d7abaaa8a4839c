"""The engines of a Picard run: of the network for some samples at once, and of a whole sweep."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from hasten.backends.build import Progress, build
from hasten.backends.engine import Engine
from hasten.backends.picard_window import PicardWindow
from hasten.models.adapter import Adapter
from hasten.passes.solvers.table import SolverTable


def of_network(
    adapter: Adapter, samples: int, chosen: str, folder: Path, args: argparse.Namespace, tell: Progress
) -> Engine:
    """An engine of the network for so many samples of the sampler."""
    batch = samples * (1 if args.guidance == 1 else 2)
    out = folder / f"{adapter.name}-batch-{batch}"
    wide = dataclasses.replace(adapter, batch=batch)
    return build(wide, target=chosen, out=out, overwrite=True, expect=args.expect, progress=tell)


def of_window(
    adapter: Adapter,
    pictures: int,
    window: int,
    table: SolverTable,
    chosen: str,
    folder: Path,
    args: argparse.Namespace,
    tell: Progress,
) -> Engine:
    """An engine of a whole sweep over the window."""
    sweep = PicardWindow(
        adapter.module(),
        adapter.example_inputs(pictures),
        window=window,
        history=table.width,
        guided=args.guidance != 1,
        noise=bool(table.noisy),
    )
    out = folder / f"{adapter.name}-window-{window}-batch-{pictures}"
    given = {"example_kwargs": sweep.examples(), "expect": args.expect}
    return build(sweep, target=chosen, out=out, overwrite=True, progress=tell, **given)
