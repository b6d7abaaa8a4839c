"""What ``torch.compile`` calls when a graph has a step cache: it holds the state, one for each model and branch.

A pipeline passes no step number, so it is read off the timestep: the same value again is another guidance branch, a
lower one the next step, a higher one a new run (the other way round for models whose time goes up). Two models of one
class may share a compiled graph; their states are told apart by their parameters, and those of threads by the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hasten.errors import UsageError, nearest
from hasten.passes.steps import controls
from hasten.passes.steps.plan import Mask, parse_mask, planned
from hasten.passes.steps.policy import DECIDE, REUSE, Policy


@dataclass
class Branch:
    """One guidance branch of a run."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: list[bool] = field(default_factory=list)
    key: tuple[Any, ...] = ()


@dataclass
class Run:
    """A run in one thread: where it stands, by the times it was called with."""

    generation: int = 0
    time: float | None = None
    branches: list[Branch] = field(default_factory=list)
    at: int = 0

    def advance(self, time: float, *, ascending: bool) -> Branch:
        """Return the branch that a call at ``time`` belongs to; its mask has one entry for each step before this."""
        ahead = self.time is not None and (time > self.time if ascending else time < self.time)
        if self.time is None or not (ahead or time == self.time):
            self._restart()
        elif ahead:
            # A step that had fewer calls than there are branches was cut short: nothing kept can be relied on.
            if self.at + 1 < len(self.branches):
                self._restart()
            self.at = 0
        else:
            self.at += 1
        self.time = time
        if self.at == len(self.branches):
            self.branches.append(Branch())
        return self.branches[self.at]

    def _restart(self) -> None:
        self.branches, self.at = [], 0


class StepCache:
    """The run-time settings and the record of one model's step cache; `step_cache` returns it.

    All may be changed between calls, and nothing is compiled again. ``threshold`` and ``limit`` replace the policy's
    where they are not None. ``steps`` is the number of steps of a run, None where unknown: rules about the last steps
    hold only where it is known. ``mask`` forces each step's decision. `UsageError` for another name, or for a value
    that means nothing.
    """

    threshold: float | None
    limit: int | None
    steps: int | None
    mask: Mask | None

    def __init__(self) -> None:
        self.threshold = self.limit = self.steps = self.mask = None
        self._threads = threading.local()
        self._generation = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _READ:
            value = None if value is None else _READ[name](value)
        elif not name.startswith("_"):
            raise UsageError(
                f"a step cache has no setting {name!r}; settings: {', '.join(_READ)}.{nearest(name, _READ)}"
            )
        super().__setattr__(name, value)

    def reset(self) -> None:
        """Begin a new run with the next call, in every thread."""
        self._generation += 1

    @property
    def masks(self) -> list[str]:
        """What each guidance branch of this thread's latest run did: 1 computed, 0 reused."""
        run = getattr(self._threads, "latest", None)
        return ["".join(map(str, map(int, b.mask))) for b in run.branches] if run is not None else []

    def run_of(self, graph: object) -> Run:
        """Return the run of one compiled graph in this thread."""
        runs = self._threads.__dict__.setdefault("runs", WeakKeyDictionary())
        run = runs.get(graph)
        if run is None or run.generation != self._generation:
            run = runs[graph] = Run(self._generation)
        self._threads.latest = run
        return cast(Run, run)


_READ: Mapping[str, Callable[[Any], Any]] = {
    "threshold": controls.threshold,
    "limit": controls.limit,
    "steps": controls.steps,
    "mask": parse_mask,
}
"""The settings, and what reads each."""
_settings: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


def reset(model: torch.nn.Module) -> None:
    """Begin a new run of a model's step cache with the next call, in every thread: `step_cache` (model)``.reset()``."""
    step_cache(model).reset()


def step_cache(model: torch.nn.Module) -> StepCache:
    """Return the step cache of a model compiled with ``options={"cache": …}``: its settings, mask and `reset`.

    May be called before the model's first call. `UsageError` for a model without parameters: it has no identity.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise UsageError(f"{type(model).__name__} has no parameters, by which its step cache would be found")
    with _lock:
        found = next((_settings[p] for p in parameters if p in _settings), None) or StepCache()
        for parameter in parameters:
            _settings[parameter] = found
    return found


@dataclass(frozen=True)
class Kind:
    """A tensor of state: its sizes as functions of the graph's inputs, and the number that fills it before a run."""

    shape: tuple[Callable[[Sequence[Any]], int], ...]
    dtype: torch.dtype
    device: torch.device
    start: float

    def fill(self, inputs: Sequence[Any]) -> torch.Tensor:
        """Make the tensor as it is before a run."""
        sizes = [size(inputs) for size in self.shape]
        return torch.full(sizes, self.start, dtype=self.dtype, device=self.device)


