"""A sweep of Picard sampling as arithmetic on arrays: the window's rows as inputs of a compiled graph.

As in `loop`, the table is padded and no part of the graph, which serves any solver of at most K latents with any number
of steps, and everything is ``*`` and ``+`` in float32. States are (R, K, B, ...): K latents of a batch of B, before
each of R rows. Arrays stay in the caller's namespace (numpy, or torch where a graph is traced).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers import loop
from hasten.passes.solvers.picard_rows import transport
from hasten.passes.solvers.table import SolverTable

Array = Any  # a torch.Tensor or a numpy.ndarray


class WindowRows(NamedTuple):
    """W rows of a folded table over K latents, float32.

    ``time`` (W,) is what the network is fed, ``input`` (W + 1, K) forms what it sees before each row and behind the
    last, ``carry`` (W, K, K), ``gain`` (W, K) and ``kick`` (W, K), None without noise, make the next state of the
    state, the prediction and the noise, and ``moved`` (W, K, K) is how a change travels along (`transport`).
    """

    time: Array
    input: Array
    carry: Array
    gain: Array
    moved: Array
    kick: Array | None


def padded(table: SolverTable, window: int, history: int) -> WindowRows:
    """All rows of ``table``, and ``window`` more behind them that leave the state as it is: (M + window) of them.

    `UsageError` for a table that a window of one network over ``history`` latents cannot run.
    """
    if table.hook is not None:
        raise UsageError(
            f"picard: the solver asks to {table.hook.kind} x0, and a compiled window leaves it as it is; run it with "
            "`passes.solvers.picard` on an engine of the network, or take another solver"
        )
    if table.network.any():
        raise UsageError(
            "picard: the solver asks two networks, and a compiled window has one; run it with `passes.solvers.picard`"
        )
    if table.width > history:
        raise UsageError(
            f"picard: the solver carries {table.width} latents and the window was built for {history}; take another "
            f"solver, or build it with history={table.width}"
        )
    rows = loop.padded(table, len(table), history)
    moved = np.zeros_like(rows.carry)
    moved[:, : table.width, : table.width] = transport(table)
    still, nothing = np.tile(np.eye(history, dtype=np.float32), (window, 1, 1)), np.zeros((window, history), np.float32)
    return WindowRows(
        # what these rows ask the network is not looked at, and is nothing that it would not be asked otherwise
        time=np.concatenate([rows.time, np.repeat(rows.time[-1:], window)]),
        input=np.concatenate([rows.input, np.tile(rows.output, (window + 1, 1))]),
        carry=np.concatenate([rows.carry, still]),
        gain=np.concatenate([rows.gain, nothing]),
        moved=np.concatenate([moved, still]),
        kick=np.concatenate([rows.kick, nothing]),
    )


def rows_from(rows: WindowRows, begin: int, window: int) -> WindowRows:
    """The ``window`` rows from ``begin`` on."""
    found = {name: column[begin : begin + window] for name, column in rows._asdict().items() if column is not None}
    found["input"] = rows.input[begin : begin + window + 1]
    return rows._replace(**found)


def seen_by_network(rows: WindowRows, states: Array) -> Array:
    """What the network sees of the states before each row and behind the last: (W + 1, B, ...)."""
    return _combined(rows.input, states)


def swept(rows: WindowRows, states: Array, predictions: Array, noise: Array | None) -> list[Array]:
    """The states behind each row, W of (K, B, ...), from those before each and behind the last (W + 1, K, B, ...).

    ``predictions`` and ``noise`` are (W, B, ...). A row's own result is corrected by what its state has changed in this
    very sweep, so a row's correction waits for that of the row before.
    """
    after = _column(rows.gain, states) * predictions[:, None]
    if noise is not None:
        after = after + _column(rows.kick, states) * noise[:, None]
    latents = range(states.shape[1])
    for k in latents:  # one product of (W, K, B, ...) at a time
        after = after + _column(rows.carry[:, :, k], states) * states[:-1, k][:, None]
    found = [after[0]]
    for i in range(1, len(after)):
        change, state = found[-1] - states[i], after[i]
        for k in latents:
            state = state + _column(rows.moved[i, :, k], state) * change[k]
        found.append(state)
    return found


def changes(rows: WindowRows, states: Array, seen: Array, found: Array) -> tuple[Array, Array]:
    """How much the states behind each row have changed in a sweep, (W, B) each.

    The mean square change of what the network sees of them, ``seen`` before; and the sum of all absolute changes, for
    tolerance 0: no square is so small there that it is lost.
    """
    change = _combined(rows.input[1:], found) - seen[1:]
    moved = abs(found - states[1:]).sum(1)
    sizes = (*change.shape[:2], -1)
    return (change * change).reshape(sizes).mean(2), moved.reshape(sizes).sum(2)


def _combined(weights: Array, states: Array) -> Array:
    """``weights`` (R, K) of each state's latents added up, (R, B, ...)."""
    latents = [states[:, k] for k in range(states.shape[1])]
    total = _column(weights[:, 0], latents[0]) * latents[0]
    for k, latent in enumerate(latents[1:], 1):
        total = total + _column(weights[:, k], latent) * latent
    return total


def _column(weights: Array, like: Array) -> Array:
    return weights.reshape(*weights.shape, *[1] * (like.ndim - weights.ndim))
