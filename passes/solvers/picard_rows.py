"""What Picard iteration reads off a solver table: how a change travels along it, and how large a change matters."""

from __future__ import annotations

import numpy as np

from hasten.errors import UsageError
from hasten.passes.solvers.table import Array, SolverTable


def transport(table: SolverTable) -> Array:
    """Guess how a change of the state before each row changes the state behind it, (M, K, K).

    The network's part in it is not known. ParaDiGMS sums ``x_(j+1) - x_j`` over its window: it takes a change of the
    latents to travel on unchanged. Here the network's slope in each row is chosen so that what the network sees does
    so; on a table of one latent that is the same thing, and latents which hold the past move as the table says. Any
    guess has the same fixed point; this one converges in few sweeps where signal and noise have unit variance.
    """
    folded = table.fold()
    seen_by = np.concatenate([folded.input, folded.output[None]])
    change = np.eye(table.width)[0]
    level = float(seen_by[0] @ change)
    found = np.empty_like(folded.A)
    for i, (carry, gain) in enumerate(zip(folded.A, folded.B, strict=True)):
        seen, reach = float(seen_by[i] @ change), float(seen_by[i + 1] @ gain)
        # A row that the network does not see at once, such as one that sets a velocity for later, stays as it is.
        slope = (level - float(seen_by[i + 1] @ carry @ change)) / (reach * seen) if reach * seen else 0.0
        found[i] = carry + slope * np.outer(gain, folded.input[i])
        change = found[i] @ change
    return found


def unit_change(table: SolverTable) -> Array:
    """The variance of the noise that a stochastic sampler would add behind each row's input, (M,).

    That of the posterior of the next level, in ParaDiGMS (Shih et al., 2305.16317) the unit of errors whether the
    sampler is stochastic or not. A last level without noise has none, which there makes its error infinite and costs
    a sweep; here it gets the last row's that has one. `UsageError` where the table does not know its levels.
    """
    signal, noise = table.level.T
    if not (table.level[:-1].any(axis=1)).all():
        raise UsageError(
            "picard: the table has no noise levels to measure errors by; pass unit=, a variance for each row, or "
            "tolerance=0"
        )
    found = np.zeros(len(table))
    for i in range(len(table)):
        # Rows of one step may sit at the same level: the next that is less noisy counts.
        less = np.flatnonzero(noise[i + 1 :] * signal[i] < signal[i + 1 :] * noise[i])
        if less.size:
            k = i + 1 + int(less[0])
            left = noise[i] ** 2 - (signal[i] / signal[k]) ** 2 * noise[k] ** 2
            found[i] = noise[k] ** 2 * left / noise[i] ** 2
    some = found > 0
    if not some.any():
        return np.ones(len(table))  # a single step straight to the end: there is nothing to compare
    last = np.maximum.accumulate(np.where(some, np.arange(len(table)), -1))
    return np.asarray(np.where(last < 0, found[some][0], found[last]))
