"""Classifier guidance without splitting (Dhariwal & Nichol, 2105.05233, algorithm 2), for any solver.

The network's eps becomes ``eps - w b grad_x log p(y | x)`` wherever the solver asks for it. In a table that is one row
more for each of the solver's own: the guide looks at the same sample first, and a latent of its own carries its answer
to the row behind it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.prediction import convert
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.splitting import DENOISER, GUIDE
from hasten.passes.solvers.start import seen
from hasten.passes.solvers.table import SolverTable


def classifier_guided(table: SolverTable, process: Process, weight: float) -> SolverTable:
    """Guide a solver of one network on a diffusion process: twice the rows, one latent more.

    Levels are the table's own, or where it has none those of ``process`` at its times. `UsageError` for a flow, whose
    network says nothing of eps by itself, for a table of several networks, for one that clips or thresholds x0, and for
    one that starts without signal.
    """
    if process.is_flow:
        raise UsageError("classifier guidance here shifts eps, and this model is a flow; guide inside its network")
    if table.network.any():
        raise UsageError("classifier guidance is for solvers of one network; LTSP and STSP have a weight of their own")
    if table.hook is not None:
        raise UsageError(
            f"guided: {table.hook.kind} keeps x0 in its range, and the guide moves it behind the network; leave one out"
        )
    m, k = len(table), table.width
    signal, noise = seen(table, process).T
    if not signal.all():
        raise UsageError(
            "guided: the solver starts where the signal level is zero, and there no x0 follows from a shifted eps; "
            "take one that starts a little below, such as unipc or euler, or a schedule that is not rescaled to zero "
            "terminal SNR"
        )
    # f = cf^-1 (eps - cy y), and y stays: eps shifted by -w b g shifts f by this times g
    _, of_output = convert(process.prediction, "eps", signal, noise)
    shift = -weight * noise / of_output
    rows = np.repeat(np.arange(m), 2)
    guided = np.arange(2 * m) % 2 == 0
    plain = table.fold()
    a, b = np.zeros((2 * m, k + 1, k + 1)), np.zeros((2 * m, k + 1))
    a[guided, :k, :k], b[guided, k] = np.eye(k), 1
    a[~guided, :k, :k], b[~guided, :k] = plain.A, plain.B
    a[~guided, :k, k] = plain.B * shift[:, None]

    def wide(columns: np.ndarray) -> np.ndarray:
        return np.concatenate([columns, np.zeros((*columns.shape[:-1], 1))], -1)

    return replace(
        plain,
        time=plain.time[rows],
        input=wide(plain.input[rows]),
        A=a,
        B=b,
        C=wide(np.where(guided[:, None], 0.0, plain.C[rows])),
        cy=np.zeros(2 * m),
        cf=np.ones(2 * m),
        output=wide(plain.output),
        clean=np.where(guided[:, None], 0.0, plain.clean[rows]),
        direct=np.zeros((2 * m, k + 1)),
        condition=np.zeros((2 * m, k + 1)),
        level=table.level[np.append(rows, m)],
        network=np.where(guided, GUIDE, DENOISER),
    )
