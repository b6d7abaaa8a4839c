"""One run of an engine that holds a sampler: the state between its chunks, and the noise that it begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.backends import sampler_inputs as read
from hasten.backends.engine import Engine
from hasten.errors import UsageError
from hasten.passes.solvers import loop, names
from hasten.passes.solvers.seeds import of_picture

if TYPE_CHECKING:
    import torch


class Chunk(NamedTuple):
    """What is known after some rows: rows done and in all, latents and the clean sample predicted by now, (B, ...)."""

    done: int
    rows: int
    latents: torch.Tensor
    preview: torch.Tensor


class Sampled(NamedTuple):
    """``latents`` and ``preview`` (the last predicted x0) (B, ...) float32; ``decisions``: 1 computed, 0 reused.

    ``pixels`` are what the engine's decoder makes of the latents, None without one.
    """

    latents: torch.Tensor
    preview: torch.Tensor
    decisions: str
    pixels: torch.Tensor | None = None


class SamplerRun:
    """``rows`` evaluations, of which ``done`` are done (those before the start of a run from a picture among them).

    The engine is given the rows behind the start alone, and numbers them from 0. The state belongs to the run: leave
    it, and nothing else notices. ``warn`` is told what a step cache decided, when all is done.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int,
        first: int,
        held: Mapping[str, torch.Tensor],
        given: Mapping[str, torch.Tensor],
        warn: Callable[[str], object] | None = None,
    ) -> None:
        device = engine.target.device
        self.engine, self.rows, self.done = engine, rows, first
        self._before, self._warn = first, warn
        self._unrolled = (engine.manifest.loop or {}).get("unrolled") is not None
        self._given = {name: tensor.to(device) for name, tensor in given.items()}
        self._held = {name: tensor.to(device) for name, tensor in held.items()}

    @property
    def decisions(self) -> str:
        """What a step cache did so far: 1 computed, 0 reused; empty without one."""
        found = self._held[names.DECISIONS].tolist() if names.DECISIONS in self._held else []
        return "".join(str(d) for d in found if d >= 0)

    def time(self, row: int) -> float:
        """What the network is told in ``row``."""
        return float(self._given[loop.PREFIX + "time"][row - self._before])

    def call(self, first: int, stop: int) -> dict[str, torch.Tensor]:
        """One call of the engine, from the run's state and without a change to it: for measurements."""
        device = self.engine.target.device
        if self._unrolled and (first, stop) != (0, self.rows - self._before):
            raise UsageError(
                f"engine {self.engine.path.name!r} has its {self.rows} rows one behind another and does them in one "
                "call; leave out what asks for some of them (chunk, callback_on_step_end), or build it with "
                "--cache-form conditional"
            )
        limits = {} if self._unrolled else {names.FIRST: whole(first, device), names.STOP: whole(stop, device)}
        return self.engine(**self._given, **self._held, **limits)

    def advance(self, rows: int = 1) -> Chunk:
        """Do ``rows`` more rows, or what is left of them."""
        rows = read.whole("rows", rows)
        if self.done == self.rows:
            raise UsageError(f"the run has {self.rows} rows and did them all; begin another")
        stop = min(self.done + rows, self.rows)
        made = self.call(self.done - self._before, stop - self._before)
        self._held = {name: made.get(names.NEXT + name, held) for name, held in self._held.items()}
        self.done = stop
        if stop == self.rows and self._warn is not None:
            self._warn(self.decisions)
        return Chunk(stop, self.rows, made[names.RESULT], made[names.PREVIEW])


class Draw:
    """Unit noise, call after call: as diffusers draws it with a generator, else of each picture's own number.

    ``seed`` is one for all, with which picture i's place counts, or one for each picture, as if it were alone.
    """

    def __init__(self, shape: tuple[int, ...], seed: int | Sequence[int], generator: Any) -> None:
        import torch

        many = {"generators": generator} if isinstance(generator, Sequence) else {}
        many |= {"seeds": seed} if isinstance(seed, Sequence) else {}
        for what, found in many.items():
            if len(found) != shape[0]:
                raise UsageError(f"{len(found)} {what} were given for {shape[0]} pictures; give one, or one each")
        pairs = [(s, 0) for s in seed] if isinstance(seed, Sequence) else [(seed, i) for i in range(shape[0])]
        self.shape = shape
        self.generator = generator or [torch.Generator().manual_seed(of_picture(*pair)) for pair in pairs]

    def __call__(self) -> torch.Tensor:
        from hasten.passes.solvers.draw import unit_noise

        return unit_noise(self.shape, self.generator, "cpu")


def whole(value: int, device: str) -> torch.Tensor:
    import torch

    return torch.tensor(value, dtype=torch.int64, device=device)
