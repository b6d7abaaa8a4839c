"""Picard sampling: all rows within a window at once, again and again until they agree (ParaDiGMS).

Shih et al., 2305.16317: guess the states of the window, evaluate the network on all of them as one batch, add up the
rows from the window's start, and move the start past what no longer changes. More evaluations than the plain loop, in
fewer calls; it pays where a call on many rows costs little more than on one: on several devices, or a small network.

The window's first state is exact, so each sweep makes one more exact and M sweeps are enough for M rows. The state may
have several latents: those that hold the past follow the recurrence of the table, so a multistep method keeps its order
across the window's start. `Anderson` makes better guesses of a window from several sweeps (ParaTAA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.hooks import Hook
from hasten.passes.solvers.picard_anderson import Anderson
from hasten.passes.solvers.picard_rows import transport, unit_change
from hasten.passes.solvers.sample import check_call, combined, hooked_step, network_input, step, typed_like, widened
from hasten.passes.solvers.table import SolverTable

Array = Any  # a torch.Tensor or a numpy.ndarray
State = list[Array]


class Picard(NamedTuple):
    """What `picard` did: the ``result``, an array of x's shape, and what it took.

    ``sweeps`` over a window; ``evaluations`` of the network for each sample, M in the plain loop; ``critical``: calls
    that wait for one another, M in the plain loop and one a sweep unless a window has rows of several networks.
    """

    result: Array
    sweeps: int
    evaluations: int
    critical: int


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
    allowed = _allowed(table, x, window, tolerance, unit)
    if acceleration < 0:
        raise UsageError(f"picard: acceleration is {acceleration}; it counts earlier sweeps, 0 for none")
    anderson = Anderson(acceleration) if acceleration else None
    hook = hook or table.hook
    moved, rows = transport(table), table if hook else table.fold()
    kicks = dict(zip(table.noisy, noise if noise is not None else (), strict=True))
    wide = widened(x)
    first = [wide * table.init, *(wide * 0.0 for _ in range(table.width - 1))]
    begin, states = 0, [first] * (min(window, len(table)) + 1)
    sweeps = evaluations = critical = 0
    while begin < len(table):
        span = range(begin, min(begin + window, len(table)))
        predictions, calls = _predictions(networks, rows, span, states, x)
        found: list[State] = [states[0]]
        for i, old, prediction in zip(span, states, predictions, strict=False):
            kick = widened(kicks[i]) if i in kicks else None
            after = hooked_step(rows, i, old, prediction, kick, hook) if hook else step(rows, i, old, prediction, kick)
            if i > begin:
                change = [new - was for new, was in zip(found[-1], old, strict=True)]
                after = [s + combined(weights, change) for s, weights in zip(after, moved[i], strict=True)]
            found.append(after)
        shift = _shift(rows, span, found[1:], states[1:], allowed)
        guessed = found
        if anderson is not None and shift < len(span):
            left = slice(shift + 1, len(span) + 1)
            guessed = [*found[: shift + 1], *anderson.guess(span[shift:], states[left], found[left], _on_host)]
        begin, states = begin + shift, guessed[shift:] + [guessed[-1]] * shift
        sweeps, evaluations, critical = sweeps + 1, evaluations + len(span), critical + calls
    return Picard(combined(table.output, states[0]), sweeps, evaluations, critical)


def _allowed(
    table: SolverTable, x: Array, window: int, tolerance: float, unit: Sequence[float] | None
) -> list[float] | None:
    """The mean square change that each row's input may have, (M,), or None where it may have none at all."""
    if window < 1:
        raise UsageError(f"picard: the window is {window}; it holds at least 1 row, or more to gain anything")
    if not 0 <= tolerance < np.inf:
        raise UsageError(
            f"picard: the tolerance is {tolerance:g}; it is positive (0.1 is usual), or 0 for the plain loop's result"
        )
    if not x.ndim or not len(x):
        raise UsageError(f"picard: x has shape {tuple(x.shape)}; its first axis counts the samples, at least 1")
    if tolerance == 0:
        return None
    units = unit_change(table) if unit is None else np.asarray(unit, np.float64)
    if units.shape != (len(table),) or not (units > 0).all():
        raise UsageError(
            f"picard: unit has shape {units.shape}; it holds {len(table)} variances, one a row, all positive"
        )
    return [float(u) * tolerance**2 for u in units]


def _predictions(
    networks: Sequence[Callable[..., Array]], table: SolverTable, span: range, states: Sequence[State], x: Array
) -> tuple[list[Array], int]:
    """What the networks say in the rows of ``span``, one array each, and in how many calls."""
    found: dict[int, Array] = {}
    called = sorted({int(table.network[i]) for i in span})
    for network in called:
        chosen = [(i, state) for i, state in zip(span, states, strict=False) if table.network[i] == network]
        given = [
            _joined([typed_like(network_input(table, i, state), x) for i, state in chosen]),
            _vector(np.repeat([table.time[i] for i, _ in chosen], len(x)), widened(x)),
        ]
        if network in table.conditioned:
            given.append(_joined([typed_like(combined(table.condition[i], state), x) for i, state in chosen]))
        answer = widened(networks[network](*given))
        if tuple(answer.shape) != tuple(given[0].shape):
            raise UsageError(
                f"picard: the network was given {len(chosen)} rows as {tuple(given[0].shape)} and answered "
                f"{tuple(answer.shape)}; it must take any batch and answer in its shape"
            )
        found |= {i: answer[k * len(x) : (k + 1) * len(x)] for k, (i, _) in enumerate(chosen)}
    return [found[i] for i in span], len(called)


def _shift(
    table: SolverTable, span: range, new: Sequence[State], old: Sequence[State], allowed: list[float] | None
) -> int:
    """How many states behind the window's start can be kept, given each before and after the sweep.

    The first that has not settled is kept as well: it is made of settled ones alone. So the window's last may have
    changed as it likes.
    """
    seen_by = [*table.input[1:], table.output]
    sizes = []
    for i, state, was in zip(span, new, old, strict=False):
        if allowed is None:  # everything counts, and no square is so small that it is lost
            parts = [abs(s - w).reshape(len(s), -1).sum(1) for s, w in zip(state, was, strict=True)]
            sizes.append(sum(parts[1:], parts[0]))
        else:
            change = combined(seen_by[i], state) - combined(seen_by[i], was)
            sizes.append((change * change).reshape(len(change), -1).mean(1))
    values = _on_host(sizes).reshape(len(sizes), -1)
    limits = np.array([*(0.0 if allowed is None else allowed[i] for i in span[1:]), np.inf])
    failed = ~(values <= limits[:, None]).all(1)  # NaN fails
    if not failed.any():
        return len(sizes)
    first = int(failed.argmax())
    # A network that said NaN on the way may not do so once the states before have settled.
    return max(1, first) if np.isnan(values[first]).any() else first + 1


def _on_host(arrays: Sequence[Array]) -> Any:
    """All of them behind one another as one numpy array, in one transfer from the device."""
    return np.asarray(_joined(arrays).tolist())


def _joined(arrays: Sequence[Array]) -> Array:
    """Concatenate along the first axis."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    size = len(arrays[0])
    joined = arrays[0].new_empty((size * len(arrays), *arrays[0].shape[1:]))
    for k, array in enumerate(arrays):
        joined[k * size : (k + 1) * size] = array
    return joined


def _vector(values: Any, like: Array) -> Array:
    return np.asarray(values, like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(values.tolist())
