"""``winograd-conv2d`` in ONNX: 3x3 convolutions of ONNX Runtime's CPU provider as F(4x4) in standard operators.

ONNX Runtime has no Winograd of its own. What is written is `passes.onnx.winograd_form`; which sites are rewritten is
the chooser's answer to the roofline model of that form. No operator of ours is in the result.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

from hasten.passes.choice import DIRECT, Candidate, Choice, Layer, Limits, fastest_predicted, within_budget
from hasten.passes.onnx import winograd_form
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.onnx.view import OnnxView
from hasten.passes.ops.winograd_conv2d import select
from hasten.passes.pattern import As, GraphView, Match, Op, Var
from hasten.passes.pipeline import Context
from hasten.passes.rule import MissSite, Rule, RuleReport, apply

NAME = "winograd-conv2d"
TARGET = "onnxruntime:cpu"
FORM = "winograd-f4"
MACHINE = select.Machine(transform=5.3e-9, own_call=100e-6)
"""Two threads of an AMD EPYC with AVX-512, 15 interleaved rounds, Conv / this form in ms: 640 channels at 32x32 and
batch 2, 67 / 26; 1280 at 16x16 and batch 2, 70 / 25; 512 at 64x64, 87 / 45; 128 at 256x256, 95 / 71. The transforms are
what is left of them at 100 GFLOP/s for the products."""
SUMMED = 128
"""Channels that the kernel of a 1x1 convolution adds up in one go."""
GROWTH = 2 << 30
"""Bytes that a model's weights may grow by without a memory budget: the whole model is in memory while it is built."""

_CONV = As(
    "conv", Op("conv2d", (Var("x", rank=4), Var("weight", rank=4), Var("bias", optional=True)), binds=("padding",))
)


def run(graph: OnnxGraph, context: Context) -> RuleReport:
    """Run the pass over a model for ONNX Runtime on a CPU; others are left alone."""
    if context.target != TARGET:
        return RuleReport(NAME)
    forced = dict(context.options.get(NAME, {})).get("form")
    views = list(graph.views())
    keys: list[tuple[int, str]] = []
    places: list[str] = []
    found: list[Choice] = []
    misses: list[MissSite] = []
    for number, view in enumerate(views):
        for value in view.values():
            layer = layer_at(view, value)
            if isinstance(layer, str):
                misses.append(MissSite(view.where(value), layer))
            elif layer is not None:
                keys.append((number, value))
                places.append(view.where(value))
                found.append(_choice(layer, context.limits, forced))
    budget = context.limits.memory_budget
    kept = within_budget(found, GROWTH if budget is None else budget)
    choices = dict(zip(keys, kept, strict=True))
    report = RuleReport(NAME)
    written: set[tuple[int, str]] = set()
    for number, view in enumerate(views):
        rule = Rule(
            name=NAME,
            spellings=(("conv", _CONV),),
            guard=partial(_guard, choices, number),
            replace=partial(_replace, choices, written, number),
            anchors=frozenset(),  # the table of choices says why a site keeps what it had
            variant=lambda found: FORM,
        )
        report += apply(rule, view, fuel=context.fuel, verify=context.verify)
    return _tell(places, choices, written, replace(report, misses=report.misses + tuple(misses)), context)


