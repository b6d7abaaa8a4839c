"""A model's error against itself in float64, and rewriting within a bound on it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hasten.backends.choosing import Choosing
from hasten.errors import VerificationError
from hasten.passes.choice import DIRECT, Limits
from hasten.passes.rule import Report

logger = logging.getLogger(__name__)

Rewrite = Callable[[Limits], tuple[fx.GraphModule, Report]]


def within(
    program: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    choosing: Choosing,
    rewrite: Rewrite,
) -> tuple[fx.GraphModule, Report]:
    """The rewritten graph whose error, measured on the example inputs, is at most ``choosing.max_error``.

    The implementation that is expected to be furthest off gives way first, in all layers. Raises `VerificationError`
    where the library's own implementations are further off than that, and where NaN or infinity leaves no error.
    """
    bound = choosing.max_error
    assert bound is not None
    wanted = in_float64(program, args, kwargs)
    if not all(bool(w.isfinite().all()) for w in wanted):
        raise VerificationError(
            "max_error: in float64 the model itself gives NaN or infinity on the example inputs; give others, on which "
            "its error can be measured"
        )
    limits = choosing.limits()
    while True:
        module, report = rewrite(limits)
        error = relative_error(_run(module, args, kwargs), wanted)
        report.notes.append(f"measured error against float64: {error:.2e} (at most {bound:.2e} was asked for)")
        report.error = error
        if error <= bound:
            return module, report
        worst = max((c["expected_error"] for c in report.choices if c["implementation"] != DIRECT), default=0.0)
        if not worst and not math.isfinite(error):
            raise VerificationError(
                f"max_error {bound:g}: with the library's own convolutions the model gives NaN or infinity where its "
                "float64 result has none; compute in a wider type"
            )
        if not worst:
            raise VerificationError(
                f"max_error {bound:g} is below what any implementation gives: with the library's own convolutions the "
                f"model is {error:.2e} off its float64 result; allow more, or compute in a wider type"
            )
        logger.info("error %.2e is above %.2e: trying again with layers below %.2e", error, bound, worst)
        limits = replace(limits, max_error=worst * (1 - 1e-6))


def in_float64(program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The program's outputs with weights, inputs and the graph's own casts to float32 in float64."""
    module = copy.deepcopy(program.module(check_guards=False)).double()
    for node in module.graph.nodes:  # dtypes that were written into the graph while it was captured in float32
        node.args, node.kwargs = (_widened(a) for a in (node.args, node.kwargs))
    module.recompile()
    wide_args, wide_kwargs = pytree.tree_map(_double, (args, dict(kwargs)))
    return _run(module, wide_args, wide_kwargs)


def _widened(arguments: Any) -> Any:
    return pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, arguments)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _run(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def relative_error(got: list[Any], wanted: list[Any]) -> float:
    """The largest of the outputs' errors, each relative to the norm of its float64 value; NaN where any of them is."""
    pairs = ((g.double(), w.double()) for g, w in zip(got, wanted, strict=True) if w.is_floating_point())
    errors = [float((g - w).norm() / w.norm().clamp_min(1e-300)) for g, w in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
