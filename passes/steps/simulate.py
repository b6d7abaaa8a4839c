"""Runs of a policy in numpy: the reference for every compiled one, and the mask to expect before a run.

A prediction takes what was recorded of a run that computed every call, and asks what the policy would have done: exact
where the signal does not depend on earlier reuses (a time embedding, a schedule), near where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from hasten.errors import UsageError
from hasten.passes.steps.plan import Mask, planned
from hasten.passes.steps.policy import DECIDE, Array, Policy, Slot, State, relative_l1
from hasten.passes.steps.retained import control_at
from hasten.passes.steps.teacache import TeaCache


@dataclass(frozen=True)
class Recording:
    """What a run that computed every call showed, one entry a call; what a policy does not look at may stay empty.

    ``distances`` are `relative_l1` of each signal and the one before, the first any number: TeaCache needs no more.
    """

    signals: Sequence[Array] = ()
    taps: Sequence[Array] = ()
    inputs: Sequence[Array] = ()
    outputs: Sequence[Array] = ()
    distances: Sequence[float] = ()

    @property
    def steps(self) -> int:
        return max(map(len, (self.signals, self.taps, self.inputs, self.outputs, self.distances)))


@dataclass(frozen=True)
class Replay:
    """A run: what each call did (1 computed), its result, and the state after the last."""

    mask: str
    outputs: list[Array]
    state: State


def fresh(slots: Mapping[str, Slot], like: Mapping[str, Array]) -> State:
    """A run's first state; ``like`` holds an array for each value that a slot is like."""
    state = {}
    for name, slot in slots.items():
        shape, dtype = (np.shape(like[slot.like]), np.asarray(like[slot.like]).dtype) if slot.like else ((), None)
        state[name] = np.full((slot.copies, *shape) if slot.copies else shape, slot.start, slot.dtype or dtype)
    return state


def replay(
    policy: Policy,
    region: Callable[[Array, int], Array],
    inputs: Sequence[Array],
    *,
    signals: Sequence[Array] = (),
    taps: Sequence[Array] = (),
    threshold: float | None = None,
    limit: int | None = None,
    mask: Mask | None = None,
) -> Replay:
    """Run ``policy`` over ``region`` ((before, call) -> after), one call for each of ``inputs``.

    ``signals`` and ``taps`` are what the decision looks at; ``threshold``, ``limit`` and ``mask`` as in a compiled run.
    """
    decision, payload, steps = policy.decision, policy.payload, len(inputs)
    if decision.signal and len(signals) != steps:
        raise _missing(policy, f"signal ({decision.signal})", steps, len(signals))
    if decision.tap and len(taps) != steps:
        raise _missing(policy, f"tap ({decision.tap})", steps, len(taps))
    force = planned(decision, steps, mask)
    bits, outputs, state = "", [], {}
    for step, before in enumerate(inputs):
        control = control_at(
            step,
            steps,
            force=force[step],
            threshold=decision.threshold if threshold is None else threshold,
            limit=decision.limit if limit is None else limit,
        )
        signal, tap = (values[step] if len(values) else None for values in (signals, taps))
        after = None
        if step == 0:
            after = region(before, step)
            kinds = {"signal": signal, "tap": tap, "before": before, "after": after}
            state = fresh(policy.slots(), {name: value for name, value in kinds.items() if value is not None})
        decided, compute = decision.decide({n: state[n] for n in decision.slots()}, signal, control)
        state |= decided
        if compute:
            after = region(before, step) if after is None else after
            state |= decision.observe({n: state[n] for n in decision.slots()}, tap, before, after, control)
            state |= payload.store({n: state[n] for n in payload.slots()}, before, after, control)
        else:
            after = payload.reuse({n: state[n] for n in payload.slots()}, before, control)
        bits += str(int(bool(compute)))
        # A caller may change what it got; what is kept must not change with it.
        outputs.append(np.array(after))
    return Replay(bits, outputs, state)


