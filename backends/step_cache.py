"""A flat graph with a step cache: the programs to compile, their inputs and outputs, and what a caller keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hasten.backends.fold import SignalAt, fold, signal_in_graph, times_of
from hasten.backends.manifest import Dim, TensorSpec
from hasten.errors import HastenError, UsageError, nearest

if TYPE_CHECKING:
    import torch

    from hasten.backends.program import FlatProgram
    from hasten.backends.region import Found
    from hasten.passes.fx.step_cache import Cached, Cut, StateTensor
    from hasten.passes.rule import Report
    from hasten.passes.steps.policy import Policy

FORMS = ("conditional", "straight")
"""``conditional``: one program with a branch in it. ``straight``: programs without one, the caller picks; a decision
that depends on the data then is a program of its own, whose answer the caller reads."""


@dataclass(frozen=True)
class CachedProgram:
    """The programs by name, the main one first, and the state (as the manifest has it) that their caller carries."""

    programs: Mapping[str, FlatProgram]
    state: tuple[Mapping[str, Any], ...]

    @property
    def state_bytes(self) -> int:
        """Of all state together, at the example's sizes."""
        return sum(s["bytes"] for s in self.state)


@dataclass(frozen=True)
class Caching:
    """What a build is asked to cache: the policy, the form, and the blocks that a reused step leaves out.

    ``calibration`` is the file that the policy is read from, None where it is written out; ``told`` the policy whose
    decisions were folded into this one's mask. ``looped``: the network stands in a sampler, whose rows are unrolled in
    the form without branches.
    """

    policy: Policy
    text: str
    form: str
    region: str | None
    calibration: str | None = None
    told: str | None = None
    looped: bool = False

    @classmethod
    def of(
        cls, cache: str | None, form: str | None = None, region: str | None = None, *, looped: bool = False
    ) -> Caching | None:
        """Read the options of a build; None where there is no cache."""
        from hasten.passes.steps.catalog import canonical, parse

        if cache is None:
            for name, value in (("cache form", form), ("region", region)):
                if value is not None:
                    raise UsageError(f"{name} {value!r} was given without a cache; say which: --cache POLICY")
            return None
        policy = parse(cache)
        calibration = cache.strip() if cache.strip().endswith(".json") else None
        form = choose_form("conditional" if looped and form is None else form, policy)
        return cls(policy, canonical(cache), form, region, calibration, looped=looped)

    @property
    def unrolls(self) -> bool:
        """Whether a sampler's rows are to stand one behind another."""
        return self.looped and self.form == "straight"

    @property
    def network_form(self) -> str:
        """The form of the network by itself: an unrolled sampler takes the branches of the conditional one."""
        return "conditional" if self.looped else self.form

    def apply(self, flat: FlatProgram, report: Report) -> tuple[CachedProgram, dict[str, Any]]:
        """Find the region in ``flat``, cut it, and describe what was done, for the manifest and the report."""
        from hasten.backends.region import find_cut

        self.check_fits(report.source, flat.inputs)
        found = find_cut(flat.module, self.policy, self.region)
        folded = self.folded(found, lambda: signal_in_graph(flat, found))
        cached = with_cache(flat, found.cut, folded.policy, folded.network_form)
        return cached, folded.describe(found, cached.state_bytes, report)

    def folded(self, found: Found[Any], signal: Callable[[], SignalAt]) -> Caching:
        """The same with a mask in the decision's place, where the policy was told the run's timesteps."""
        if self.form != "straight" or not times_of(self.policy):
            return self
        made = fold(self.policy, found, signal())
        return replace(self, policy=made.policy, text=made.text, told=self.text)

    def check_fits(self, model: str, inputs: Sequence[TensorSpec]) -> None:
        """Refuse a calibration of another registered model, or of other sizes, than is being built."""
        from hasten.backends.calibrate_file import check_fits
        from hasten.models.registry import names

        if self.calibration is None:
            return
        sizes = [size for size in inputs[0].shape[1:] if isinstance(size, int)] if inputs else []
        known = bool(inputs) and len(sizes) == len(inputs[0].shape) - 1
        check_fits(self.calibration, model if model in names() else None, None, (1, *sizes) if known else None)

    def check_calls(self, calls: int) -> None:
        """Refuse a calibration, or a mask, of another number of calls than a run of the engine makes."""
        from hasten.backends.calibrate_file import check_fits

        if self.calibration is not None:
            check_fits(self.calibration, steps=calls)
        self.policy.decision.mask(calls)  # refuses a mask for another number
        times = times_of(self.policy) if self.form == "straight" else ()
        if times and len(times) != calls:
            raise UsageError(
                f"{self.policy.name}: times: {len(times)} were given and the run has {calls} steps; give one a step"
            )

    def describe(self, found: Found[Any], state_bytes: int, report: Report) -> dict[str, Any]:
        """What was done, for the manifest; one line of it goes into the report as well."""
        kept = f"form {self.form}, state {state_bytes / 1e6:.3g} MB"
        summary = f"step cache {self.text}: {found.summary}; {kept}"
        if self.told is not None:
            summary += f"; the mask is what {self.told.partition(':')[0]} decides at the timesteps that it was told"
        report.notes.append(summary)
        return {
            "policy": self.text,
            "form": self.form,
            "region": found.summary,
            "share": found.share,
            "state_bytes": state_bytes,
            "summary": summary,
        }


