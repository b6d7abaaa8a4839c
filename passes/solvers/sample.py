"""Run a solver table: one plain loop over one step function.

Arrays stay in the caller's namespace: everything here is ``+`` and ``*`` on what the caller passed, torch tensors or
numpy arrays alike. The state is kept in float32 or better, whatever the network's type is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hasten.errors import UsageError
from hasten.passes.solvers.hooks import Hook
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
        terms = [*_terms(carry, state), (float(gain), prediction), (float(kick), noise)]
        after.append(_weighted(terms, like=prediction))
    return after


def network_input(table: SolverTable, index: int, state: Sequence[Array]) -> Array:
    """Form what the network sees at evaluation ``index``."""
    return combined(table.input[index], state)


def sample(
    denoise: Callable[..., Array] | Sequence[Callable[..., Array]],
    table: SolverTable,
    x: Array,
    *,
    noise: Sequence[Array] | None = None,
    hook: Hook | None = None,
    callback: Callable[[int, float, Array], object] | None = None,
) -> Array:
    """Sample with ``denoise(y, t)`` from unit noise ``x``; returns an array of x's shape, float32 or better.

    ``y`` has x's shape and type, ``t`` is a float from the table's time column, and the network's output may have any
    floating type. ``noise`` holds one unit-noise array for each of ``table.noisy``. ``hook(x0)`` replaces the predicted
    x0 before the solver uses it, the table's own unless given: see `hooks`. ``callback(i, t, x)`` sees the latents
    after every evaluation; what it raises ends the loop. A table of several networks takes a sequence of them; one that
    has a second input is called ``network(y, t, condition)``.
    """
    networks = [denoise] if callable(denoise) else list(denoise)
    check_call(table, len(networks), 0 if noise is None else len(noise))
    hook = hook or table.hook
    table = table if hook else table.fold()
    wide = widened(x)
    state = [wide * table.init, *(wide * 0.0 for _ in range(table.width - 1))]
    draws = iter(noise if noise is not None else ())
    conditioned = table.conditioned
    for i, time in enumerate(table.time.tolist()):
        seen = network_input(table, i, state)
        given = [typed_like(seen, x), time]
        if table.network[i] in conditioned:
            given.append(typed_like(combined(table.condition[i], state), x))
        prediction = widened(networks[table.network[i]](*given))
        draw = widened(next(draws)) if table.C[i].any() else None
        state = (
            hooked_step(table, i, state, prediction, draw, hook) if hook else step(table, i, state, prediction, draw)
        )
        if callback is not None:
            callback(i, time, combined(table.output, state))
    return combined(table.output, state)


def check_call(table: SolverTable, networks: int, given: int) -> None:
    wanted, needed = int(table.network.max()) + 1, len(table.noisy)
    if networks != wanted:
        raise UsageError(f"sample: the solver evaluates {wanted} networks; {networks} were given")
    if given != needed:
        raise UsageError(
            f"sample: the solver adds noise in {needed} of {len(table)} rows; {given} noise arrays were given"
        )


def hooked_step(
    table: SolverTable, index: int, state: Sequence[Array], prediction: Array, noise: Array | None, hook: Hook
) -> list[Array]:
    """Do what `step` does, on a table that is not folded, with the hook on the predicted x0 in between."""
    of_input, of_integrand = table.clean[index].tolist()
    if of_integrand == 0:
        raise UsageError(f"sample: row {index} says nothing about x0, which the hook is for; sample without it")
    seen = network_input(table, index, state)
    integrand = _weighted([(float(table.cy[index]), seen), (float(table.cf[index]), prediction)], like=prediction)
    x0 = hook(_weighted([(of_input, seen), (of_integrand, integrand)], like=prediction))
    integrand = _weighted([(1 / of_integrand, x0), (-of_input / of_integrand, seen)], like=prediction)
    after = []
    for k, carry in enumerate(table.A[index]):
        extra = [(table.B[index, k], integrand), (table.direct[index, k], prediction), (table.C[index, k], noise)]
        after.append(_weighted([*_terms(carry, state), *extra], like=prediction))
    return after


def _terms(weights: Any, state: Sequence[Array]) -> list[tuple[float, Array]]:
    return [(float(w), s) for w, s in zip(weights, state, strict=True)]


def combined(weights: Any, state: Sequence[Array]) -> Array:
    return _weighted(_terms(weights, state), like=state[0])


def _weighted(terms: Sequence[tuple[float, Array]], *, like: Array) -> Array:
    """Add the terms whose weight is not zero; a weight of one is not multiplied."""
    total = None
    for weight, array in terms:
        if weight != 0:
            scaled = array if weight == 1 else array * float(weight)
            total = scaled if total is None else total + scaled
    return like * 0.0 if total is None else total


def widened(x: Array) -> Array:
    """``x`` in float32, or as it is in float64; numpy arrays have ``astype``, torch tensors ``float``."""
    if str(x.dtype).endswith("float64"):
        return x
    return x.astype("float32") if hasattr(x, "astype") else x.float()


def typed_like(x: Array, like: Array) -> Array:
    return x.astype(like.dtype, copy=False) if hasattr(x, "astype") else x.to(like.dtype)
