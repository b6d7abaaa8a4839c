"""`SolverTable`: a sampler as a table of coefficients, one row per network evaluation.

Every deterministic or stochastic sampler whose update is linear in the latents is the same program::

    y = input[i] . S                   # what the network sees
    f = network(y, time[i])
    m = cy[i] * y + cf[i] * f          # what the solver integrates: for the builders here the predicted clean sample x0
    S = A[i] @ S + B[i] * m + C[i] * z

over a state ``S`` of K latents that starts as ``(init * x, 0, ..., 0)``; the result is ``output . S`` after the last
row. A row is one network evaluation, not one "step", so that methods with several evaluations a step are rows as well.

M evaluations, K carried latents. Tables are float64 numpy arrays on the host and are never computed with anything
narrower; a loop rounds them once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SolverTable:
    """Coefficients of a sampler; all arrays are float64, finite and read-only.

    ``time`` (M,) is fed to the network; ``input`` (M, K) forms its input; ``cy`` and ``cf`` (M,) turn its output into
    ``m``; ``A`` (M, K, K), ``B`` and ``C`` (M, K) update the state; ``output`` (K,) forms the result; ``init`` scales
    unit noise to the first latent. Rows whose ``C`` is zero take no noise.
    """

    time: Array
    input: Array
    A: Array
    B: Array
    C: Array
    cy: Array
    cf: Array
    output: Array
    init: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            array = np.array(getattr(self, field.name), np.float64)
            if not np.isfinite(array).all():
                raise UsageError(f"solver table: {field.name} has a value that is not finite; no sampler can run it")
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        m, k = len(self.time), len(self.output)
        wanted = {"time": (m,), "input": (m, k), "A": (m, k, k), "B": (m, k), "C": (m, k), "cy": (m,), "cf": (m,)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise UsageError(
                    f"solver table: {name} has shape {getattr(self, name).shape}, "
                    f"but {m} evaluations over {k} latents need {shape}"
                )

    def __len__(self) -> int:
        """Count the network evaluations, M."""
        return len(self.time)

    @property
    def width(self) -> int:
        """The number of carried latents, K."""
        return len(self.output)

    @property
    def noisy(self) -> tuple[int, ...]:
        """The rows that add noise, in order: row ``noisy[j]`` takes the j-th noise latent."""
        return tuple(int(i) for i in np.flatnonzero(self.C.any(axis=1)))

    def fold(self) -> SolverTable:
        """Move the conversion of the network's output into A and B: the same sampler with ``cy = 0``, ``cf = 1``.

        Folding in float64 also spares a low-precision loop the cancellation of ``(y - b f) / a`` at the noisy end.
        """
        return replace(
            self,
            A=self.A + (self.B * self.cy[:, None])[:, :, None] * self.input[:, None, :],
            B=self.B * self.cf[:, None],
            cy=np.zeros(len(self)),
            cf=np.ones(len(self)),
        )

    def response(self) -> Array:
        """Describe the sampler without a network: (M + 1, 1 + M + Z) coefficients on (x, f_1..f_M, z_1..z_Z).

        Row i is the network input of evaluation i, the last row is the result. Two implementations of a sampler are the
        same if and only if these matrices are.
        """
        m, noisy = len(self), self.noisy
        table, basis = self.fold(), np.eye(1 + m + len(noisy))
        state = np.zeros((self.width, basis.shape[1]))
        state[0] = self.init * basis[0]
        rows = []
        for i in range(m):
            rows.append(table.input[i] @ state)
            state = table.A[i] @ state + np.outer(table.B[i], basis[1 + i])
            if i in noisy:
                state = state + np.outer(table.C[i], basis[1 + m + noisy.index(i)])
        return np.array([*rows, self.output @ state])


def one_latent(*, time: Any, a: Any, b: Any, c: Any, cy: Any, cf: Any, init: float = 1.0) -> SolverTable:
    """Build the table of a one-step method, ``x <- a x + b m + c z`` with network input x, from vectors of length M."""
    m = len(time)
    a, b, c = (np.broadcast_to(np.asarray(v, np.float64), (m,)) for v in (a, b, c))
    return SolverTable(
        time=time,
        input=np.ones((m, 1)),
        A=a[:, None, None],
        B=b[:, None],
        C=c[:, None],
        cy=cy,
        cf=cf,
        output=np.ones(1),
        init=init,
    )
