"""Where a sampler starts that is given a picture and not noise alone."""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.prediction import Array
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.table import SolverTable


def levels(process: Process, times: Array) -> Array:
    """Signal and noise level of what the network sees at ``times`` (M,), (M, 2); between training times, of both."""
    if process.bars is None:
        noise = times / process.train_steps
        return np.stack([1 - noise, noise], axis=1)
    bars = np.interp(times, np.arange(len(process.bars)), process.bars)
    return np.sqrt(np.stack([bars, 1 - bars], axis=1))


def begun(table: SolverTable, process: Process, strength: float) -> tuple[int, tuple[float, float], float]:
    """``(row, (a, b), scale)``: begin at ``row`` with ``scale * (a * picture + b * noise)`` as the first latent.

    The last ``strength`` (0 to 1) of the rows are done, as diffusers counts them. Only a solver without history can
    begin anywhere; `UsageError` for another.
    """
    if not 0 < strength <= 1:
        raise UsageError(f"strength: {strength:g} given; give more than 0, to 1 for all steps")
    if table.width != 1:
        raise UsageError(
            f"the solver carries {table.width} latents and cannot begin in its middle; from a picture start ddim, "
            "euler or flow-euler"
        )
    row = len(table) - min(int(len(table) * strength), len(table))
    if row == len(table):
        raise UsageError(f"strength {strength:g} of {len(table)} rows is none; give more, or take more steps")
    signal, noise = levels(process, table.time)[row].tolist()
    return row, (signal, noise), 1 / float(table.input[row, 0])
