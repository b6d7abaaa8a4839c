"""What conditionals must keep to, and what a checker of them answers; the rules are in `fx` and `onnx`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.errors import HastenError

DEEPEST = 16
"""Conditionals in each other. So many were built with TensorRT-RTX; protobuf reads about twice as many."""


@dataclass(frozen=True)
class Violation:
    """One node that breaks a rule. ``rule`` is a word, ``found`` what is wrong, ``todo`` what helps."""

    node: str
    rule: str
    found: str
    todo: str

    def __str__(self) -> str:
        return f"{self.node} breaks the branch rule {self.rule!r}: {self.found}; {self.todo}"


def refuse(violations: Sequence[Violation], target: str) -> None:
    """Raise `HastenError` with the first violation; nothing where there is none."""
    if violations:
        more = f" ({len(violations) - 1} more)" if len(violations) > 1 else ""
        raise HastenError(f"target {target}: {violations[0]}{more}")
