"""A denoiser whose engine has a step cache: what it skipped, what a step of each kind costs, and a whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hasten.tools.console import duration
from hasten.tools.timing import take_turns

if TYPE_CHECKING:
    import torch

    from hasten.backends.cached_run import CachedRun
    from hasten.backends.engine import Engine

RUNS = 3
"""Whole runs that are timed, with the policy and with every step computed in turn."""


class CachedDenoise:
    """Called like any denoiser; `begin` starts a run of ``steps`` calls."""

    def __init__(self, engine: Engine, steps: int) -> None:
        self.engine, self.steps = engine, steps
        carried = {s["name"] for s in engine.manifest.state}
        self.names = [t.name for t in engine.inputs if t.name not in carried and not t.name.startswith("cache_")]
        self.run = self.begin()

    def begin(self, mask: str | None = None, *, threshold: float | None = None) -> CachedRun:
        """Start a run, with the policy's decisions or with those of ``mask``."""
        self.run = self.engine.start(self.steps, mask=mask, threshold=threshold)
        return self.run

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = next(iter(self.run(**dict(zip(self.names, tensors, strict=True))).values()))
        return made

    def step_seconds(self, inputs: Sequence[torch.Tensor], repeat: int) -> dict[str, Any]:
        """Times of a computed and of a reused step on the same inputs, taking turns."""
        given = dict(zip(self.names, inputs, strict=True))
        calls = 2 + 8 * repeat
        run = self.engine.start(calls, mask="1" * calls)
        run(force=1, **given)
        computed, reused = take_turns([lambda: run(force=1, **given), lambda: run(force=0, **given)], repeat)
        return {"computed": computed.as_dict(), "reused": reused.as_dict()}

    def report(self, generate: Callable[[], object], inputs: Sequence[torch.Tensor], repeat: int) -> dict[str, Any]:
        """Everything about the cache: the mask, the predicted and the measured gain over computing every step."""
        self.begin()
        generate()
        mask = self.run.mask
        seconds: dict[str, list[float]] = {"policy": [], "computed": []}
        for _ in range(RUNS):
            for name, forced in (("policy", None), ("computed", "1" * self.steps)):
                self.begin(forced)
                started = time.perf_counter()
                generate()
                seconds[name].append(time.perf_counter() - started)
        step = self.step_seconds(inputs, repeat)
        computed = mask.count("1") / len(mask)
        ratio = step["reused"]["median"] / step["computed"]["median"]
        gains = sorted(b / a for a, b in zip(seconds["policy"], seconds["computed"], strict=True))
        return {
            "policy": self.engine.manifest.cache["policy"] if self.engine.manifest.cache is not None else "",
            "mask": mask,
            "computed_steps": mask.count("1"),
            "skipped_steps": mask.count("0"),
            "seconds_per_step": step,
            "predicted_speedup": 1 / (computed + (1 - computed) * ratio),
            "measured_speedup": gains[len(gains) // 2],
            "state_bytes": sum(s["bytes"] for s in self.engine.manifest.state),
        }


def summary(cache: dict[str, Any]) -> list[str]:
    """What is shown of `CachedDenoise.report`."""
    step = cache["seconds_per_step"]
    return [
        f"step cache {cache['policy']}: {cache['computed_steps']} of {len(cache['mask'])} steps computed, "
        f"{cache['skipped_steps']} reused: {cache['mask']}",
        f"a computed step {duration(step['computed']['median'])}, a reused one {duration(step['reused']['median'])}; "
        f"a whole run {cache['measured_speedup']:.2f}x as fast as the same engine computing every step "
        f"({cache['predicted_speedup']:.2f}x predicted); state {cache['state_bytes'] / 1e6:.3g} MB",
    ]