def layer_at(view: OnnxView, value: str) -> Layer | str | None:
    """The layer that ``value`` computes, why it is none, or None where it is no 3x3 convolution of stride 1.

    Of a batch that may change from call to call one picture counts.
    """
    read = view.op(value)
    if read is None or read.name != "conv2d":
        return None
    x, weight, bias = (*read.inputs, None)[:3]
    assert x is not None
    assert weight is not None
    shape, kernel = view.shape(x), view.shape(weight)
    plain = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    if kernel is None or tuple(kernel[2:]) != (3, 3) or any(read.attrs.get(k, v) != v for k, v in plain.items()):
        return None
    if view.weights(weight) is None or (bias is not None and view.weights(bias) is None):
        return "its weights are not held by the model"
    if max(read.attrs["padding"]) > 2:
        return f"its map is padded by {tuple(read.attrs['padding'])}, more than its taps reach over"
    if shape is None or not all(isinstance(size, int) for size in shape[1:]):
        return "the size of its map is not known before the call"
    batch = shape[0] if isinstance(shape[0], int) else 1
    if 0 in (batch, *shape[1:]):
        return "it has no elements"
    dtype = view.dtype(x)
    if dtype != "float32":
        return f"it computes in {dtype}: the form rounds in the model's type, which loses digits below float32"
    _, channels, height, width = (int(size) for size in (batch, *shape[1:]))
    return Layer("conv2d", batch, channels, int(kernel[0]), height, width, dtype, "cpu", os.cpu_count() or 1)


def _choice(layer: Layer, limits: Limits, forced: str | None) -> Choice:
    direct = Candidate(DIRECT, select.predicted(layer, None))
    form = select.form(FORM)
    assert form is not None
    error = form.transform.expected_error(layer.dtype, layer.channels, SUMMED)
    why = ""
    if forced not in (None, FORM):
        why = f"{forced} was asked for, and ONNX operators have {FORM} only"
    elif limits.strict_nan:
        why = "a NaN or an infinity would spread over its whole tile, and strict-nan was asked for"
    elif limits.max_error is not None and error > limits.max_error:
        why = f"{FORM} is expected to be {error:.1e} off, {limits.max_error:.1e} is allowed"
    if why:
        return Choice(layer, direct, why, direct.predicted_seconds)
    tiles = 4 * form.frequencies * layer.batch * -(-layer.height // 4) * -(-layer.width // 4)
    candidate = Candidate(
        FORM,
        select.predicted(layer, form, MACHINE),
        4 * form.frequencies * layer.channels * layer.outputs,
        min(winograd_form.STRIP_BYTES, tiles * layer.channels) * 2,  # before and behind their transpose
        error,
    )
    if forced == FORM:
        return Choice(layer, candidate, "asked for by name", direct.predicted_seconds)
    return fastest_predicted(layer, [direct, candidate])


def _guard(choices: dict[tuple[int, str], Choice], number: int, view: GraphView[Any], found: Match[Any]) -> str | None:
    choice = choices.get((number, found["conv"]))
    if choice is None:
        return "no choice was made for it"
    return choice.reason if choice.name == DIRECT else None


def _replace(
    choices: dict[tuple[int, str], Choice],
    written: set[tuple[int, str]],
    number: int,
    view: OnnxView,
    found: Match[Any],
    root: str,
) -> str:
    layer = choices[number, found["conv"]].layer
    top, left, bottom, right = padding = tuple(found.attrs["padding"])
    weight, bias = view.weights(found["weight"]), found.values.get("bias")
    assert weight is not None
    cut = winograd_form.plan(
        layer.batch, layer.channels, layer.height + top + bottom - 2, layer.width + left + right - 2
    )
    written.add((number, found["conv"]))
    return winograd_form.write(
        view, found["x"], weight, None if bias is None else view.weights(bias), padding, cut, root
    )


def _tell(
    places: list[str],
    choices: dict[tuple[int, str], Choice],
    written: set[tuple[int, str]],
    report: RuleReport,
    context: Context,
) -> RuleReport:
    """Say which choices were carried out."""
    taken_back = {miss.where for miss in report.reverted}
    done = 0
    for where, (key, choice) in zip(places, choices.items(), strict=True):
        if choice.name != DIRECT and (key not in written or where in taken_back):
            why = "it was not reached, or its replacement was taken back"
            choice = replace(choice, candidate=Candidate(DIRECT, choice.direct_seconds), reason=why)
        done += choice.name != DIRECT
        context.choices.append((where, choice))
    if done:
        context.notes.append(
            f"{done} convolutions spread a NaN or an infinity over a whole tile; with strict-nan they keep the "
            "library's implementation"
        )
    return report
