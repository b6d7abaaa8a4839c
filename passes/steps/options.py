"""A policy's options: how they are declared, read from text or JSON, checked, and written back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError, nearest

KINDS = {
    "number": "a number",
    "integer": "a whole number",
    "flag": "true or false",
    "text": "a word",
    "numbers": "numbers with '/' between them",
    "words": "words with '/' between them",
    "integers": "whole numbers with '/' between them",
}


@dataclass(frozen=True)
class Option:
    """One option. ``kind`` is a key of `KINDS`; numbers go from ``low`` to ``high``, words are one of ``choices``.

    A ``default`` of None: not set.
    """

    kind: str
    meaning: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def read(self, where: str, value: Any) -> Any:
        """Return the value in the option's type, from text or from JSON; ``where`` begins the message otherwise."""
        if self.kind in ("numbers", "integers"):
            parts = value.split("/") if isinstance(value, str) else value
            if not isinstance(parts, (list, tuple)) or not parts:
                raise self._unread(where, value)
            return tuple(self._number(where, part, whole=self.kind == "integers") for part in parts)
        if self.kind in ("number", "integer"):
            return self._number(where, value, whole=self.kind == "integer")
        if self.kind == "flag":
            if value in ("true", "false", True, False):
                return value in ("true", True)
            raise self._unread(where, value)
        if self.kind == "words":
            parts = value.split("/") if isinstance(value, str) else value
            if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) and p for p in parts):
                raise self._unread(where, value)
            return tuple(parts)
        if not isinstance(value, str):
            raise self._unread(where, value)
        if self.choices and value not in self.choices:
            raise UsageError(f"{where}: {value!r} is none of {', '.join(self.choices)}.{nearest(value, self.choices)}")
        return value

    def _number(self, where: str, value: Any, *, whole: bool) -> float | int:
        if isinstance(value, bool):
            raise self._unread(where, value)
        try:
            number = int(value) if isinstance(value, str) and whole else float(value)
        except (TypeError, ValueError):
            raise self._unread(where, value) from None
        if math.isnan(number) or (whole and number != int(number)):
            raise self._unread(where, value)
        if not self.low <= number <= self.high:
            bounds = f"from {self.low:g}" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"
            raise UsageError(f"{where}: {number:g} was given; it goes {bounds} ({self.meaning})")
        return int(number) if whole else number

    def _unread(self, where: str, value: Any) -> UsageError:
        return UsageError(f"{where}: {value!r} is not {KINDS[self.kind]} ({self.meaning})")


def write(value: Any) -> str:
    """An option's value as text that `Option.read` reads back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "/".join(write(v) for v in value)
    return repr(value) if isinstance(value, float) else str(value)


def read_all(policy: str, declared: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every declared option of ``policy``, given or default; `UsageError` for one that is not declared."""
    for key in given:
        if key not in declared:
            valid = ", ".join(declared) or "none"
            raise UsageError(f"{policy} has no option {key!r}; its options: {valid}.{nearest(key, declared)}")
    values = {key: option.default for key, option in declared.items()}
    return values | {key: declared[key].read(f"{policy}: {key}", value) for key, value in given.items()}


@dataclass(frozen=True)
class Request:
    """A name with every option's value; its text reads back to the same request."""

    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        given = [f"{key}={write(value)}" for key, value in self.options.items() if value is not None]
        return f"{self.name}:{','.join(given)}" if given else self.name
