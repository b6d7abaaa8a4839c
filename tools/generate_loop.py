"""Pictures or clips of a bundled model from an engine that holds the whole sampler."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.tools.generate_cached import RUNS
from hasten.tools.timing import take_turns

if TYPE_CHECKING:
    import torch

    from hasten.backends.engine import Engine
    from hasten.backends.sampler_run import Sampled, SamplerRun
    from hasten.backends.sampling import Sampling
    from hasten.models.adapter import Adapter
    from hasten.passes.solvers.table import SolverTable


def table_of(adapter: Adapter, solver: str, steps: int) -> SolverTable:
    """The solver's table for a bundled model."""
    from hasten.models.processes import process_of
    from hasten.passes.solvers import catalog

    return catalog.build(solver, process_of(adapter.name) or {}, steps)


def sampling_of(adapter: Adapter, solver: str, steps: int, guidance: float) -> Sampling:
    """What the engine is built for, decoder and all: noise comes from outside, so that a baseline is given the same.

    A solver that asks a guide is given that of `noisy_classifier`, and ``guidance`` is left aside.
    """
    from hasten.backends.decoder import OWN, decoder_of
    from hasten.backends.sampling import Sampling, Second

    table, decoder = table_of(adapter, solver, steps), decoder_of(OWN, adapter.name)
    noise = "input" if table.noisy else "none"
    if not table.network.any():
        return Sampling(solver=solver, steps=steps, guidance=guidance, noise=noise, decoder=decoder)
    from hasten.models.scenes import noisy_classifier

    second = Second(*noisy_classifier.guide(adapter.batch))
    return Sampling(solver=solver, steps=steps, noise=noise, second=second, decoder=decoder)


def is_guided(adapter: Adapter, solver: str | None, steps: int) -> bool:
    """Whether a solver asks a guide, which only the model has that the guide was trained beside."""
    from hasten.models.scenes.noisy_classifier import MODEL

    table = None if solver is None else table_of(adapter, solver, steps)
    if table is None or not table.network.any():
        return False
    if table.conditioned or adapter.name != MODEL:
        raise UsageError(
            f"--solver {solver}: it asks a second network, and the one that is bundled is the guide of {MODEL}, for "
            "ltsp, stsp and guided; take one of them with that model, or another solver"
        )
    return True


class LoopDenoise:
    """The sampler of an engine; `generate` makes what `models.scenes.generate.generate` makes."""

    def __init__(self, engine: Engine, adapter: Adapter) -> None:
        from hasten.backends.sampler import Sampler
        from hasten.models.scenes.adapters import specification
        from hasten.models.scenes.subject import subject

        self.sampler = Sampler(engine)
        self.specification = specification(adapter.name)
        self.subject = subject(self.specification)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """A denoiser alone is not in the engine."""
        raise TypeError("the engine holds the whole sampler; call generate")

    def begin(self, labels: Sequence[int], **options: Any) -> SamplerRun:
        """Begin a run for ``labels``, guided as the engine is."""
        return self.sampler.begin(**self._conditions(labels), **options)

    def sample(self, labels: Sequence[int], **options: Any) -> Sampled:
        """A whole run for ``labels``."""
        return self.sampler(**self._conditions(labels), **options)

    def generate(self, labels: Sequence[int], **options: Any) -> torch.Tensor:
        """Pixels in [-1, 1], on the CPU."""
        made = self.sample(labels, **options)
        return self.pixels(made.latents) if made.pixels is None else made.pixels.cpu()

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """What latents show, in [-1, 1], on the CPU; computed here, not in the engine."""
        return self.subject.pixels(latents, self.specification["unshuffle"]).clamp(-1, 1).cpu()

    def _conditions(self, labels: Sequence[int]) -> dict[str, torch.Tensor]:
        import torch

        label = torch.as_tensor(labels, dtype=torch.int64)
        name, *guide = self.sampler.loop["conditions"]
        if guide:  # the network is told no class, and the guide which
            told = self.subject.condition(torch.full_like(label, self.subject.null_class))
            return {name: told, guide[0]: label}
        given = {name: self.subject.condition(label)}
        if self.sampler.loop["guidance"] != "none":
            given["negative_" + name] = self.subject.condition(torch.full_like(label, self.subject.null_class))
        return given

    def one_row(self, *, computed: bool = True) -> Callable[[], object]:
        """One step of the loop as a call of the engine: the second row of a run, computed or reused.

        Where a guide is asked between, it is the first row behind the first that asks the network.
        """
        table = self.sampler.table()
        cached, rows = self.sampler.loop["cache"] is not None, len(table)
        mask = ("11" if computed else "10") + "1" * max(rows - 2, 0)
        run = self.begin([0] * self.sampler.latents_shape[0], mask=mask[:rows] if cached else None)
        first = next((i for i in range(1, rows) if table.network[i] == 0), 0)
        if first:
            run.advance(first)
        return lambda: run.call(first, first + 1)

    def report(self, labels: Sequence[int], seed: int, repeat: int) -> dict[str, Any]:
        """What the step cache did and what it gained, as `CachedDenoise.report`."""
        cache = self.sampler.loop["cache"]
        mask = self.sample(labels, seed=seed).decisions
        step = take_turns([self.one_row(), self.one_row(computed=False)], repeat)
        whole = take_turns(
            [lambda: self.sample(labels, seed=seed), lambda: self.sample(labels, seed=seed, mask="1" * len(mask))], RUNS
        )
        part, ratio = mask.count("1") / len(mask), step[1].median / step[0].median
        gains = [b / a for a, b in zip(whole[0].seconds, whole[1].seconds, strict=True)]
        return {
            "policy": cache["policy"],
            "mask": mask,
            "computed_steps": mask.count("1"),
            "skipped_steps": mask.count("0"),
            "seconds_per_step": {"computed": step[0].as_dict(), "reused": step[1].as_dict()},
            "predicted_speedup": 1 / (part + (1 - part) * ratio),
            "measured_speedup": statistics.median(gains),
            "state_bytes": sum(s["bytes"] for s in self.sampler.engine.manifest.state),
        }