def _missing(policy: Policy, what: str, steps: int, given: int) -> UsageError:
    return UsageError(f"{policy.name} looks at its {what} at each of {steps} calls, and {given} were given")


def predict(policy: Policy, recorded: Recording, *, threshold: float | None = None, limit: int | None = None) -> str:
    """The mask to expect of ``policy`` in a run like the recorded one."""
    if recorded.distances and isinstance(policy.decision, TeaCache):
        return _from_distances(policy.decision, recorded.distances, threshold, limit)
    still = [np.zeros(1, np.float32)] * recorded.steps
    outputs = recorded.outputs or still
    return replay(
        policy,
        lambda _, step: outputs[step],
        recorded.inputs or still,
        signals=recorded.signals,
        taps=recorded.taps,
        threshold=threshold,
        limit=limit,
    ).mask


def _from_distances(decision: TeaCache, distances: Sequence[float], threshold: float | None, limit: int | None) -> str:
    state, bits = fresh({n: s for n, s in decision.slots().items() if not s.like}, {}), ""
    force = decision.forced(len(distances))
    for step, distance in enumerate(distances):
        control = control_at(
            step,
            len(distances),
            force=int(force[step]),
            threshold=decision.threshold if threshold is None else threshold,
            limit=decision.limit if limit is None else limit,
        )
        state, compute = decision.judge(state, np.asarray(distance, np.float32), control)
        bits += str(int(bool(compute)))
    return bits


def concerns(policy: Policy, recorded: Recording, *, threshold: float | None = None) -> list[str]:
    """What is wrong with a policy for a run like the recorded one, each with what to do; empty where nothing is."""
    mask = predict(policy, recorded, threshold=threshold)
    limit = policy.decision.threshold if threshold is None else threshold
    told = idle(policy, mask, limit)
    found = [] if told is None else [told]
    if isinstance(policy.decision, TeaCache):
        found += _polynomial_concerns(policy.decision, recorded)
    return found


def idle(policy: Policy, mask: str, threshold: float) -> str | None:
    """What is wrong with a threshold in a run that goes by ``mask``: it never fires, or always; None where nothing is.

    Policies that have no threshold are never idle.
    """
    if "threshold" not in {f.name for f in fields(policy.decision)}:  # type: ignore[arg-type]
        return None
    forced = planned(policy.decision, len(mask))
    free = [int(bit) for bit, wish in zip(mask, forced, strict=True) if wish == DECIDE]
    if threshold <= 0 and free:
        return f"threshold {threshold:g} switches {policy.name} off: every call computes; give a positive one"
    if free and all(free):
        return f"threshold {threshold:g} never lets a call reuse: {policy.name} only costs time; raise it (mask {mask})"
    if free and not any(free) and policy.decision.limit < 0:
        return (
            f"threshold {threshold:g} is never reached: all {len(free)} calls that {policy.name} may decide on reuse; "
            f"lower it, or set a limit (mask {mask})"
        )
    return None


def _polynomial_concerns(decision: TeaCache, recorded: Recording) -> list[str]:
    distances = np.asarray(recorded.distances[1:], np.float32)
    if not len(distances):
        pairs = zip(recorded.signals[1:], recorded.signals, strict=False)
        distances = np.array([relative_l1(new, old) for new, old in pairs], np.float32)
    distances = distances[np.isfinite(distances)]
    found = []
    negative = distances[[bool(decision.estimate(d) < 0) for d in distances]]
    if len(negative) and decision.sign == "signed":
        found.append(
            f"the polynomial is negative at {len(negative)} of {len(distances)} distances, from {min(negative):.3g} "
            "on, which puts off the next computed call; use sign=abs or sign=clamp0, or fit it anew"
        )
    if beyond := int((distances > decision.fitted).sum()):
        found.append(
            f"{beyond} of {len(distances)} distances are beyond {decision.fitted:g}, the largest that the polynomial "
            "was fitted on, and compute; fit it on runs like this"
        )
    return found
