"""Triangular Anderson acceleration of Picard sampling (Tang et al., 2402.09970, ParaTAA).

A sweep maps the window's states to new ones, and each depends on those before it alone. Anderson's method guesses the
fixed point from the last sweeps: of their changes it takes the combination that cancels the residual best, in the sense
of least squares. Triangular: each row has a combination of its own, fitted to the residuals of the rows up to it, so
that no row is moved by what happens behind it.

Only guesses are accelerated. What is kept of a sweep is the plain sweep's, the first state behind the settled ones
among it: that is the method's safeguard, so every sweep still settles one row at least and the result is the plain one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # a torch.Tensor or a numpy.ndarray
State = Sequence[Array]
RIDGE = 1e-3
"""Of the least squares, as a part of the mean square of the changes."""


class _Sweep(NamedTuple):
    """States before a sweep and residuals of it, by row."""

    states: dict[int, State]
    residuals: dict[int, State]


class Anderson:
    """Remembers ``memory`` changes from one sweep to the next."""

    def __init__(self, memory: int) -> None:
        self._sweeps: deque[_Sweep] = deque(maxlen=memory + 1)

    def guess(
        self, rows: Sequence[int], old: Sequence[State], new: Sequence[State], to_host: Callable[[list[Array]], Array]
    ) -> list[State]:
        """Guess the states behind ``rows``, each a list of (B, ...), from those before and after a sweep.

        ``to_host`` makes one numpy array of many of shape (B,), in one transfer.
        """
        residuals = {i: _minus(s, was) for i, s, was in zip(rows, new, old, strict=True)}
        self._sweeps.append(_Sweep(dict(zip(rows, old, strict=True)), residuals))
        changes = [(later, earlier) for earlier, later in zip(self._sweeps, list(self._sweeps)[1:], strict=False)]
        if not changes:
            return list(new)
        moved = [{i: _minus(b.states[i], a.states[i]) for i in rows if i in a.states} for b, a in changes]
        turned = [{i: _minus(b.residuals[i], a.residuals[i]) for i in rows if i in a.residuals} for b, a in changes]
        shares = self._shares(rows, residuals, turned, to_host)
        found = list[State]()
        for i, state, share in zip(rows, new, shares, strict=True):
            after = list(state)
            for k, (by, turn) in enumerate(zip(moved, turned, strict=True)):
                if i in by:
                    parts = zip(after, by[i], turn[i], strict=True)
                    after = [s - _column(share[k], s) * (m + t) for s, m, t in parts]
            found.append(after)
        return found

    def _shares(
        self,
        rows: Sequence[int],
        residuals: dict[int, State],
        turned: list[dict[int, State]],
        to_host: Callable[[list[Array]], Array],
    ) -> Array:
        """How much of each change to take back, (R, changes, B): least squares over the rows up to each."""
        count = len(turned)
        pairs = [(j, k) for j in range(count) for k in range(j, count)]
        some = residuals[rows[0]]
        nothing = _product(some, some) * 0
        sums = []
        for i in rows:
            for j, k in pairs:
                sums.append(_product(turned[j][i], turned[k][i]) if i in turned[j] and i in turned[k] else nothing)
            sums += [_product(t[i], residuals[i]) if i in t else nothing for t in turned]
        held = np.asarray(to_host(sums), np.float64).reshape(len(rows), len(pairs) + count, -1).cumsum(0)
        square = np.zeros((len(rows), held.shape[-1], count, count))
        for number, (j, k) in enumerate(pairs):
            square[..., j, k] = square[..., k, j] = held[:, number]
        scale = np.trace(square, axis1=-2, axis2=-1)[..., None, None] / count
        regular = square + np.where(scale > 0, RIDGE * scale, 1.0) * np.eye(count)
        wanted = np.moveaxis(held[:, len(pairs) :], 1, -1)[..., None]
        if not np.isfinite(regular).all() or not np.isfinite(wanted).all():
            return np.zeros((len(rows), count, held.shape[-1]))  # a network that says NaN is asked again as it is
        return np.moveaxis(np.linalg.solve(regular, wanted)[..., 0], -1, 1)


def _minus(state: State, other: State) -> State:
    return [s - o for s, o in zip(state, other, strict=True)]


def _product(a: State, b: State) -> Array:
    """The scalar product of two states, (B,)."""
    parts = [(x * y).reshape(len(x), -1).sum(1) for x, y in zip(a, b, strict=True)]
    return sum(parts[1:], parts[0])


def _column(share: Array, like: Array) -> Array:
    """Numbers (B,) as they multiply ``like`` (B, ...)."""
    numbers = np.asarray(share, np.float64).reshape(-1, *[1] * (like.ndim - 1))
    return numbers.astype(like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(numbers.tolist())
