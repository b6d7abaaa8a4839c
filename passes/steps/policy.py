"""What a step cache is made of: a decision, a payload, a granularity, a branch mode.

A *decision* says whether model call n of a run computes; a *payload* says what stands for the region's result where it
does not, and what is kept from a call that did. Both are pure functions of arrays, in the namespace of the arrays
they are given: numpy here, torch when a graph is traced from them. State is a dict of arrays, and every state that a
graph carries is declared by `Slot`s, so that its size is known before anything runs.

A region maps a stream ``before`` to ``after``. The compiled call is::

    state, compute = decision.decide(state, signal, control)
    if compute:  after = region(before)
                 state = decision.observe(state, tap, before, after, control)
                 state = payload.store(state, before, after, control)
    else:        after = payload.reuse(state, before, control)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = Any
"""A numpy array or scalar, or a torch tensor."""

State = dict[str, Array]

DECIDE, REUSE, COMPUTE = -1, 0, 1
"""What ``Control.force`` may say."""


class Control(NamedTuple):
    """What the caller says of one model call. All are 0-d arrays, inputs of the compiled graph: none needs a rebuild.

    ``step`` int64: number of the call in its run, from 0, counted for each branch. ``steps`` int64: calls in the run,
    0 where unknown. ``force`` int64: `DECIDE`, `REUSE` or `COMPUTE`. ``threshold`` float32. ``limit`` int64: most
    consecutive reuses, negative for any number.
    """

    step: Array
    steps: Array
    force: Array
    threshold: Array
    limit: Array


@dataclass(frozen=True)
class Slot:
    """One array of state. ``like``: ``""`` for a scalar, else the value whose shape and type it has.

    ``signal`` is what the decision looks at, ``tap`` what it looks at inside the region, ``before`` and ``after`` are
    the region's stream. ``copies`` is the size of a leading axis (a ring of stored tensors), 0 for none. ``dtype`` is
    numpy's name, empty for the type of ``like``. The array starts as ``start`` everywhere.
    """

    like: str = ""
    dtype: str = ""
    copies: int = 0
    start: float = 0.0


class Decision(Protocol):
    """When to compute. Implementations are frozen dataclasses whose fields are the policy's options."""

    name: ClassVar[str]
    tap: ClassVar[str]
    """What `observe` is given from inside the region: ``""`` or ``attention-residual``."""

    @property
    def signal(self) -> str:
        """What `decide` is given from outside the region.

        ``modulated`` (block 0's first modulated normalisation), ``time-embedding``, ``probe`` (residual of the first
        blocks), ``input`` (the model's input), or ``""`` for nothing.
        """

    @property
    def threshold(self) -> float:
        """The initial value of ``Control.threshold``."""

    @property
    def limit(self) -> int:
        """The initial value of ``Control.limit``."""

    def slots(self) -> Mapping[str, Slot]:
        """The decision's state."""

    def decide(self, state: State, signal: Array | None, control: Control) -> tuple[State, Array]:
        """Return the next state and a 0-d bool: whether to compute. Step 0 of a run always computes."""

    def observe(self, state: State, tap: Array | None, before: Array, after: Array, control: Control) -> State:
        """Take note of a call that computed; runs inside the compute branch."""

    def forced(self, steps: int) -> npt.NDArray[np.int64]:
        """``Control.force`` for each call of a run of ``steps`` calls, before any wish of the user's."""

    def mask(self, steps: int) -> npt.NDArray[np.bool_] | None:
        """The whole run's decisions where they depend on nothing but the step (True computes), else None."""


class Payload(Protocol):
    """What a reused call returns. Implementations are frozen dataclasses."""

    name: ClassVar[str]

    def slots(self) -> Mapping[str, Slot]:
        """The payload's state."""

    def store(self, state: State, before: Array, after: Array, control: Control) -> State:
        """Return the next state after a call that computed."""

    def reuse(self, state: State, before: Array, control: Control) -> Array:
        """Return what stands for ``after``."""


@dataclass(frozen=True)
class Policy:
    """A decision, a payload and where they act.

    ``granularity``: ``output`` (the whole model), ``stack`` (all blocks), ``tail`` (all but ``head`` first and
    ``foot`` last blocks), ``modules`` (each module named in ``modules``), ``deep`` (the inner levels of a UNet,
    ``level`` counted from the outermost). ``branches``: ``joint`` (one decision for the whole batch), ``separate``
    (a state for each guidance branch) or ``conditional`` (the conditional branch decides for both).
    """

    name: str
    decision: Decision
    payload: Payload
    granularity: str = "stack"
    branches: str = "joint"
    head: int = 0
    foot: int = 0
    level: int = 1
    modules: tuple[str, ...] = ()

    def slots(self) -> dict[str, Slot]:
        """All state, decision first."""
        return {**self.decision.slots(), **self.payload.slots()}


def namespace(*arrays: Array) -> Any:
    """Return the module whose functions these arrays take: torch where one is a tensor, else numpy."""
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(a, torch.Tensor) for a in arrays):
        return torch
    return np


def relative_l1(new: Array, old: Array) -> Array:
    """``mean|new - old| / mean|old|`` over all elements, in float32: 0 for 0/0, infinity for anything else over 0."""
    return ratio(mean_abs(as_float32(new) - as_float32(old)), mean_abs(old))


def mean_abs(array: Array) -> Array:
    """``mean|array|`` over all elements, in float32."""
    xp = namespace(array)
    return xp.mean(xp.abs(as_float32(array)))


def ratio(change: Array, size: Array) -> Array:
    """``change / size`` of two numbers that are not negative: 0 for 0/0, infinity for anything else over 0."""
    xp = namespace(change, size)
    quotient = change / xp.where(size > 0, size, xp.ones_like(size))
    beyond = xp.where(change > 0, xp.full_like(change, float("inf")), xp.zeros_like(change))
    # A NaN in `size` makes size > 0 false; it must not be taken for zero.
    return xp.where(size > 0, quotient, xp.where(size == 0, beyond, xp.full_like(change, float("nan"))))


def as_float32(array: Array) -> Array:
    """The same numbers in float32, where they are not yet."""
    if namespace(array) is np:
        return np.asarray(array, np.float32)
    return array.float()


def settle(wanted: Array, count: Array, control: Control) -> tuple[Array, Array]:
    """Apply what stands above every policy, and count consecutive reuses.

    ``wanted`` is the policy's own wish to compute. The first step computes whatever is asked; ``control.force`` goes
    before the wish; a reuse past ``control.limit`` computes. Returns (compute, next count of consecutive reuses).
    """
    xp = namespace(wanted, count, *control)
    full = (control.limit >= 0) & (count >= control.limit)
    decide = control.force == DECIDE
    # In logical operators: ONNX Runtime has no Where of booleans.
    free = (decide & (wanted | full)) | (~decide & (control.force == COMPUTE))
    compute = free | (control.step == 0)
    return compute, xp.where(compute, xp.zeros_like(count), count + 1)