class CachedCallable:
    """A compiled graph with a step cache, called as Dynamo calls a graph: tensors in order, a tuple of results.

    ``programs`` are compiled functions by name with the names of their inputs beyond the graph's own and of the outputs
    beyond its own. ``time_at`` is the position of the timestep among the graph's inputs, ``owner_at`` that of the
    first parameter, None where there is none.
    """

    def __init__(
        self,
        policy: Policy,
        programs: Mapping[str, tuple[Callable[..., Any], Sequence[str], Sequence[str]]],
        state: Mapping[str, Kind],
        *,
        time_at: int,
        owner_at: int | None,
        ascending: bool = False,
    ) -> None:
        self.policy, self.programs, self.state = policy, programs, state
        self.time_at, self.owner_at, self.ascending = time_at, owner_at, ascending
        self._own = StepCache()
        self._schedules: dict[tuple[int | None, str], list[int]] = {}
        self._numbers: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        settings = self._settings(inputs)
        with torch.no_grad():
            run = settings.run_of(self)
            branch = run.advance(float(inputs[self.time_at].reshape(-1)[0]), ascending=self.ascending)
            leader = run.branches[0] if run.at and self.policy.branches == "conditional" else None
            return self._step(branch, leader, settings, inputs)

    def _step(
        self, branch: Branch, leader: Branch | None, settings: StepCache, inputs: Sequence[Any]
    ) -> tuple[Any, ...]:
        """``leader``: the branch whose decisions this one follows."""
        device = next(iter(self.state.values())).device if self.state else torch.device("cpu")
        shapes = tuple(tuple(i.shape) if isinstance(i, torch.Tensor) else i for i in inputs)
        if branch.key != shapes:  # a new run, or other sizes in the middle of one: nothing that was kept fits
            branch.key, branch.mask = shapes, []
            branch.state = {name: kind.fill(inputs) for name, kind in self.state.items()}
        step = len(branch.mask)
        force = self._force(step, settings) if leader is None else int(leader.mask[step])
        threshold = self.policy.decision.threshold if settings.threshold is None else settings.threshold
        limit = self.policy.decision.limit if settings.limit is None else settings.limit
        controls = {
            "cache_step": self._number(step, torch.int64, device),
            "cache_steps": self._number(settings.steps or 0, torch.int64, device),
            "cache_force": self._number(force, torch.int64, device),
            "cache_threshold": self._number(threshold, torch.float32, device),
            "cache_limit": self._number(limit, torch.int64, device),
        }
        if "step" in self.programs:
            results, computed = self._run("step", inputs, branch, controls)
            assert computed is not None
        else:
            computed = force != REUSE or step == 0
            if "decide" in self.programs:
                _, computed = self._run("decide", inputs, branch, controls)
            results, _ = self._run("compute" if computed else "reuse", inputs, branch, controls)
        branch.mask.append(bool(computed))
        return results

    def _run(
        self, name: str, inputs: Sequence[Any], branch: Branch, controls: Mapping[str, torch.Tensor]
    ) -> tuple[tuple[Any, ...], bool | None]:
        function, extra, written = self.programs[name]
        known = {**branch.state, **controls}
        results = tuple(function(*inputs, *(known[n] for n in extra)))
        own = len(results) - len(written)
        computed = None
        for key, value in zip(written, results[own:], strict=True):
            if key == "cache_computed":
                computed = bool(value)
            else:
                branch.state[key] = value
        return results[:own], computed

    def _force(self, step: int, settings: StepCache) -> int:
        key = (settings.steps, str(settings.mask or ""))
        if key not in self._schedules:
            self._schedules[key] = planned(self.policy.decision, settings.steps, settings.mask)
        force = self._schedules[key]
        return force[step] if step < len(force) else DECIDE

    def _number(self, value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 0-d tensor, made once: no copy to the device in later runs."""
        key = (value, dtype, device)
        if key not in self._numbers:
            self._numbers[key] = torch.tensor(value, dtype=dtype, device=device)
        return self._numbers[key]

    def _settings(self, inputs: Sequence[Any]) -> StepCache:
        if self.owner_at is None:
            return self._own
        with _lock:
            return cast(StepCache, _settings.setdefault(inputs[self.owner_at], StepCache()))
