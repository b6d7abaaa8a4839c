"""`SolverTable`: a sampler as a table of coefficients, one row per network evaluation.

Every deterministic or stochastic sampler whose update is linear in the latents is the same program::

    y = input[i] . S                   # what the network sees
    f = network(y, time[i])
    m = cy[i] * y + cf[i] * f          # what the solver integrates: for the builders here the predicted clean sample x0
    S = A[i] @ S + B[i] * m + C[i] * z

over a state ``S`` of K latents that starts as ``(init * x, 0, ..., 0)``; the result is ``output . S`` after the last
row. A row is one network evaluation, not one "step", so that methods with several evaluations a step are rows as well.
The builders keep what the network sees next as the first latent, so their ``input`` and ``output`` are (1, 0, ...).

M evaluations, K carried latents. Tables are float64 numpy arrays on the host and are never computed with anything
narrower; a loop rounds them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.passes.solvers.hooks import Clip, Threshold

Array = npt.NDArray[np.float64]


def _unset() -> Array:
    return np.empty(0)


@dataclass(frozen=True, eq=False)
class SolverTable:
    """Coefficients of a sampler; all arrays are float64, finite and read-only.

    ``time`` (M,) is fed to the network; ``input`` (M, K) forms its input; ``cy`` and ``cf`` (M,) turn its output into
    ``m``; ``A`` (M, K, K), ``B`` and ``C`` (M, K) update the state; ``output`` (K,) forms the result; ``init`` scales
    unit noise to the first latent. Rows whose ``C`` is zero take no noise.

    Beyond the plain recurrence: ``clean`` (M, 2) gives the predicted x0 as ``clean[i] . (y, m)``, for hooks and
    previews (default: m is x0). ``direct`` (M, K) adds ``direct[i] * f``, past a hook. ``network`` (M,) numbers the
    network that row i evaluates and ``condition`` (M, K) forms its second input, for methods with several networks;
    a network has one where any of its rows does. ``level`` (M + 1, 2) are signal and noise of what the network sees,
    and of the result; zero where that is not known. ``hook`` is what happens to the predicted x0 before the solver uses
    it, which the coefficients do not hold.
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
    clean: Array = field(default_factory=_unset)
    direct: Array = field(default_factory=_unset)
    condition: Array = field(default_factory=_unset)
    level: Array = field(default_factory=_unset)
    network: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    hook: Clip | Threshold | None = None

    def __post_init__(self) -> None:
        m, k = len(self.time), len(self.output)
        defaults = {
            "clean": np.tile([0.0, 1.0], (m, 1)),
            "direct": np.zeros((m, k)),
            "condition": np.zeros((m, k)),
            "level": np.zeros((m + 1, 2)),
            "network": np.zeros(m),
        }
        wanted = {"time": (m,), "input": (m, k), "A": (m, k, k), "B": (m, k), "C": (m, k), "cy": (m,), "cf": (m,)}
        wanted |= {"output": (k,), "clean": (m, 2), "direct": (m, k), "condition": (m, k), "network": (m,)}
        wanted["level"] = (m + 1, 2)
        for name, shape in wanted.items():
            array = np.array(getattr(self, name), np.float64)
            if name in defaults and not array.size:
                array = defaults[name]
            if not np.isfinite(array).all():
                raise UsageError(f"solver table: {name} has a value that is not finite; no sampler can run it")
            if array.shape != shape:
                raise UsageError(
                    f"solver table: {name} has shape {array.shape}, but {m} evaluations over {k} latents need {shape}"
                )
            if name == "network":
                array = array.astype(np.int64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not m:
            raise UsageError("solver table: there is no row; a sampler evaluates a network at least once")

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

    @property
    def conditioned(self) -> frozenset[int]:
        """The networks that have a second input."""
        return frozenset(int(n) for n in self.network[self.condition.any(axis=1)])

    def fold(self) -> SolverTable:
        """Move the conversion of the network's output into A and B: the same sampler with ``cy = 0``, ``cf = 1``.

        A hook has no place in it, so that what applies one takes the table as it is, or `on_x0`.
        Folding in float64 also spares a low-precision loop the cancellation of ``(y - b f) / a`` at the noisy end.
        """
        return replace(
            self,
            A=self.A + (self.B * self.cy[:, None])[:, :, None] * self.input[:, None, :],
            B=self.B * self.cf[:, None] + self.direct,
            direct=np.zeros_like(self.B),
            clean=np.stack([self.clean[:, 0] + self.clean[:, 1] * self.cy, self.clean[:, 1] * self.cf], 1),
            cy=np.zeros(len(self)),
            cf=np.ones(len(self)),
        )

    def on_x0(self) -> tuple[SolverTable, Array]:
        """Let the solver take x0 itself: ``S = A[i] @ S + B[i] * f + C[i] * z + gain[i] * x0`` over y, f and x0.

        Returns that table, ``cy = 0`` and ``cf = 1``, and ``gain`` (M, K); its ``clean`` makes x0 of y and f, on which
        the hook acts before ``gain`` does. `UsageError` for a row whose integrand says nothing about x0.
        """
        of_input, of_integrand = self.clean.T
        if not of_integrand.all():
            row = int(np.flatnonzero(of_integrand == 0)[0])
            raise UsageError(
                f"row {row} of the solver says nothing about x0, so nothing can clip or threshold it; sample without"
            )
        gain = self.B / of_integrand[:, None]
        kept = self.A - (gain * of_input[:, None])[:, :, None] * self.input[:, None, :]
        return replace(self.fold(), A=kept, B=self.direct), gain

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, steps: int, *, timesteps: Mapping[str, Any] | None = None, **step: Any
    ) -> SolverTable:
        """Build the table of a diffusers scheduler, any that is linear, by probing it; see `probe.from_scheduler`."""
        from hasten.passes.solvers.probe import from_scheduler

        return from_scheduler(scheduler, steps, timesteps=timesteps, **step)

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


def one_latent(
    *, time: Any, a: Any, b: Any, c: Any, cy: Any, cf: Any, init: float = 1.0, level: Any = ()
) -> SolverTable:
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
        level=level,
    )
