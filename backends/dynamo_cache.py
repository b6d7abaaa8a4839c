"""A step cache in one of Dynamo's graphs: cut it, compile its programs, and give back what Dynamo shall call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hasten.backends.cached_callable import CachedCallable, Kind
from hasten.backends.step_cache import choose_form, is_static
from hasten.errors import UsageError, nearest
from hasten.passes.fx import step_cache
from hasten.passes.fx.view import fake
from hasten.passes.rule import Report
from hasten.passes.steps.catalog import parse

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
DIRECTIONS = ("descending", "ascending")


def compile_cached(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    report: Report,
    compile_graph: Compile,
) -> CachedCallable:
    """Compile ``gm`` with the step cache that ``options`` ask for; `UsageError` where it has nothing to cache."""
    from hasten.backends.region import find_cut

    direction = options.get("cache_time", DIRECTIONS[0])
    if direction not in DIRECTIONS:
        valid = ", ".join(DIRECTIONS)
        raise UsageError(f"options: cache_time {direction!r} is none of {valid}.{nearest(str(direction), DIRECTIONS)}")
    policy = parse(options["cache"])
    form = choose_form(options.get("cache_form"), policy)
    found = find_cut(gm, policy, options.get("region"))
    if form == "conditional":
        cached = step_cache.conditional(gm, found.cut, policy)
    else:
        cached = step_cache.straight(gm, found.cut, policy, static=is_static(policy))
    report.notes.append(f"step cache {options['cache']}: {found.summary}; form {form}")
    programs = {}
    for name, program in cached.programs.items():
        extra = [n for n in program.module.graph.find_nodes(op="placeholder") if n.name in program.extra_inputs]
        function = compile_graph(program.module, [*example_inputs, *(fake(n) for n in extra)])
        programs[name] = (function, program.extra_inputs, program.extra_outputs)
    inputs = gm.graph.find_nodes(op="placeholder")
    symbols = _symbols(inputs)
    return CachedCallable(
        policy,
        programs,
        {t.name: Kind(_shape(t.value, symbols), t.value.dtype, t.value.device, t.start) for t in cached.state},
        time_at=_time(inputs, example_inputs),
        owner_at=next((i for i, v in enumerate(example_inputs) if isinstance(v, torch.nn.Parameter)), None),
        ascending=direction == "ascending",
    )


def _time(inputs: Sequence[fx.Node], values: Sequence[Any]) -> int:
    """Which input is the timestep: the one called so, else the only small one that is no parameter."""
    small = [
        i
        for i, v in enumerate(values)
        if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter) and v.ndim <= 1
    ]
    for word in ("timestep", "time", "sigma"):
        named = [i for i in small if word in inputs[i].name.lower()]
        if len(named) == 1:
            return named[0]
    if len(small) == 1:
        return small[0]
    found = ", ".join(inputs[i].name for i in small) or "none of at most one dimension"
    raise UsageError(
        f"step cache: the graph's timestep cannot be told among its inputs ({found}); steps are told by it: "
        "name the argument of forward 'timestep', and pass it as a tensor"
    )


def _symbols(inputs: Sequence[fx.Node]) -> dict[Any, tuple[int, int]]:
    """Where a symbol's value is found at a call: (input, axis), axis -1 for an input that is the number itself."""
    found: dict[Any, tuple[int, int]] = {}
    for i, node in enumerate(inputs):
        value = fake(node)
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(-1, value)]
        for axis, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, (i, axis))
    return found


def _shape(value: torch.Tensor, symbols: Mapping[Any, tuple[int, int]]) -> tuple[Callable[[Sequence[Any]], int], ...]:
    return tuple(_size(size, symbols) for size in value.shape)


def _size(size: Any, symbols: Mapping[Any, tuple[int, int]]) -> Callable[[Sequence[Any]], int]:
    if isinstance(size, int):
        return lambda inputs: size
    expression = size.node.expr
    where = {s: symbols[s] for s in expression.free_symbols}

    def evaluate(inputs: Sequence[Any]) -> int:
        known = {s: inputs[i] if axis < 0 else inputs[i].shape[axis] for s, (i, axis) in where.items()}
        return int(expression.subs(known))

    return evaluate
