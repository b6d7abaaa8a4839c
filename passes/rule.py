"""A rule is three parts: spellings, guard, replacement. `apply` runs one over a graph view and says what it did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.errors import ExpectationError, UsageError, nearest
from hasten.passes.pattern import GraphView, Match, Miss, Pattern, V, inner_values, match

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """Spellings of one computation, when they may be replaced, and by what.

    ``guard(view, match)`` returns why a match must be left alone, or None. ``replace(view, match, root)`` emits the
    new nodes and returns the value that stands for ``root``; it may not touch the old ones. ``variant(match)`` names
    which kind of site it is (``silu``). A miss is reported only if it got as far as one of the ``anchors``: not every
    multiplication is a near miss of SiLU.
    """

    name: str
    spellings: tuple[tuple[str, Pattern], ...]
    replace: Callable[[GraphView[Any], Match[Any], Any], Any]
    anchors: frozenset[str]
    guard: Callable[[GraphView[Any], Match[Any]], str | None] = lambda view, found: None
    variant: Callable[[Match[Any]], str] = lambda found: ""


@dataclass(frozen=True)
class Site:
    """Where a rule fired, as which variant, and which spelling it met there."""

    where: str
    variant: str = ""
    spelling: str = ""


@dataclass(frozen=True)
class MissSite:
    """Where a rule nearly fired and why it did not."""

    where: str
    reason: str


@dataclass(frozen=True)
class RuleReport:
    """What one rule did to one graph."""

    name: str
    sites: tuple[Site, ...] = ()
    misses: tuple[MissSite, ...] = ()
    reverted: tuple[MissSite, ...] = ()

    @property
    def hits(self) -> int:
        return len(self.sites)

    def count(self, variant: str = "") -> int:
        """Sites, or those of one variant."""
        return sum(not variant or s.variant == variant for s in self.sites)

    def __add__(self, other: RuleReport) -> RuleReport:
        return RuleReport(
            self.name, self.sites + other.sites, self.misses + other.misses, self.reverted + other.reverted
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "hits": self.hits,
            "sites": [vars(s).copy() for s in self.sites],
            "misses": [{"site": m.where, "reason": m.reason} for m in self.misses],
            "reverted": [{"site": m.where, "reason": m.reason} for m in self.reverted],
        }


@dataclass
class Report:
    """What happened to a graph on its way; it ends in the engine's manifest and in ``hasten inspect``."""

    source: str = ""
    ir: str = ""
    target: str = ""
    rules: tuple[RuleReport, ...] = ()
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    """Sites whose implementation was chosen, each as `passes.choice.Choice.as_dict` says it."""
    error: float | None = None
    """Measured relative error of the rewritten model against the original in float64, where a bound was asked for."""

    def __getitem__(self, name: str) -> RuleReport:
        return next((r for r in self.rules if r.name == name), RuleReport(name))

    @property
    def reverted(self) -> list[tuple[str, MissSite]]:
        """Sites whose replacement failed verification and was taken back, with the rule's name."""
        return [(r.name, m) for r in self.rules for m in r.reverted]

    def add(self, report: RuleReport) -> None:
        """Merge with what the same rule did earlier on the way."""
        if any(r.name == report.name for r in self.rules):
            self.rules = tuple(r + report if r.name == report.name else r for r in self.rules)
        else:
            self.rules = (*self.rules, report)

    def as_dict(self) -> dict[str, Any]:
        """The schema that ``optimize``, ``inspect`` and ``build`` print with ``--json``."""
        return {**vars(self), "rules": [r.as_dict() for r in self.rules]}

    def expect(self, expected: Mapping[str, int]) -> None:
        """Raise `ExpectationError` unless each rule, or ``rule.variant``, fired exactly as often as expected."""
        names = {r.name for r in self.rules}
        wrong = []
        for key, wanted in expected.items():
            name, _, variant = key.partition(".")
            if name not in names:
                raise UsageError(
                    f"expect: no rule named {name!r} ran; rules: {', '.join(sorted(names))}.{nearest(name, names)}"
                )
            if (got := self[name].count(variant)) != wanted:
                near = "; ".join(f"{m.where}: {m.reason}" for m in self[name].misses[:3])
                wrong.append(f"{key}: {wanted} expected, {got} found" + (f" (nearest misses: {near})" if near else ""))
        if wrong:
            raise ExpectationError("; ".join(wrong))


@dataclass
class Fuel:
    """How many more rewrites may happen; None is without limit. A miscompile is bisected by lowering it."""

    left: int | None = None

    def burn(self) -> None:
        """Take one unit."""
        if self.left is not None:
            self.left -= 1

    @property
    def spent(self) -> bool:
        return self.left is not None and self.left <= 0


Verifier = Callable[[GraphView[Any], Any, Any, Match[Any]], "str | None"]


def _other_kind(view: GraphView[V], old: V, new: V) -> str | None:
    """Why ``new`` cannot stand for ``old`` whatever its content: another type, another static shape."""
    types = view.dtype(new), view.dtype(old)
    if None not in types and types[0] != types[1]:
        return f"the replacement is {types[0]}, it was {types[1]}"
    got, want = view.shape(new), view.shape(old)
    if got is None or want is None or not all(isinstance(d, int) for d in (*got, *want)) or got == want:
        return None
    return f"the replacement has shape {got}, it was {want}"


def apply(rule: Rule, view: GraphView[V], *, fuel: Fuel | None = None, verify: Verifier | None = None) -> RuleReport:
    """Rewrite every match of ``rule``, users before producers so that the largest match wins.

    ``verify(view, old, new, match)`` compares old and new value on the same inputs before anything reads the new one;
    what it returns is why the site is left as it was.
    """
    fuel = fuel or Fuel()
    view.rule = rule.name
    sites: list[Site] = []
    misses: list[MissSite] = []
    reverted: list[MissSite] = []
    claimed: set[V] = set()
    for root in reversed(list(view.values())):
        if fuel.spent:
            break
        if root in claimed or view.op(root) is None:
            continue
        closest: Miss | None = None
        for spelling, pattern in rule.spellings:
            found = match(pattern, view, root)
            if isinstance(found, Match) and (why := rule.guard(view, found)) is not None:
                found = Miss(why, tuple(found.ops))
            if isinstance(found, Match):
                new = rule.replace(view, found, root)
                why = _other_kind(view, root, new)
                if why is None and verify is not None:
                    why = verify(view, root, new, found)
                if why is not None:
                    reverted.append(MissSite(view.where(root), why))
                    view.discard()
                    logger.warning("%s at %s was taken back: %s", rule.name, view.where(root), why)
                else:
                    fuel.burn()
                    sites.append(Site(view.where(root), rule.variant(found), spelling))
                    claimed.update(inner_values(found, root))
                    view.substitute(root, new)
                closest = None
                break
            if rule.anchors.intersection(found.ops) and (closest is None or len(found.ops) > len(closest.ops)):
                closest = found
        if closest is not None:
            misses.append(MissSite(view.where(root), closest.reason))
    return RuleReport(rule.name, tuple(sites[::-1]), tuple(misses[::-1]), tuple(reverted[::-1]))
