"""What `build` is asked for a sampler, and what comes of it for one network: the plan of its loop."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.backends import sampler_inputs as read
from hasten.backends.decoder import Decoder
from hasten.backends.manifest import Manifest, TensorSpec
from hasten.backends.shapes import multiple
from hasten.errors import UsageError
from hasten.passes.solvers import catalog, from_config, names
from hasten.passes.solvers.configuration import configuration
from hasten.passes.solvers.hooks import Threshold
from hasten.passes.solvers.plan import GUIDANCE, NOISE, LoopPlan, Shaped, check_choice
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.table import SolverTable
from hasten.passes.steps.catalog import parse

if TYPE_CHECKING:
    import onnx

ROWS, HISTORY = 128, 6
"""Bounds of the table unless others are given: no solver of the catalog carries more latents."""
SAMPLES = ("sample", "hidden_states", "latents", "x")
TIMES = ("timestep", "timesteps", "t", "time", "sigma")
SCALES = ("guidance", "guidance_scale")
PICTURES = "pictures"
"""What the number of pictures is called where a call of the network sees twice as many, and that is dynamic."""
BESIDE = "velocity"
"""The input of a second network that takes the solver's second picture."""


class Second(NamedTuple):
    """The second network of a solver that asks two: a module, and examples of its inputs by name.

    Inputs that the first network has as well are the same input. One called ``velocity`` of the sample's sizes takes
    the second picture, if the solver has one (CAF); a guide has none.
    """

    module: Any
    example_inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Sampling:
    """A sampler around the network, in the same engine.

    ``solver`` (`passes.solvers.catalog`) and ``steps`` are what the engine runs unless it is told otherwise; it serves
    any solver with at most ``rows`` evaluations over at most ``history`` latents. ``process`` says what the network was
    trained on, as `Process.of` reads it; bundled models say so themselves. A diffusers scheduler, or its configuration,
    also says which solver, where that is None, and whether x0 is clipped or thresholded, where the solver does not. An
    engine whose solver does one of the two can also leave it, and takes other limits; a threshold's ratio can be
    higher, not lower. ``guidance`` is the scale, ``form`` how the network is guided (`GUIDANCE`), None for the plainest
    that the scale and the network allow; ``rescale`` adds the rescaling of Lin et al. ``noise`` (`NOISE`) is where a
    stochastic solver's noise comes from, None for ``seed`` where the solver takes noise. ``inpaint``: the engine can
    keep a part of a given picture. ``time_scale`` multiplies the times that the network is told; None is
    what a registered model wants (0.001 for FLUX), 1 for others. ``sample`` and ``time`` name the network's
    inputs where their names do not tell. ``second`` is the guide of LTSP, STSP and guided solvers, or CAF's
    acceleration; the engine then holds both networks. ``decoder`` makes pixels of the last latents.
    """

    solver: str | None = None
    steps: int = 20
    guidance: float = 1.0
    form: str | None = None
    rescale: bool = False
    noise: str | None = None
    inpaint: bool = False
    rows: int | None = None
    history: int = HISTORY
    process: Any = None
    time_scale: float | None = None
    sample: str | None = None
    time: str | None = None
    second: Second | None = None
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        if self.solver is not None:
            if not isinstance(self.solver, str):
                raise UsageError(f"solver: {self.solver!r} is no solver's name; give 'unipc', for one")
            catalog.parse(self.solver)
        if self.form is not None:
            check_choice("form of guidance", self.form, GUIDANCE)
        if self.noise is not None:
            check_choice("noise", self.noise, NOISE)
        for name, value in (
            ("steps", self.steps),
            ("rows", 1 if self.rows is None else self.rows),
            ("history", self.history),
        ):
            read.whole(name, value)
        if self.time_scale is not None and not 0 < self.time_scale < math.inf:
            raise UsageError(f"time_scale: {self.time_scale:g} given; give a number above 0")
        if self.process is not None:  # frozen, and kept as the plain mapping that a manifest can hold
            object.__setattr__(self, "process", configuration(self.process))
        read.number("guidance", self.guidance, 0)

    def trained_on(self) -> Process:
        """The process; `UsageError` where nobody said."""
        if self.process is None:
            raise UsageError(
                "a solver must know what the network was trained on, and this source does not say; give process, the "
                "configuration of its diffusers scheduler (--scheduler FILE)"
            )
        return Process.of(self.process)

    def table(self) -> tuple[str, SolverTable]:
        """The solver's whole text, and its table; `UsageError` where it does not fit the process or the bounds."""
        process = self.trained_on()
        request = from_config.requested(self.solver, self.process or {}, process)
        text, table = str(request), request.build(process, self.steps)
        if self.rows is not None and self.rows < len(table):
            raise UsageError(
                f"rows: {self.rows} given, and {self.steps} steps make {len(table)} evaluations; give more"
            )
        if self.history < table.width:
            raise UsageError(f"history: {self.history} given, and this solver carries {table.width} latents; give more")
        if table.noisy and self.noise == "none":
            raise UsageError(
                f"{text.partition(':')[0]} adds noise in {len(table.noisy)} rows; give noise=seed or noise=input"
            )
        if table.network.any() and self.second is None:
            raise UsageError(
                f"{text.partition(':')[0]} asks two networks, and one was given; give the other as Sampling's second, "
                "or run both with `passes.solvers.sample`"
            )
        return text, table


