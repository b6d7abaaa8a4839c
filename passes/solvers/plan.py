"""What a compiled sampling loop is built for: its bounds, guidance and noise, and the parts of the network's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.passes.solvers.hooks import KINDS

GUIDANCE = ("none", "batched", "sequential", "embedded")
"""``batched``: one call of twice the batch, the conditional half first. ``sequential``: two calls. ``embedded``: a
distilled network that takes the scale as an input. ``none``: one call, no scale."""
NOISE = ("none", "input", "seed")
"""``input``: one array of unit noise a row. ``seed``: made in the loop from a seed and the row's number."""

NEGATIVE = "negative_"
"""What the unconditional form of an input is called: its name with this before it."""


@dataclass(frozen=True)
class Shaped:
    """One input of the network: its numpy dtype, and its sizes for one call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class LoopPlan:
    """``rows`` and ``history`` bound the table; ``batch`` is the number of pictures, of which a call sees one or two.

    ``sample`` and ``time`` are the inputs that the loop feeds; ``scale`` the one that takes the guidance scale, if any.
    ``conditions`` are the caller's inputs with a value for each picture, ``shared`` those without. ``inpaint``: the
    loop keeps a given part of the pictures. ``follow``: a second call's step cache does what the first one's did.
    ``which`` is the input that takes the number of the network, where there are two in one, and ``beside`` the second
    picture that the second of them sees, if it does. ``hook`` is what the loop can do to x0 (`hooks.KINDS`), and
    ``sorted`` how many of the largest values of a picture it puts in order for the threshold.
    """

    rows: int
    history: int
    guidance: str
    rescale: bool
    noise: str
    inpaint: bool
    batch: int | str
    sample: Shaped
    time: Shaped
    conditions: tuple[Shaped, ...] = ()
    shared: tuple[Shaped, ...] = ()
    scale: Shaped | None = None
    follow: bool = False
    which: Shaped | None = None
    beside: Shaped | None = None
    hook: str = KINDS[0]
    sorted: int = 0

    @property
    def doubled(self) -> bool:
        """Whether one call of the network sees the batch twice."""
        return self.guidance == "batched"

    @property
    def calls(self) -> int:
        """Calls of the network a row."""
        return 2 if self.guidance == "sequential" else 1

    @property
    def guided(self) -> bool:
        """Whether there are inputs for "no condition"."""
        return self.guidance in ("batched", "sequential")

    @property
    def latents(self) -> tuple[int | str, ...]:
        """The sizes of the pictures, (B, ...)."""
        return (self.batch, *self.sample.shape[1:])

    def picture(self, given: Shaped) -> tuple[int | str, ...]:
        """The sizes of a condition as the caller gives it, (B, ...)."""
        return (self.batch, *given.shape[1:])


def check_choice(what: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value``, one of ``choices``; `UsageError` with the nearest for another."""
    if value not in choices:
        raise UsageError(f"{what} {value!r} is none of {', '.join(choices)}.{nearest(str(value), choices)}")
    return str(value)
