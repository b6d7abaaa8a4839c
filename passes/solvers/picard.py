"""Picard sampling: all rows within a window at once, again and again until they agree (ParaDiGMS).

Shih et al., 2305.16317: guess the states of the window, evaluate the network on all of them as one batch, add up the
rows from the window's start, and move the start past what no longer changes. More evaluations than the plain loop, in
fewer calls; it pays where a call on many rows costs little more than on one: on several devices, or a small network.

The window's first state is exact, so each sweep makes one more exact and M sweeps are enough for M rows. The state may
have several latents: those that hold the past follow the recurrence of the table, so a multistep method keeps its order
across the window's start. `Anderson` makes better guesses of a window from several sweeps (ParaTAA).

This is the sweep for any arrays, networks and hooks. What follows a sweep is `picard_loop`'s, shared with sweeps that
are compiled as one graph (`picard_window`, `backends.picard_engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.hooks import Hook
from hasten.passes.solvers.picard_loop import Picard, Sizes, State, allowed_changes, joined, on_host, slide
from hasten.passes.solvers.picard_rows import transport
from hasten.passes.solvers.sample import check_call, combined, hooked_step, network_input, step, typed_like, widened
from hasten.passes.solvers.table import SolverTable

Array = Any  # a torch.Tensor or a numpy.ndarray


def picard(
    denoise: Callable[..., Array] | Sequence[Callable[..., Array]],
    table: SolverTable,
    x: Array,
    *,
    window: int,
    tolerance: float,
    noise: Sequence[Array] | None = None,
    hook: Hook | None = None,
    unit: Sequence[float] | None = None,
    acceleration: int = 0,
) -> Picard:
    """Sample what `sample` does from unit noise ``x`` (B, ...), with ``window`` rows in one call of ``denoise(y, t)``.

    ``y`` is (R * B, ...) for R <= window rows, all samples of a row together, and ``t`` (R * B,), the time of each; a
    condition of the samples repeats R times. A state has settled when its mean square change in a sweep is at most
    ``tolerance ** 2 * unit``, in every sample; ParaDiGMS uses 0.1. ``unit`` (M,) are variances of the rows' inputs, by
    default those that `unit_change` reads off the table. ``tolerance=0`` waits until nothing changes, and is `sample`
    to the last bit if the network answers a batch as it answers its parts. A change that is not a number has not
    settled; it lasts only where `sample` would meet it as well. ``acceleration`` is the number of earlier sweeps that
    guesses are made from, 0 for none and 2 to 4 in use, each of which is kept in memory; the result converges to the
    same. `UsageError` for what cannot be meant.
    """
    networks = [denoise] if callable(denoise) else list(denoise)
    check_call(table, len(networks), 0 if noise is None else len(noise))
    allowed = allowed_changes(table, x, window, tolerance, unit)
    hook = hook or table.hook
    moved, rows = transport(table), table if hook else table.fold()
    kicks = dict(zip(table.noisy, noise if noise is not None else (), strict=True))

    def sweep(span: range, states: Sequence[State]) -> tuple[Sequence[State], Sizes, int]:
        predictions, calls = _predictions(networks, rows, span, states, x)
        found: list[State] = []
        for i, old, prediction in zip(span, states, predictions, strict=False):
            kick = widened(kicks[i]) if i in kicks else None
            after = hooked_step(rows, i, old, prediction, kick, hook) if hook else step(rows, i, old, prediction, kick)
            if i > span.start:
                change = [new - was for new, was in zip(found[-1], old, strict=True)]
                after = [s + combined(weights, change) for s, weights in zip(after, moved[i], strict=True)]
            found.append(after)
        sizes = on_host(_changes(rows, span, found, states[1:], exact=allowed is None))
        return found, sizes.reshape(len(span), -1), calls

    wide = widened(x)
    first = [wide * table.init, *(wide * 0.0 for _ in range(table.width - 1))]
    return slide(sweep, table, first, window, allowed, acceleration)


def _predictions(
    networks: Sequence[Callable[..., Array]], table: SolverTable, span: range, states: Sequence[State], x: Array
) -> tuple[list[Array], int]:
    """What the networks say in the rows of ``span``, one array each, and in how many calls."""
    found: dict[int, Array] = {}
    called = sorted({int(table.network[i]) for i in span})
    for network in called:
        chosen = [(i, state) for i, state in zip(span, states, strict=False) if table.network[i] == network]
        given = [
            joined([typed_like(network_input(table, i, state), x) for i, state in chosen]),
            _vector(np.repeat([table.time[i] for i, _ in chosen], len(x)), widened(x)),
        ]
        if network in table.conditioned:
            given.append(joined([typed_like(combined(table.condition[i], state), x) for i, state in chosen]))
        answer = widened(networks[network](*given))
        if tuple(answer.shape) != tuple(given[0].shape):
            raise UsageError(
                f"picard: the network was given {len(chosen)} rows as {tuple(given[0].shape)} and answered "
                f"{tuple(answer.shape)}; it must take any batch and answer in its shape"
            )
        found |= {i: answer[k * len(x) : (k + 1) * len(x)] for k, (i, _) in enumerate(chosen)}
    return [found[i] for i in span], len(called)


def _changes(table: SolverTable, span: range, new: Sequence[State], old: Sequence[State], exact: bool) -> list[Array]:
    """How much each state behind ``span`` has changed in a sweep, (B,) each: what `settled` is told."""
    seen_by = [*table.input[1:], table.output]
    sizes = []
    for i, state, was in zip(span, new, old, strict=False):
        if exact:  # everything counts, and no square is so small that it is lost
            parts = [abs(s - w).reshape(len(s), -1).sum(1) for s, w in zip(state, was, strict=True)]
            sizes.append(sum(parts[1:], parts[0]))
        else:
            change = combined(seen_by[i], state) - combined(seen_by[i], was)
            sizes.append((change * change).reshape(len(change), -1).mean(1))
    return sizes


def _vector(values: Any, like: Array) -> Array:
    return np.asarray(values, like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(values.tolist())
