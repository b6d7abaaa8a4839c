"""Payloads that extrapolate: ``sum_i w_i H_i`` over the results of the last computed calls, newest first.

All forecasters in use are linear in what is stored, with weights that depend on the numbers of the stored calls and of
the present one alone. Stored are K tensors and their calls' numbers, -1 where there is none yet; the weights are
computed from the numbers in the graph, so they are right for any mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import Any, ClassVar

import numpy as np

from hasten.passes.steps.policy import Array, Control, Slot, State, as_float32, namespace

OF = ("value", "residual")


class _Forecast:
    """What all forecasters share: the store of ``history`` tensors, and the weighted sum of them.

    ``of``: whether ``after`` itself is extrapolated or the residual ``after - before``.
    """

    history: Any
    of: Any

    def slots(self) -> Mapping[str, Slot]:
        return {
            "stored": Slot(like="after", copies=self.history),
            "calls": Slot(dtype="int64", copies=self.history, start=-1),
        }

    def store(self, state: State, before: Array, after: Array, control: Control) -> State:
        xp = namespace(after, *control)
        newest = (after - before if self.of == "residual" else after)[None]
        call = control.step.reshape(1)
        if self.history == 1:
            return {"stored": newest, "calls": call}
        # A run's first call fills every place: weights of zero would not keep an earlier run's NaN out of the sum.
        first = control.step == 0
        older = xp.where(first, newest, state["stored"][:-1])
        calls = xp.where(first, xp.full_like(state["calls"][:-1], -1), state["calls"][:-1])
        return {"stored": xp.concatenate((newest, older)), "calls": xp.concatenate((call, calls))}

    def reuse(self, state: State, before: Array, control: Control) -> Array:
        forecast = weighted_sum(self.weights(state["calls"], control), state["stored"])
        return before + forecast if self.of == "residual" else forecast

    def weights(self, calls: Array, control: Control) -> Sequence[Array]:
        """The weight of each stored tensor, 0-d float32 or together (K,). ``calls`` (K,) int64."""
        raise NotImplementedError


def weighted_sum(weights: Sequence[Array], stored: Array) -> Array:
    """``sum_i weights[i] * stored[i]``, summed in float32 in that order; (K, *shape) -> (*shape)."""
    total = weights[0] * as_float32(stored[0])
    for i in range(1, len(weights)):
        total = total + weights[i] * as_float32(stored[i])
    return cast_like(total, stored)


def cast_like(array: Array, like: Array) -> Array:
    """The array in the type of another."""
    return array.astype(like.dtype) if namespace(array) is np else array.to(like.dtype)


@dataclass(frozen=True)
class Taylor(_Forecast):
    """TaylorSeer (Liu et al., 2503.06923): a Taylor polynomial with differences for derivatives, as diffusers has it.

    The j-th difference at a computed call is that of the (j-1)-th ones, over the distance of the last two calls. Where
    fewer than ``order + 1`` calls are stored, the order is lower.
    """

    order: int = 1
    of: str = "value"
    name: ClassVar[str] = "taylor"

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, calls: Array, control: Control) -> Sequence[Array]:
        xp, numbers = namespace(calls, *control), as_float32(calls)
        ahead = as_float32(control.step) - numbers[0]
        one = xp.ones_like(ahead)
        # Places that hold nothing yet are no distance apart; what is divided by it counts with weight 0.
        gaps = [xp.where(calls[m + 1] >= 0, numbers[m] - numbers[m + 1], one) for m in range(self.order)]
        # differences[m]: the present order's difference at stored call m, as weights of the stored tensors.
        differences: list[dict[int, Any]] = [{m: 1.0} for m in range(self.history)]
        total: dict[int, Any] = {0: one}
        power = ahead
        for order in range(1, self.history):
            differences = [_combine(differences[m], differences[m + 1], gaps[m]) for m in range(len(differences) - 1)]
            factor = power / factorial(order) * as_float32(calls[order] >= 0)
            for i, weight in differences[0].items():
                total[i] = total.get(i, 0.0) + weight * factor
            power = power * ahead
        return [total[i] for i in range(self.history)]


def _combine(newer: Mapping[int, Any], older: Mapping[int, Any], gap: Array) -> dict[int, Any]:
    """Weights of ``(newer - older) / gap``."""
    return {i: (newer.get(i, 0.0) - older.get(i, 0.0)) / gap for i in sorted({*newer, *older})}


@dataclass(frozen=True)
class Chebyshev(_Forecast):
    """Spectrum (CVPR 2026): Chebyshev polynomials fitted by ridge regression, mixed with linear extrapolation.

    ``degree`` M polynomials beyond the constant, ``ridge`` the penalty, ``mix`` the fit's share of the result. Calls
    are mapped to [-1, 1] over ``span`` calls: the run's number of them where None, 50 where that is unknown.
    """

    degree: int = 4
    ridge: float = 0.1
    mix: float = 0.5
    history: int = 16
    span: int | None = None
    of: str = "value"
    name: ClassVar[str] = "chebyshev"

    def weights(self, calls: Array, control: Control) -> Sequence[Array]:
        xp = namespace(calls, *control)
        numbers, step = as_float32(calls), as_float32(control.step)
        known = as_float32(calls >= 0)
        if self.span is None:
            span = xp.where(control.steps > 0, as_float32(control.steps), xp.full_like(step, 50.0))
        else:
            span = xp.full_like(step, self.span)
        fitted = self._fit(numbers * 2 / span - 1, known, step * 2 / span - 1) * self.mix
        slope = (step - numbers[0]) / (numbers[0] - numbers[1]) * known[1] * (1 - self.mix)
        linear = xp.concatenate((xp.stack((slope + (1 - self.mix), -slope)), xp.zeros_like(fitted[2:])))
        weights: Sequence[Array] = fitted + linear
        return weights

    def _fit(self, at: Array, known: Array, wanted: Array) -> Array:
        """``p^T (P P^T + ridge I)^-1 P``, the weights (K,) of the fit's value at ``wanted``; P (M+1, K) at ``at``.

        They are the Schur complement of the bordered matrix [[P P^T + ridge I, P], [p^T, 0]], negated: eliminating
        M+1 pivots leaves them in the last row.
        """
        xp = namespace(at)
        rows, value = [known, at * known], [known[0] * 0 + 1, wanted]
        for _ in range(2, self.degree + 1):
            rows.append(2 * at * rows[-1] - rows[-2])
            value.append(2 * wanted * value[-1] - value[-2])
        basis = xp.stack(rows[: self.degree + 1])
        # Products summed, not a matrix product: that may be computed in TF32, which is not enough here.
        gram = xp.sum(basis[:, None] * basis[None], -1)
        border = xp.concatenate((xp.stack(value[: self.degree + 1]), xp.zeros_like(at)))[None]
        matrix = xp.concatenate((xp.concatenate((gram, basis), axis=1), border))
        for pivot in range(self.degree + 1):
            row = matrix[pivot] / (matrix[pivot, pivot] + self.ridge)
            matrix = matrix - matrix[:, pivot][:, None] * row[None]
        return -matrix[-1, self.degree + 1 :]


@dataclass(frozen=True)
class Table(_Forecast):
    """Weights that were worked out for a mask: ``rows`` of (call, last computed call, weights of the stored tensors).

    A call that has no row, or comes after another computed call than its row was made for, repeats the newest.
    """

    rows: tuple[tuple[int, int, tuple[float, ...]], ...]
    history: int
    of: str = "value"
    name: ClassVar[str] = "table"

    def weights(self, calls: Array, control: Control) -> Sequence[Array]:
        xp = namespace(calls, *control)
        one = xp.ones_like(as_float32(control.step))
        weights = [one, *(xp.zeros_like(one) for _ in range(self.history - 1))]
        for call, computed, row in self.rows:
            here = (control.step == call) & (calls[0] == computed)
            weights = [xp.where(here, xp.full_like(one, w), old) for w, old in zip(row, weights, strict=True)]
        return weights


def rows_of_mask(bits: str, weights: Sequence[float], history: int) -> tuple[tuple[int, int, tuple[float, ...]], ...]:
    """`Table.rows` for a mask: ``weights`` has ``history`` numbers for each of its reused calls, in order."""
    rows: list[tuple[int, int, tuple[float, ...]]] = []
    computed = 0
    for call, bit in enumerate(bits):
        if bit == "1" or call == 0:
            computed = call
        else:
            own = weights[len(rows) * history : (len(rows) + 1) * history]
            rows.append((call, computed, tuple(map(float, own))))
    return tuple(rows)
