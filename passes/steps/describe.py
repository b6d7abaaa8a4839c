"""A policy in words, for reports."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hasten.passes.steps.policy import Policy, Slot

_REGIONS = {
    "output": "the whole model",
    "stack": "all blocks",
    "tail": "all blocks but the first {head} and the last {foot}",
    "modules": "the modules {modules}",
    "deep": "what lies inside the {level} outermost levels",
}


def describe(policy: Policy) -> str:
    """Lines that say when it computes, what a reused call leaves out and returns, and what it keeps.

    >>> from hasten.passes.steps.catalog import parse
    >>> print(describe(parse("first-block:threshold=0.1,limit=2")))
    first-block: threshold 0.1, limit 2, at_threshold reuse, retained first 1
    looks at: probe
    leaves out: all blocks but the first 1 and the last 0; returns: residual
    keeps: reference (like signal), count (int64), residual (like after)
    """
    decision, modules = policy.decision, " and ".join(policy.modules) or "of attention and feed-forward"
    looks = [word for word in (decision.signal, decision.tap) if word] or ["the number of the call"]
    region = _REGIONS[policy.granularity].format(
        head=policy.head, foot=policy.foot, level=policy.level, modules=modules
    )
    options, payload = _options(decision), _options(policy.payload)
    keeps = ", ".join(f"{name} ({_slot(slot)})" for name, slot in policy.slots().items()) or "nothing"
    return "\n".join(
        (
            f"{policy.name}: {options}" if options else policy.name,
            f"looks at: {', '.join(looks)}",
            f"leaves out: {region}; returns: {policy.payload.name}{f' ({payload})' if payload else ''}",
            f"keeps: {keeps}",
        )
    )


def _options(part: Any) -> str:
    """The fields that are set; the unset and the unlimited ones say nothing."""
    shown = []
    for f in fields(part):
        value = getattr(part, f.name)
        if hasattr(value, "__dataclass_fields__"):
            shown.append(f"{f.name} {_options(value)}")
        elif (
            f.name != "signal"
            and value not in (None, (), -1, float("inf"))
            and not (value == 0 and f.name != "threshold")
        ):
            shown.append(f"{f.name} {_value(value)}")
    return ", ".join(shown)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return (
            f"of {len(value)}"
            if len(value) > 8 or any(isinstance(v, tuple) for v in value)
            else "/".join(map(str, value))
        )
    return str(value)


def _slot(slot: Slot) -> str:
    kind = f"like {slot.like}" if slot.like else slot.dtype
    return f"{slot.copies} x {kind}" if slot.copies else kind
