"""Run a solver table: one plain loop over one step function.

Arrays stay in the caller's namespace: everything here is ``+`` and ``*`` on what the caller passed, torch tensors or
numpy arrays alike. The state is kept in float32 or better, whatever the network's type is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hasten.errors import UsageError
from hasten.passes.solvers.table import SolverTable

Array = Any  # a torch.Tensor or a numpy.ndarray


def step(
    table: SolverTable, index: int, state: Sequence[Array], prediction: Array, noise: Array | None = None
) -> list[Array]:
    """Return the K latents after evaluation ``index`` of a folded table.

    ``prediction`` is the network's output for `network_input`, ``noise`` the row's noise latent where it takes one.
    """
    after = []
    for carry, gain, kick in zip(table.A[index], table.B[index], table.C[index], strict=True):
        terms = [(float(w), latent) for w, latent in zip(carry, state, strict=True)]
        terms += [(float(gain), prediction), (float(kick), noise)]
        after.append(_weighted(terms, like=prediction))
    return after


def network_input(table: SolverTable, index: int, state: Sequence[Array]) -> Array:
    """Form what the network sees at evaluation ``index``."""
    return _weighted([(float(w), s) for w, s in zip(table.input[index], state, strict=True)], like=state[0])


def sample(
    denoise: Callable[[Array, float], Array],
    table: SolverTable,
    x: Array,
    *,
    noise: Sequence[Array] | None = None,
    callback: Callable[[int, float, Array], object] | None = None,
) -> Array:
    """Sample with ``denoise(y, t)`` from unit noise ``x``; returns an array of x's shape, float32 or better.

    ``y`` has x's shape and type, ``t`` is a float from the table's time column, and the network's output may have any
    floating type. ``noise`` holds one unit-noise array for each of ``table.noisy``. ``callback(i, t, x)`` sees the
    latents after every evaluation; what it raises ends the loop.
    """
    needed = len(table.noisy)
    given = 0 if noise is None else len(noise)
    if given != needed:
        raise UsageError(
            f"sample: the solver adds noise in {needed} of {len(table)} rows; {given} noise arrays were given"
        )
    table = table.fold()
    wide = _wide(x)
    state = [wide * table.init, *(wide * 0.0 for _ in range(table.width - 1))]
    draws = iter(noise if noise is not None else ())
    for i, time in enumerate(table.time.tolist()):
        seen = network_input(table, i, state)
        prediction = _wide(denoise(_as(seen, x), time))
        state = step(table, i, state, prediction, _wide(next(draws)) if table.C[i].any() else None)
        if callback is not None:
            callback(i, time, _result(table, state))
    return _result(table, state)


def _result(table: SolverTable, state: Sequence[Array]) -> Array:
    return _weighted([(float(w), s) for w, s in zip(table.output, state, strict=True)], like=state[0])


def _weighted(terms: Sequence[tuple[float, Array]], *, like: Array) -> Array:
    """Add the terms whose weight is not zero; a weight of one is not multiplied."""
    total = None
    for weight, array in terms:
        if weight != 0:
            scaled = array if weight == 1 else array * weight
            total = scaled if total is None else total + scaled
    return like * 0.0 if total is None else total


def _wide(x: Array) -> Array:
    """``x`` in float32, or as it is in float64; numpy arrays have ``astype``, torch tensors ``float``."""
    if str(x.dtype).endswith("float64"):
        return x
    return x.astype("float32") if hasattr(x, "astype") else x.float()


def _as(x: Array, like: Array) -> Array:
    return x.astype(like.dtype, copy=False) if hasattr(x, "astype") else x.to(like.dtype)
