"""Where a sampler starts that is given a picture and not noise alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.table import SolverTable

COLUMNS = ("time", "input", "A", "B", "C", "cy", "cf", "clean", "direct", "condition", "level", "network")
"""What a table says row by row; ``level`` has one more, the result's."""


class Begun(NamedTuple):
    """Rows from ``row`` on are done by ``table``, which begins with ``scale * (signal * picture + noise * z)``."""

    row: int
    table: SolverTable
    signal: float
    noise: float
    scale: float


def levels(process: Process, times: Array) -> Array:
    """Signal and noise level of what the network sees at ``times`` (M,), (M, 2); between training times, of both.

    That is the training's own. A solver may see others at the same times, and its table then says so: `seen`.
    """
    if process.bars is None:
        noise = times / process.train_steps
        noise = 1 - noise if process.inverted else noise
        return np.stack([1 - noise, noise], axis=1)
    bars = np.interp(times, np.arange(len(process.bars)), process.bars)
    return np.sqrt(np.stack([bars, 1 - bars], axis=1))


def seen(table: SolverTable, process: Process) -> Array:
    """Signal and noise level of what the network sees in each row, (M, 2): the table's, where it knows them."""
    own = table.level[:-1]
    return np.where(own.any(axis=1, keepdims=True), own, levels(process, table.time))


def begun(
    table: SolverTable,
    process: Process,
    strength: float,
    anew: Callable[[int], SolverTable] | None = None,
    steps: int | None = None,
) -> Begun:
    """Where to begin so that the last ``strength`` (0 to 1) of the ``steps`` are done, as diffusers counts them.

    These are the rows unless given; a solver may have a few more. ``anew`` makes the rest of a solver from a row on,
    without what it would remember; a solver of one latent remembers nothing and needs none. `UsageError` for one that
    cannot begin in its middle.
    """
    if not 0 < strength <= 1:
        raise UsageError(f"strength: {strength:g} given; give more than 0, to 1 for all steps")
    steps = len(table) if steps is None else steps
    row = steps - min(int(steps * strength), steps)
    if row == steps:
        raise UsageError(f"strength {strength:g} of {steps} steps is none; give more, or take more steps")
    if row and table.width == 1:
        table = replace(table, **{name: getattr(table, name)[row:] for name in COLUMNS})
    elif row:
        if anew is None:
            raise UsageError(
                f"the solver carries {table.width} latents, and its table alone does not say how to begin at row "
                f"{row}; from a picture start a solver by its name, or one of one latent: ddim, euler, flow-euler"
            )
        table = anew(row)
    signal, noise = seen(table, process)[0].tolist()
    return Begun(row, table, signal, noise, 1 / float(table.input[0, 0]))
