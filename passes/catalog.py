"""The one list of passes, and the default pipeline of each kind of graph: the order of the compiler on one screen."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PASSES = {
    "canonical": "hasten.passes.onnx.canonical:CANONICAL",
    "gelu": "hasten.passes.rules.gelu:GELU",
    "geglu": "hasten.passes.rules.geglu:GEGLU",
    "attention": "hasten.passes.rules.attention:ATTENTION",
    "group-norm-act": "hasten.passes.rules.group_norm_act:GROUP_NORM_ACT",
    "fold-conv": "hasten.passes.rules.fold_conv:FOLD_CONV",
    "upsample-conv": "hasten.passes.rules.upsample_conv:UPSAMPLE_CONV",
    "winograd-conv2d": "hasten.passes.winograd:WINOGRAD_CONV2D",
    "native-group-norm": "hasten.passes.fx.native_norm:NATIVE_GROUP_NORM",
    "native-attention": "hasten.passes.fx.native_attention:NATIVE_ATTENTION",
    "legalise": "hasten.passes.onnx.legalise:LEGALISE",
}

# Each line stands where it does for the reason beside it.
RULES = (
    "gelu",  # first: GroupNorm+GELU and GEGLU look for one gelu node, not for its erf or tanh chain
    "geglu",  # before attention, so that a gate is never taken for a scale
    "attention",  # before the norms: q and k norms end at attention's operands
    "group-norm-act",  # takes the activation behind it, which nothing else claims
    "fold-conv",  # after the rules above, whose patterns hold constants; before those that take convolutions up
    "upsample-conv",  # last of the rules: looks at convolutions only
)
FX = (
    *RULES,
    "winograd-conv2d",  # after all rules: takes up the norms and upsamplings that they made
    "native-group-norm",  # the norms that no convolution took up
    "native-attention",  # after all that move or scale its operands
)
ONNX = (
    "canonical",  # exporters' spellings of shapes and constants -> one form, so that the rules see constants
    *RULES,
    "winograd-conv2d",  # convolutions that no rule above took into an operator
    "legalise",  # last: what the target cannot run, or runs slower than its own spelling, is lowered
)


def names() -> list[str]:
    """Every pass name, in catalog order."""
    return list(PASSES)


def load(name: str) -> Any:
    """The `Rule` or graph pass called ``name``."""
    module, _, attribute = PASSES[name].partition(":")
    return getattr(import_module(module), attribute)


def default(ir: str) -> tuple[str, ...]:
    """Names of the passes that run on ``fx`` or ``onnx`` graphs unless told otherwise."""
    return {"fx": FX, "onnx": ONNX}[ir]
