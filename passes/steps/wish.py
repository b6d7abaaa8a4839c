"""What is asked of a search for a region."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import UsageError
from hasten.passes.steps.policy import Policy

_SIGNALS = {"stack": "modulated", "output": "input"}
"""What is looked at where a granularity alone is asked for; a tail with blocks before it has a probe."""


@dataclass(frozen=True)
class Wish:
    """The fields of a `Policy` that say where it acts and what it looks at, and what only the user can know.

    ``region`` is ``FIRST:LAST``, as Python's slices: blocks from FIRST up to LAST, which is left out; it goes before
    ``head`` and ``foot``. ``time`` is the name of the timestep's input, where it cannot be told from the names.
    """

    granularity: str = "stack"
    head: int = 0
    foot: int = 0
    level: int = 1
    modules: tuple[str, ...] = ()
    signal: str = ""
    tap: str = ""
    region: str | None = None
    time: str | None = None

    @classmethod
    def of(cls, asked: Policy | Wish | str, region: str | None = None, time: str | None = None) -> Wish:
        """From a policy, or a granularity with the values that are usually looked at there."""
        if isinstance(asked, Wish):
            return asked
        if isinstance(asked, str):
            return cls(asked, signal=_SIGNALS.get(asked, ""), region=region, time=time)
        return cls(
            granularity=asked.granularity,
            head=asked.head,
            foot=asked.foot,
            level=asked.level,
            modules=asked.modules,
            signal=asked.decision.signal,
            tap=asked.decision.tap,
            region=region,
            time=time,
        )

    def blocks(self, number: int) -> tuple[int, int]:
        """First and last (left out) of a graph's ``number`` blocks; `UsageError` where that is none."""
        if self.region is None:
            first, last = self.head, number - self.foot
            if first >= last:
                raise UsageError(
                    f"{self.granularity}: {self.head} blocks before the region and {self.foot} after it leave none of "
                    f"the graph's {number}; ask for fewer"
                )
            return first, last
        parts = self.region.split(":")
        try:
            start, stop = (int(part) if part.strip() else None for part in parts)
        except ValueError:
            raise UsageError(
                f"region {self.region!r} is not FIRST:LAST; give two numbers of blocks, such as 1:{number}"
            ) from None
        first, last, _ = slice(start, stop).indices(number)
        if first >= last or (stop or 0) > number:
            raise UsageError(
                f"region {self.region!r} holds no block, or one that is not there; the graph has 0 to {number - 1}"
            )
        return first, last