@dataclass(frozen=True)
class Looping:
    """A `Sampling` for one network: the plan, the step cache's tensors, and what the manifest says of them."""

    plan: LoopPlan
    kept: tuple[Shaped, ...]
    controls: tuple[Shaped, ...]
    described: Mapping[str, Any]
    doubled: str | None = None
    """The network's own batch where it is a dynamic size and twice the number of pictures."""
    bits: tuple[bool, ...] | None = None
    """The decisions of all rows, where they are unrolled."""

    def bounds(self, dims: Mapping[str, tuple[int, int | None]]) -> dict[str, tuple[int, int | None]]:
        """The ranges of the engine's sizes, from those of the network's."""
        found = dict(dims)
        if self.doubled is not None:
            low, high = found.pop(self.doubled, (1, None))
            found[PICTURES] = (-(-low // 2), None if high is None else high // 2)
        return found

    def around(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Put an ONNX denoiser, which is changed, into its loop."""
        from hasten.passes.onnx.solver_loop import solver_loop

        return solver_loop(model, self.plan, self.kept, self.controls, self.bits)

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        given: Sequence[TensorSpec],
        made: Sequence[TensorSpec],
        state: Sequence[Mapping[str, Any]] = (),
        cache: Mapping[str, Any] | None = None,
        *,
        unroll: bool = False,
    ) -> Looping:
        """Find the parts of a network with inputs ``given`` and outputs ``made``; ``state`` is its step cache's.

        ``unroll``: its decisions are known, and the rows stand one behind another. `UsageError` where they do not fit
        what is asked for.
        """
        text, table = sampling.table()
        bits = _decisions(sampling, cache, len(table)) if unroll else None
        carried = {s["name"] for s in state}
        own = tuple(s for s in given if not s.name.startswith(names.CACHE))
        kept = tuple(_shaped(s) for s in given if s.name in carried)
        controls = tuple(_shaped(s) for s in given if s not in own and s.name not in carried)
        noise = sampling.noise or ("seed" if table.noisy else "none")
        # a loop that is given noise for every row has no room that it does not need
        whole = noise == "input" or unroll
        rows = sampling.rows or (len(table) if whole else max(len(table), ROWS))
        plan = _hooked(plan_of(sampling, own, made, noise, rows), table)
        if cache is not None:
            plan = replace(plan, follow=parse(cache["policy"]).branches == "conditional")
        batch = plan.sample.shape[0]
        doubled = batch if plan.doubled and isinstance(batch, str) else None
        if doubled is not None:
            kept = tuple(replace(s, shape=tuple(_halved(size, doubled, s) for size in s.shape)) for s in kept)
        sizes = {s.name: list(s.shape) for s in kept}
        described = {
            "solver": text,
            "steps": sampling.steps,
            "rows": plan.rows,
            "history": plan.history,
            "guidance": plan.guidance,
            "scale": sampling.guidance,
            "rescale": plan.rescale,
            "noise": plan.noise,
            "hook": plan.hook,
            "ratio": table.hook.ratio if isinstance(table.hook, Threshold) else None,
            "inpaint": plan.inpaint,
            "process": {key: _in_json(value) for key, value in (sampling.process or {}).items()},
            "time_scale": 1.0 if sampling.time_scale is None else sampling.time_scale,
            "latents": list(plan.latents),
            "conditions": [c.name for c in plan.conditions],
            "shared": [s.name for s in plan.shared],
            "networks": 1 if plan.which is None else 2,
            "beside": plan.beside is not None,
            "cache": None if cache is None else dict(cache),
            "unrolled": None if bits is None else "".join(str(int(bit)) for bit in bits),
            "state": [
                {**s, "name": s["name"] + b, "shape": sizes[s["name"]]}
                for b in names.BRANCHES[: plan.calls]
                for s in state
                if s["name"] in sizes
            ],
        }
        return cls(plan, kept, controls, described, doubled, bits)


def _decisions(sampling: Sampling, cache: Mapping[str, Any] | None, rows: int) -> tuple[bool, ...]:
    """What a step cache whose schedule is known does in each row."""
    mask = None if cache is None else parse(cache["policy"]).decision.mask(rows)
    if mask is None:
        policy = "no step cache was given" if cache is None else f"{cache['policy']} decides by the data of a run"
        raise UsageError(f"a sampler is built without branches where every decision is known, and {policy}")
    if sampling.rows not in (None, rows):
        raise UsageError(
            f"rows: {sampling.rows} given, and a sampler without branches has a row for each of its {rows} "
            "evaluations; leave rows out"
        )
    return tuple(bool(bit) for bit in mask)


def _halved(size: int | str, batch: str, kept: Shaped) -> int | str:
    """A size of what a network keeps, which names its batch, in numbers of pictures."""
    factor, symbol = multiple(size) or (1, size)
    if symbol == batch:
        return f"{2 * factor}*{PICTURES}"
    if isinstance(size, str) and batch in re.findall(r"\w+", size):
        raise UsageError(f"what is kept as {kept.name!r} has the size {size}; build the loop with form=sequential")
    return size


def _in_json(value: Any) -> Any:
    """A configuration's value as a manifest can hold it: diffusers' ``lambda_min_clipped`` is minus infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _hooked(plan: LoopPlan, table: SolverTable) -> LoopPlan:
    """``plan`` with what the solver does to x0."""
    if table.hook is None:
        return plan
    if isinstance(table.hook, Threshold) and any(isinstance(size, str) for size in plan.latents[1:]):
        raise UsageError(f"a threshold is found among a known number of values, and pictures are {plan.latents[1:]}")
    top = table.hook.top(math.prod(map(int, plan.latents[1:]))) if isinstance(table.hook, Threshold) else 0
    return replace(plan, hook=table.hook.kind, sorted=top)


def looped(manifest: Manifest, looping: Looping | None) -> Manifest:
    """The manifest of an engine with a sampler's loop in it; unchanged where there is none."""
    if looping is None:
        return manifest
    described = dict(looping.described)
    state = described.pop("state")
    return replace(manifest, loop=described, state=tuple(s for s in state if _is_input(manifest, s["name"])))


def _is_input(manifest: Manifest, name: str) -> bool:
    return any(t.name == name for t in manifest.inputs)


def plan_of(
    sampling: Sampling, given: Sequence[TensorSpec], made: Sequence[TensorSpec], noise: str, rows: int
) -> LoopPlan:
    """Tell a network's inputs apart, and check that they can be guided as asked."""
    by_name = {s.name: _shaped(s) for s in given}
    sample = _find("sample", sampling.sample, SAMPLES, by_name)
    time = _find("time", sampling.time, TIMES, by_name)
    found = made[0].shape
    if len(sample.shape) < 2 or (*found[:1], *found[2:]) != (*sample.shape[:1], *sample.shape[2:]):
        raise UsageError(
            f"output {made[0].name!r} has sizes {found} and input {sample.name!r} {sample.shape}; a solver needs a "
            "prediction of the sample's own sizes"
        )
    which = by_name.get(names.WHICH) if sampling.second is not None else None
    beside = by_name.get(BESIDE) if which is not None else None
    if beside is not None and beside.shape != sample.shape:
        raise UsageError(f"input {BESIDE!r} has sizes {beside.shape} and {sample.name!r} {sample.shape}; they are one")
    rest = [s for s in by_name.values() if s not in (sample, time, which, beside)]
    scale = next((s for s in rest if s.name in SCALES), None)
    size = sample.shape[0]
    conditions = tuple(s for s in rest if s is not scale and s.shape[:1] == (size,))
    shared = tuple(s for s in rest if s is not scale and s not in conditions)
    form = sampling.form or _plainest(sampling, scale, conditions, size)
    if which is not None and form in ("batched", "sequential"):
        raise UsageError(
            f"{form} guidance would guide the second network's answer as well; take guidance 1, and guide with the "
            "solver's weight"
        )
    if form in ("batched", "sequential") and not conditions:
        raise UsageError(
            f"guidance needs an input to leave out, and the network has none beside {sample.name!r} and time"
        )
    if form == "batched" and isinstance(size, str) and PICTURES in {d for s in given for d in s.shape}:
        raise UsageError(f"a size of the network is called {PICTURES!r}, as the loop calls its own; rename it")
    if form == "batched" and not isinstance(size, str) and size % 2:
        raise UsageError(
            f"batched guidance calls the network with twice the pictures, and its batch of {size} is odd; build it for "
            "twice the number of pictures, or take form=sequential"
        )
    if form == "embedded" and scale is None:
        raise UsageError(f"embedded guidance needs a network with an input {SCALES[0]!r}; inputs: {', '.join(by_name)}")
    if form == "none" and sampling.guidance != 1:
        raise UsageError(f"guidance {sampling.guidance:g} was asked for with form=none; take form=batched")
    if scale is not None and form != "embedded":
        conditions, scale = (*conditions, scale), None
    if sampling.rescale and form not in ("batched", "sequential"):
        raise UsageError(f"rescale: for batched and sequential guidance, and this is {form}")
    taken = {*(s.name for s in names.inputs(LoopPlan(1, 1, "none", False, "none", False, 1, sample, time), (), ()))}
    if clash := sorted(taken & {s.name for s in (*conditions, *shared)}):
        raise UsageError(f"the network's input {clash[0]!r} has the name of one of the loop's own; rename it")
    batch = size if form != "batched" else PICTURES if isinstance(size, str) else size // 2
    return LoopPlan(
        rows,
        sampling.history,
        form,
        sampling.rescale,
        noise,
        sampling.inpaint,
        batch,
        sample,
        time,
        conditions,
        shared,
        scale,
        which=which,
        beside=beside,
    )


def _plainest(sampling: Sampling, scale: Shaped | None, conditions: Sequence[Shaped], size: Any) -> str:
    if scale is not None:
        return "embedded"
    if sampling.guidance == 1 or not conditions:
        return "none"
    return "sequential" if not isinstance(size, str) and size % 2 else "batched"


def _find(what: str, asked: str | None, usual: Sequence[str], given: Mapping[str, Shaped]) -> Shaped:
    if asked is not None and asked not in given:
        from hasten.errors import nearest

        raise UsageError(f"{what}: there is no input {asked!r}; inputs: {', '.join(given)}.{nearest(asked, given)}")
    name = asked or next((n for n in usual if n in given), None)
    if name is None:
        raise UsageError(
            f"which input is the {what}? None of {', '.join(given)} is called {' or '.join(usual)}; say it"
        )
    return given[name]


def _shaped(spec: TensorSpec) -> Shaped:
    return Shaped(spec.name, spec.dtype, spec.shape)
