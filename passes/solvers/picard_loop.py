"""The host's part of Picard sampling: what has settled after a sweep, and where the window goes from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.passes.solvers.picard_anderson import Anderson
from hasten.passes.solvers.picard_rows import unit_change
from hasten.passes.solvers.sample import combined
from hasten.passes.solvers.table import SolverTable

Array = Any  # a torch.Tensor or a numpy.ndarray
State = Sequence[Array]
Sizes = npt.NDArray[np.floating[Any]]
Sweep = Callable[[range, Sequence[State]], tuple[Sequence[State], Sizes, int]]
"""From rows and the states before each, and behind the last: the R states behind them, how much those have changed,
(R, B), and calls of a network that waited for one another. There may be more states than the rows need."""


class Picard(NamedTuple):
    """What Picard sampling did: the ``result``, an array of x's shape, and what it took.

    ``sweeps`` over a window; ``evaluations`` of the network for each sample, M in the plain loop; ``critical``: calls
    that wait for one another, M in the plain loop and one a sweep unless a window has rows of several networks.
    """

    result: Array
    sweeps: int
    evaluations: int
    critical: int


def slide(
    sweep: Sweep, table: SolverTable, first: State, window: int, allowed: Sequence[float] | None, acceleration: int
) -> Picard:
    """Sweep over ``window`` rows of ``table`` until all have settled, from the state ``first``, K or more of (B, ...).

    ``allowed`` are the limits of `allowed_changes`.
    """
    if acceleration < 0:
        raise UsageError(f"picard: acceleration is {acceleration}; it counts earlier sweeps, 0 for none")
    anderson = Anderson(acceleration) if acceleration else None
    begin, states = 0, [first] * (min(window, len(table)) + 1)
    sweeps = evaluations = critical = 0
    while begin < len(table):
        span = range(begin, min(begin + window, len(table)))
        found, sizes, calls = sweep(span, states)
        shift = settled(sizes, [*(0.0 if allowed is None else allowed[i] for i in span[1:]), np.inf])
        guessed: list[State] = [states[0], *found]
        if anderson is not None and shift < len(span):
            old, new = states[shift + 1 : len(span) + 1], guessed[shift + 1 :]
            guessed = [*guessed[: shift + 1], *anderson.guess(span[shift:], old, new, on_host)]
        begin, states = begin + shift, guessed[shift:] + [guessed[-1]] * (len(states) - len(guessed) + shift)
        sweeps, evaluations, critical = sweeps + 1, evaluations + len(span), critical + calls
    # a compiled window may have room for more latents than the table has
    return Picard(combined(table.output, states[0][: table.width]), sweeps, evaluations, critical)


def settled(sizes: Sizes, limits: Sequence[float]) -> int:
    """How many states behind the window's start can be kept, given how much each has changed, (R, B).

    The first that has not settled is kept as well: it is made of settled ones alone. So the window's last may have
    changed as it likes.
    """
    failed = ~(sizes <= np.asarray(limits)[:, None]).all(1)  # NaN fails
    if not failed.any():
        return len(sizes)
    first = int(failed.argmax())
    # A network that said NaN on the way may not do so once the states before have settled.
    return max(1, first) if np.isnan(sizes[first]).any() else first + 1


def allowed_changes(
    table: SolverTable, x: Array, window: int, tolerance: float, unit: Sequence[float] | None
) -> list[float] | None:
    """The mean square change that each row's input may have, (M,), or None where it may have none at all.

    `UsageError` for a window, a tolerance, units or an ``x`` (B, ...) that cannot be meant.
    """
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


def on_host(arrays: Sequence[Array]) -> Any:
    """All of them behind one another as one numpy array, in one transfer from the device."""
    return np.asarray(joined(arrays).tolist())


def joined(arrays: Sequence[Array]) -> Array:
    """Concatenate along the first axis."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    size = len(arrays[0])
    together = arrays[0].new_empty((size * len(arrays), *arrays[0].shape[1:]))
    for k, array in enumerate(arrays):
        together[k * size : (k + 1) * size] = array
    return together
