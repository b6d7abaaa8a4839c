"""A sampler's loop as arithmetic on arrays: the table as inputs of a compiled loop, and what one row of it does.

The table is no part of a compiled loop but its input, padded to (rows, history): one engine serves every solver and
every number of steps up to its bounds. Arrays stay in the caller's namespace (numpy, or torch where a graph is traced);
everything is ``*`` and ``+`` in float32, for a matrix product may be rounded to half precision on a GPU.

The state is (K, B, ...): K latents of a batch of B. Rows and columns beyond the table's own are zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.passes.solvers.table import SolverTable

Array = Any  # a torch.Tensor or a numpy.ndarray

PREFIX = "solver_"


class Rows(NamedTuple):
    """A folded table as float32 arrays: R rows over K latents.

    ``time`` (R,) is what the network is fed, ``input`` (R, K) forms its input, ``carry`` (R, K, K), ``gain`` (R, K) and
    ``kick`` (R, K) make the next state of the state, the prediction and the noise; ``x0`` (R, 2) makes the predicted
    clean sample of input and prediction; ``level`` (R, 2) is the signal and noise level of the network's input, for
    inpainting; ``network`` (R,) numbers the network that is asked, and ``condition`` (R, K) forms its second input, in
    loops of two networks; ``x0_gain`` (R, K) makes the next state of the clipped or thresholded x0, in loops that have
    one, and is zero where the prediction alone does; ``output`` (K,) forms the result.
    """

    time: Array
    input: Array
    carry: Array
    gain: Array
    kick: Array
    x0: Array
    level: Array
    network: Array
    condition: Array
    x0_gain: Array
    output: Array


class Row(NamedTuple):
    """One row of `Rows`.

    ``time`` and ``network`` (), ``input`` and ``condition`` (K,), ``carry`` (K, K), ``gain``, ``kick`` and ``x0_gain``
    (K,), ``x0`` and ``level`` (2,).
    """

    time: Array
    input: Array
    carry: Array
    gain: Array
    kick: Array
    x0: Array
    level: Array
    network: Array
    condition: Array
    x0_gain: Array


def padded(
    table: SolverTable,
    rows: int,
    history: int,
    *,
    time_scale: float = 1.0,
    levels: npt.NDArray[np.float64] | None = None,
    networks: int = 1,
    conditioned: bool = False,
    hook: str = "none",
) -> Rows:
    """Fold ``table`` and round it to float32, padded to ``rows`` and ``history``.

    ``time_scale`` multiplies the times: 0.001 for networks that want them from 0 to 1. ``levels`` (M, 2) go into
    ``level``, zeros unless given. ``networks`` is how many the loop has, ``conditioned`` whether the second of them has
    a second input, ``hook`` what it can do to x0 (`hooks.KINDS`). `UsageError` for a table that is larger, or asks for
    what is not there.
    """
    if len(table) > rows:
        raise UsageError(
            f"the solver makes {len(table)} evaluations and the loop takes at most {rows}; take fewer steps, or build "
            f"it with rows={len(table)}"
        )
    if table.width > history:
        raise UsageError(
            f"the solver carries {table.width} latents and the loop has room for {history}; take another solver, or "
            f"build it with history={table.width}"
        )
    if table.network.max() >= networks:
        raise UsageError(
            "the solver calls a second network, and the loop has one; build it with both (Sampling.second), or run "
            "both with `solvers.sample`"
        )
    if table.condition.any() and not conditioned:
        raise UsageError(
            "the solver gives the second network a second input, and the loop's has none; build it with one that has "
            "an input 'velocity'"
        )
    if table.hook is not None and table.hook.kind != hook:
        raise UsageError(
            f"the solver asks to {table.hook.kind} x0, and the loop was built "
            + (f"to {hook} it" if hook != "none" else "to leave it as it is")
            + f"; build it with --solver NAME:{table.hook.kind}=…"
        )
    folded, x0_gain = (table.fold(), np.zeros((0, 0))) if table.hook is None else table.on_x0()

    def pad(values: npt.NDArray[Any], *shape: int) -> npt.NDArray[np.float32]:
        wide = np.zeros(shape, np.float32)
        wide[tuple(slice(n) for n in values.shape)] = values
        return wide

    return Rows(
        time=pad(folded.time * time_scale, rows),
        input=pad(folded.input, rows, history),
        carry=pad(folded.A, rows, history, history),
        gain=pad(folded.B, rows, history),
        kick=pad(folded.C, rows, history),
        x0=pad(folded.clean, rows, 2),
        level=pad(np.zeros((0, 2)) if levels is None else levels, rows, 2),
        network=pad(folded.network, rows),
        condition=pad(folded.condition, rows, history),
        x0_gain=pad(x0_gain, rows, history),
        output=pad(folded.output, history),
    )


def network_input(row: Row, state: Array) -> Array:
    """What the network sees, (B, ...)."""
    return combined(row.input, state)


def combined(weights: Array, state: Array) -> Array:
    """``weights`` (K,) of the latents added up, (B, ...)."""
    total = weights[0] * state[0]
    for k in range(1, len(state)):
        total = total + weights[k] * state[k]
    return total


def advance(row: Row, state: Array, prediction: Array, noise: Array | None, x0: Array | None = None) -> Array:
    """The next state, (K, B, ...); ``prediction``, ``noise`` and ``x0`` are (B, ...) in the state's type."""
    after = _column(row.gain, state) * prediction
    if noise is not None:
        after = after + _column(row.kick, state) * noise
    if x0 is not None:
        after = after + _column(row.x0_gain, state) * x0
    for k in range(len(state)):  # one product of (K, B, ...) at a time, not (K, K, B, ...) at once
        after = after + _column(row.carry[:, k], state) * state[k]
    return after


def predicted_x0(row: Row, seen: Array, prediction: Array) -> Array:
    """The clean sample that a prediction stands for, (B, ...): what a preview shows."""
    return row.x0[0] * seen + row.x0[1] * prediction


def blended(mask: Array, inside: Array, outside: Array) -> Array:
    """``inside`` where ``mask`` is 1 and ``outside`` where it is 0, by parts between."""
    return mask * inside + (1 - mask) * outside


def result(output: Array, state: Array) -> Array:
    """The latents that a state stands for after the last row, (B, ...)."""
    return combined(output, state)


def guided(with_condition: Array, without: Array, scale: Array) -> Array:
    """Classifier-free guidance (Ho & Salimans, 2207.12598): ``without + scale (with - without)``."""
    return without + scale * (with_condition - without)


def rescaled(prediction: Array, with_condition: Array, share: Array) -> Array:
    """Pull a guided prediction's standard deviation, sample by sample, to that of the conditional one.

    ``share`` () is how far, 0 not at all and 1 wholly (Lin et al., 2305.08891, section 3.4).
    """
    ratio = _deviation(with_condition) / _deviation(prediction)
    return prediction * (share * ratio + (1 - share))


def _deviation(x: Array) -> Array:
    flat = x.reshape(x.shape[0], -1)
    centred = flat - flat.mean(1).reshape(-1, 1)
    # a constant prediction has no deviation, and must not become NaN
    return ((centred * centred).mean(1) + 1e-20).reshape(-1, *[1] * (x.ndim - 1)) ** 0.5


def _column(weights: Array, state: Array) -> Array:
    return weights.reshape(-1, *[1] * (state.ndim - 1))
