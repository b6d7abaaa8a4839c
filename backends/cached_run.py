"""One run of an engine with a step cache: the state of each branch, the controls of each call, and what was computed.

The state belongs to the run, and to the engine that made it. A run that is interrupted is thrown away with its state,
or put aside by `CachedRun.pause` and gone on with by `CachedRun.resume`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.backends.shapes import bound, evaluate, format_shape
from hasten.errors import UsageError
from hasten.passes.steps.plan import Mask, planned
from hasten.passes.steps.policy import COMPUTE, DECIDE, REUSE, Policy
from hasten.passes.steps.simulate import idle

if TYPE_CHECKING:
    from hasten.backends.engine import Engine

logger = logging.getLogger(__name__)
PREFIX, NEXT = "cache_", "next_cache_"
COMPUTED = PREFIX + "computed"
_Make = Callable[[tuple[int, ...], str, float], Any]


@dataclass
class _Branch:
    """One guidance branch: what it carries, and what it did."""

    state: dict[str, Any] = field(default_factory=dict)
    mask: list[bool] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class CachedRun:
    """Call it once a step with the engine's own inputs; it returns the engine's own outputs.

    ``steps`` is the number of calls that a branch will get, None where unknown (rules about the last calls cannot hold
    then). ``threshold`` and ``limit`` replace the policy's; ``mask`` forces every decision (1 computes, 0 reuses). A
    call may name its ``branch`` (conditional and unconditional calls that take turns, step by step) and ``force`` its
    decision.
    """

    def __init__(
        self,
        engine: Engine,
        steps: int | None = None,
        *,
        threshold: float | None = None,
        limit: int | None = None,
        mask: Mask | None = None,
    ) -> None:
        from hasten.passes.steps import controls
        from hasten.passes.steps.catalog import parse

        assert engine.manifest.cache is not None, "Engine.start looks"
        policy = parse(engine.manifest.cache["policy"])
        self.engine, self.policy, self.steps = engine, policy, steps
        self.threshold = policy.decision.threshold if threshold is None else controls.threshold(threshold)
        self.limit = policy.decision.limit if limit is None else controls.limit(limit)
        self._forced = planned(policy.decision, steps, mask)
        self._free = mask is None
        self._branches: dict[str, _Branch] = {}

    @property
    def mask(self) -> str:
        """What the first branch did so far: 1 computed, 0 reused."""
        return next(iter(self.masks.values()), "")

    @property
    def masks(self) -> dict[str, str]:
        """What each branch did so far."""
        return {name: "".join(map(str, map(int, b.mask))) for name, b in self._branches.items()}

    def state(self, branch: str = "") -> dict[str, Any]:
        """The tensors that a branch carries to its next call."""
        return dict(self._branches[branch].state)

    def __call__(self, *, branch: str = "", force: int | None = None, **inputs: Any) -> dict[str, Any]:
        """Run one step. Raises `UsageError` where sizes differ from those that the branch began with."""
        here = self._branches.get(branch) or _Branch()
        step = len(here.mask)
        if self.steps is not None and step >= self.steps:
            raise UsageError(f"the run has {self.steps} steps and branch {branch!r} had them all; start another run")
        self._in_turn(branch, step)
        self._same_sizes(here, inputs)
        if not here.state:
            here.state = self._fresh(inputs)
        if force is None and self.policy.branches == "conditional":
            force = self._leader(branch, step)
        controls = self._controls(step, force, _maker(inputs))
        if "step" in self.engine.programs:
            outputs = self._run("step", inputs, here, controls)
            computed = bool(outputs.pop(COMPUTED))
        else:
            if "decide" in self.engine.programs:
                computed = bool(self._run("decide", inputs, here, controls)[COMPUTED])
            else:
                computed = int(controls[PREFIX + "force"]) != REUSE or step == 0
            outputs = self._run("compute" if computed else "reuse", inputs, here, controls)
        here.mask.append(computed)
        self._branches[branch] = here  # a call that was refused begins no branch
        if len(here.mask) == self.steps and self._free:
            self._warn()
        return outputs

    def pause(self) -> dict[str, Any]:
        """Where the run stands, for `resume`: dicts, lists, texts, numbers and tensors, which ``torch.save`` keeps."""
        branches = {
            name: {"mask": "".join(map(str, map(int, b.mask))), "shapes": dict(b.shapes), "state": dict(b.state)}
            for name, b in self._branches.items()
        }
        return {"engine": fingerprint(self.engine), "steps": self.steps, "branches": branches}

    def resume(self, paused: Mapping[str, Any]) -> None:
        """Go on from `pause`'s; `UsageError` where that is of another engine or number of steps, or not whole."""
        if set(paused) != {"engine", "steps", "branches"}:
            raise UsageError("the paused run is not whole; give what CachedRun.pause returned")
        own = fingerprint(self.engine)
        if paused["engine"] != own:
            raise UsageError(
                f"the paused run is of another engine ({paused['engine'][:12]}; this one is {own[:12]}), and its state "
                "means nothing here; go on with the engine that made it, or start another run"
            )
        if paused["steps"] != self.steps:
            raise UsageError(
                f"the paused run has {paused['steps']} steps, and this one {self.steps}; start it with as many"
            )
        self._branches = {
            name: _Branch(dict(b["state"]), [bit == "1" for bit in b["mask"]], dict(b["shapes"]))
            for name, b in paused["branches"].items()
        }

    def _in_turn(self, branch: str, step: int) -> None:
        """Refuse a branch that comes late, or comes back: what it would reuse is of another time."""
        first, done = max(
            ((name, len(b.mask)) for name, b in self._branches.items()), key=lambda b: b[1], default=(branch, 0)
        )
        if step < done - 1:
            raise UsageError(
                f"branch {branch!r} is at step {step}, and branch {first!r} has done {done}; branches take turns, each "
                "once a step: start another run for another number of them"
            )

    def _warn(self) -> None:
        """Tell, once a run, of a threshold that did nothing or everything."""
        self._free = False
        warn_idle(self.policy, self.threshold, self.mask)

    def _leader(self, branch: str, step: int) -> int | None:
        """What the first branch did at this step, which holds for the others; None for the first branch itself."""
        first = next(iter(self._branches), branch)
        if branch == first:
            return None
        if step >= len(done := self._branches[first].mask):
            raise UsageError(f"branch {branch!r} is at step {step} before branch {first!r}, whose decisions it follows")
        return int(done[step])

    def _run(
        self, program: str, inputs: Mapping[str, Any], here: _Branch, controls: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Run one program, keep the state that it returns, and return the rest."""
        engine = self.engine.program(program)
        read = {s.name for s in engine.inputs}
        carried = {name: value for name, value in {**here.state, **controls}.items() if name in read}
        outputs = engine(**inputs, **carried)
        kept = [name for name in outputs if name.startswith(NEXT)]
        here.state.update({name.removeprefix("next_"): outputs.pop(name) for name in kept})
        return outputs

    def _controls(self, step: int, force: int | None, make: _Make) -> dict[str, Any]:
        forced = force if force is not None else self._forced[step] if step < len(self._forced) else DECIDE
        if forced not in (DECIDE, REUSE, COMPUTE):
            raise UsageError(f"force: {forced} given; 1 computes, 0 reuses, -1 leaves it to the policy")
        return {
            PREFIX + "step": make((), "int64", step),
            PREFIX + "steps": make((), "int64", self.steps or 0),
            PREFIX + "force": make((), "int64", forced),
            PREFIX + "threshold": make((), "float32", self.threshold),
            PREFIX + "limit": make((), "int64", self.limit),
        }

    def _same_sizes(self, here: _Branch, inputs: Mapping[str, Any]) -> None:
        shapes = {name: tuple(value.shape) for name, value in inputs.items() if hasattr(value, "shape")}
        for name, shape in shapes.items():
            if here.shapes.setdefault(name, shape) != shape:
                raise UsageError(
                    f"input {name!r} is {format_shape(shape)} and was {format_shape(here.shapes[name])} when the run "
                    "began; the kept tensors do not fit: start another run"
                )

    def _fresh(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        sizes: dict[str, int] = {}
        for spec in self.engine.inputs:
            if spec.name in inputs:
                sizes.update(bound(spec.shape, tuple(inputs[spec.name].shape)))
        make = _maker(inputs)
        return {s["name"]: make(_shape(s, sizes), s["dtype"], s["start"]) for s in self.engine.manifest.state}


def warn_idle(policy: Policy, threshold: float, mask: str) -> None:
    """Tell of a threshold that never or always fired in a run that went by ``mask``; see `simulate.idle`."""
    if policy.decision.mask(2) is None and (told := idle(policy, mask, threshold)) is not None:
        logger.warning("%s", told)


def fingerprint(engine: Engine) -> str:
    """Of everything that an engine's state depends on: the policy, the tensors that it keeps, and every built file."""
    manifest = engine.manifest
    files = {name: sha for name, (sha, _) in manifest.files.items()}
    content = [manifest.cache, [dict(s) for s in manifest.state], files]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _shape(state: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = []
    for size in state["shape"]:
        number = size if isinstance(size, int) else evaluate(size, sizes)
        if number is None:
            raise UsageError(f"state {state['name']!r}: its size {size} does not follow from the inputs given")
        shape.append(number)
    return tuple(shape)


def _maker(inputs: Mapping[str, Any]) -> _Make:
    """How arrays are made that go with the inputs: numpy's, or torch's on their device."""
    first = next(iter(inputs.values()))
    if isinstance(first, np.ndarray):
        return lambda shape, dtype, start: np.full(shape, start, dtype)
    import torch

    return lambda shape, dtype, start: torch.full(shape, start, dtype=getattr(torch, dtype), device=first.device)
