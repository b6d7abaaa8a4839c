"""Picard sampling by an engine of a `PicardWindow`: a sweep is one call of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hasten.backends import sampler_inputs as read
from hasten.backends.engine import Engine
from hasten.backends.picard_window import CHANGES, FOUND, MOVES, STATES
from hasten.errors import UsageError
from hasten.passes.solvers import loop, names
from hasten.passes.solvers.picard_loop import Picard, Sizes, State, allowed_changes, slide
from hasten.passes.solvers.picard_window import padded, rows_from
from hasten.passes.solvers.plan import NEGATIVE
from hasten.passes.solvers.sample import check_call
from hasten.passes.solvers.table import SolverTable


def picard_engine(
    engine: Engine,
    table: SolverTable,
    x: torch.Tensor,
    *,
    tolerance: float,
    window: int | None = None,
    noise: Sequence[torch.Tensor] | None = None,
    unit: Sequence[float] | None = None,
    acceleration: int = 0,
    guidance_scale: float | None = None,
    **conditions: torch.Tensor,
) -> Picard:
    """Do what `picard` does from unit noise ``x`` (B, ...), with ``engine`` for all of a sweep.

    ``window`` is the engine's own unless a smaller one is given; ``guidance_scale`` is for an engine with guidance, and
    ``conditions`` (B, ...) are the network's, by name. Tensors are brought to the engine's device, where the result,
    (B, ...) float32, stays. Only the first sweep looks for NaN in what it is given: states may have some on the way,
    which does not last. `UsageError` for a table with a hook on x0, with two networks or wider than the engine, and for
    what `picard` refuses.
    """
    sweeper = Sweeper(engine, table, () if noise is None else noise, guidance_scale, **conditions)
    window = sweeper.window if window is None else window
    if window > sweeper.window:
        raise UsageError(
            f"picard: the window is {window}, and engine {engine.path.name!r} was built for {sweeper.window} rows; "
            f"give at most that, or build it with window={window}"
        )
    first = sweeper.first(x)
    allowed = allowed_changes(table, first[0], window, tolerance, unit)
    looked = engine.check_inputs

    def sweep(span: range, states: Sequence[State]) -> tuple[Sequence[State], Sizes, int]:
        found, sizes = sweeper(span, states, exact=allowed is None)
        engine.check_inputs = False
        return found, sizes, 1

    try:
        return slide(sweep, table, first, window, allowed, acceleration)
    finally:
        engine.check_inputs = looked


class Sweeper:
    """A window's engine, with all that it is given beside the states in place.

    ``window`` rows and ``history`` latents are the most that it takes, ``latents`` (B, ...) the sizes of x.
    """

    def __init__(
        self,
        engine: Engine,
        table: SolverTable,
        noise: Sequence[torch.Tensor] = (),
        guidance_scale: float | None = None,
        **conditions: torch.Tensor,
    ) -> None:
        sizes = {t.name: t.shape for t in engine.inputs}
        made = {t.name for t in engine.outputs}
        if STATES not in sizes or made != {FOUND, CHANGES, MOVES}:
            raise UsageError(
                f"picard: engine {engine.path.name!r} holds no window; build one of a `PicardWindow` of the network"
            )
        before, self.history, *latents = (int(size) for size in sizes[STATES])
        self.engine, self.table, self.window, self.latents = engine, table, before - 1, tuple(latents)
        rows = padded(table, self.window, self.history)
        check_call(table, 1, len(noise))
        self._given = self._conditions(conditions) | self._scale(guidance_scale)
        self._given = {name: tensor.to(self._device) for name, tensor in self._given.items()}
        self._rows = rows._replace(**{n: torch.from_numpy(c).to(self._device) for n, c in rows._asdict().items()})
        self._noise = self._drawn(noise)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """The state before the first row, (K, B, ...), of unit noise (B, ...)."""
        start = read.fits("picard: x", read.tensor("picard: x", x), self.latents).to(self._device)
        return torch.stack([start * self.table.init, *[torch.zeros_like(start)] * (self.history - 1)])

    def __call__(self, span: range, states: Sequence[State], *, exact: bool) -> tuple[list[torch.Tensor], Sizes]:
        """The states behind each row of ``span``, (K, B, ...), and how much they have changed, (R, B) on the host."""
        rows = rows_from(self._rows, span.start, self.window)._asdict()
        given = self._given | {loop.PREFIX + name: column for name, column in rows.items()}
        if self._noise is None:
            del given[loop.PREFIX + "kick"]
        else:
            given[names.NOISE] = self._noise[span.start : span.start + self.window]
        held = [state if isinstance(state, torch.Tensor) else torch.stack([*state]) for state in states]
        held += held[-1:] * (self.window + 1 - len(held))
        made = self.engine(**given, **{STATES: torch.stack(held[: self.window + 1])})
        sizes = np.asarray(made[MOVES if exact else CHANGES].tolist())
        return list(made[FOUND][: len(span)]), sizes[: len(span)]

    @property
    def _device(self) -> str:
        return self.engine.target.device

    def _takes(self, name: str) -> bool:
        return any(t.name == name for t in self.engine.inputs)

    def _conditions(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = (STATES, names.SCALE, names.NOISE)
        wanted = [t.name for t in self.engine.inputs if t.name not in own and not t.name.startswith(loop.PREFIX)]
        for name in given:
            if name not in wanted:
                raise UsageError(f"picard: the network takes no {name!r}; it takes {', '.join(wanted) or 'nothing'}")
        for name in wanted:
            if name not in given:
                why = ", what the network is told for no condition; guidance needs it" if name[:9] == NEGATIVE else ""
                raise UsageError(f"picard: {name!r} is missing{why}; give {', '.join(wanted)}")
        return read.tensors(given)

    def _scale(self, scale: float | None) -> dict[str, torch.Tensor]:
        if self._takes(names.SCALE):
            if scale is None:
                raise UsageError("picard: guidance_scale is missing; the window was built with guidance, and needs it")
            return {names.SCALE: torch.tensor(read.number("guidance_scale", scale, 0))}
        if scale not in (None, 1):
            raise UsageError(
                f"picard: guidance_scale {scale} was given for a window without guidance; build it with guided=True"
            )
        return {}

    def _drawn(self, noise: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Noise for every row, (M + W, B, ...), zeros where the table adds none; None where the window has no place."""
        if not self._takes(names.NOISE):
            if len(noise):
                raise UsageError(
                    f"picard: the solver adds noise in {len(noise)} rows, and the window was built for solvers that "
                    "add none; build it with noise=True"
                )
            return None
        found = torch.zeros(len(self.table) + self.window, *self.latents)
        for i, kick in zip(self.table.noisy, noise, strict=True):
            found[i] = read.fits("picard: noise", read.tensor("picard: noise", kick), self.latents)
        return found.to(self._device)