def choose_form(form: str | None, policy: Policy) -> str:
    """The form asked for, or the one without a branch where the schedule is known before the run."""
    if form is None:
        return "straight" if is_static(policy) or times_of(policy) else "conditional"
    if form not in FORMS:
        raise UsageError(f"cache form {form!r} is none of {', '.join(FORMS)}.{nearest(form, FORMS)}")
    return form


def is_static(policy: Policy) -> bool:
    """Whether the policy's decisions depend on the number of the step alone."""
    return policy.decision.mask(2) is not None


def with_cache(flat: FlatProgram, cut: Cut, policy: Policy, form: str) -> CachedProgram:
    """Cut ``flat``'s graph and write the programs of ``form``; see `passes.fx.step_cache`."""
    from hasten.passes.fx import step_cache

    if form == "conditional":
        cached = step_cache.conditional(flat.module, cut, policy)
    else:
        cached = step_cache.straight(flat.module, cut, policy, static=is_static(policy))
    sizes = _Sizes(flat)
    programs = {name: _program(flat, cached, name, sizes) for name in cached.programs}
    return CachedProgram(programs, tuple(_state(t, sizes) for t in cached.state))


def _program(flat: FlatProgram, cached: Cached, name: str, sizes: _Sizes) -> FlatProgram:
    from hasten.passes.fx.view import fake

    program = cached.programs[name]
    starts = {t.name: t.start for t in cached.state}
    graph = program.module.graph
    extra = [n for n in graph.find_nodes(op="placeholder") if n.name in program.extra_inputs]
    written = graph.find_nodes(op="output")[0].args[0]
    own = len(written) - len(program.extra_outputs)
    results = [fake(n) for n in written[own:]]
    dynamic = None
    if flat.dynamic_shapes is not None:
        dynamic = (*flat.dynamic_shapes, *(_dynamic(fake(n), flat) for n in extra))
    return replace(
        flat,
        module=program.module,
        example_inputs=(*flat.example_inputs, *(example(fake(n), starts.get(n.name, 0.0)) for n in extra)),
        inputs=(*flat.inputs, *(sizes.spec(n.name, fake(n)) for n in extra)),
        outputs=(
            *flat.outputs[:own],
            *(sizes.spec(n, v) for n, v in zip(_next(program.extra_outputs), results, strict=True)),
        ),
        dynamic_shapes=dynamic,
    )


def _next(names: Sequence[str]) -> list[str]:
    """An output may not have an input's name: what a call returns for ``cache_x`` is ``next_cache_x``."""
    return [n if n.endswith("computed") else f"next_{n}" for n in names]


def example(value: torch.Tensor, start: float) -> torch.Tensor:
    """A real tensor of a fake's size, filled with ``start``."""
    import torch

    shape = [s if isinstance(s, int) else int(s.node.hint) for s in value.shape]
    return torch.full(shape, start, dtype=value.dtype, device=value.device)


def _state(tensor: StateTensor, sizes: _Sizes) -> dict[str, Any]:
    spec = sizes.spec(tensor.name, tensor.value)
    filled = example(tensor.value, tensor.start)
    return {**spec.as_dict(), "start": tensor.start, "bytes": filled.nbytes}


def _dynamic(value: torch.Tensor, flat: FlatProgram) -> dict[int, Any] | None:
    from torch.export import Dim as ExportDim

    axes = {axis: ExportDim.AUTO for axis, size in enumerate(value.shape) if not isinstance(size, int)}
    return axes or None


class _Sizes:
    """The manifest's names for the sizes of the graph's values."""

    def __init__(self, flat: FlatProgram) -> None:
        from hasten.passes.fx.view import fake

        self._names: dict[Any, str] = {}
        for node, spec in zip(flat.module.graph.find_nodes(op="placeholder"), flat.inputs, strict=True):
            for size, name in zip(fake(node).shape, spec.shape, strict=True):
                if not isinstance(size, int) and size.node.expr.is_Symbol and isinstance(name, str):
                    self._names[size.node.expr] = name

    def spec(self, name: str, value: torch.Tensor) -> TensorSpec:
        return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(self._size(s) for s in value.shape))

    def _size(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        if unknown := [s for s in expression.free_symbols if s not in self._names]:
            raise HastenError(f"a cached tensor has the size {expression}, and {unknown[0]} is no input's size")
        named = {s: type(s)(n, integer=True, positive=True) for s, n in self._names.items()}
        return str(expression.subs(named))
