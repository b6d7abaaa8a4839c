"""The convolutions of a model as layers that can be tuned, and layers written as words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hasten.errors import UsageError, nearest
from hasten.passes.choice import Layer

if TYPE_CHECKING:
    import torch

OPS = {"conv": "conv2d", "upsample-conv": "upsample_conv2d"}
"""Words on the command line, and what a `Layer` calls it."""
_WORD = re.compile(r"(?P<op>[a-z-]+):(?P<c>\d+)-(?P<k>\d+)@(?P<h>\d+)x(?P<w>\d+)(?P<more>(?:,[^,=]+=[^,=]*)*)")
_OPTIONS = ("batch", "dtype", "device", "threads")
_DTYPES = ("float32", "float16", "bfloat16")


def layers_of(program: torch.export.ExportedProgram | torch.fx.GraphModule, *, threads: int = 1) -> list[Layer]:
    """Every 3x3 convolution with stride 1, in the order of the graph, repetitions included.

    In a program, upsampling before a convolution is found first, by the rule ``upsample-conv``; a graph module is read
    as it is. Where a size may change, the example's counts; a convolution of which one is unknown is left out.
    """
    import torch

    from hasten.backends.optimize import optimize
    from hasten.passes.fx.graph import FxGraph
    from hasten.passes.fx.layers import layer_at

    if isinstance(program, torch.export.ExportedProgram):
        module, _ = optimize(program, passes="upsample-conv", verify="structure")
    else:
        module = program
    found = (layer_at(view, value, threads) for view in FxGraph(module).views() for value in view.values())
    return [layer for layer in found if isinstance(layer, Layer)]


def is_layer(word: str) -> bool:
    """Whether a word is meant to be a layer."""
    return ":" in word and word.partition(":")[0] in OPS


def layer_word(layer: Layer) -> str:
    """How a layer is written; `parse_layer` reads it.

    >>> layer_word(parse_layer("conv:320-320@64x64,batch=2"))
    'conv:320-320@64x64,batch=2,threads=1'
    """
    named = {name: word for word, name in OPS.items()}
    usual = {"batch": 1, "dtype": "float32", "device": "cpu"}
    more = [f",{k}={getattr(layer, k)}" for k, default in usual.items() if getattr(layer, k) != default]
    size = f"{layer.channels}-{layer.outputs}@{layer.height}x{layer.width}"
    return f"{named[layer.op]}:{size}{''.join(more)},threads={layer.threads}"


def parse_layer(word: str, *, threads: int = 1) -> Layer:
    """``conv:320-320@64x64,batch=2`` -> a `Layer`; also ``upsample-conv:…``, ``dtype=``, ``device=``, ``threads=``.

    >>> print(parse_layer("upsample-conv:512-256@64x48,batch=2"))
    upsample_conv2d 512-256@64x48, batch 2, float32, cpu, 1 thread
    """
    read = _WORD.fullmatch(word)
    if read is None or read["op"] not in OPS:
        raise UsageError(
            f"layer {word!r} is not written conv:CHANNELS-OUTPUTS@HEIGHTxWIDTH, as in conv:320-320@64x64,batch=2; "
            "upsample-conv:… is nearest 2x upsampling before it"
        )
    given = _options(word, read["more"])
    named = {"channels": read["c"], "outputs": read["k"], "height": read["h"], "width": read["w"]}
    numbers: dict[str, int] = {}
    for name, text in {**named, "batch": given["batch"], "threads": given["threads"] or str(threads)}.items():
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"layer {word!r}: {name} is {text!r}, which is not a whole number from 1 up")
        numbers[name] = int(text)
    return Layer(OPS[read["op"]], dtype=given["dtype"], device=given["device"], **numbers)


def _options(word: str, text: str) -> dict[str, str]:
    """``,batch=2,dtype=float16`` -> all of `_OPTIONS`; an empty word where ``threads`` is not given."""
    given: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in _OPTIONS:
            listed = ", ".join(_OPTIONS)
            raise UsageError(f"layer {word!r}: there is no {key!r}; a layer takes {listed}.{nearest(key, _OPTIONS)}")
        if key in given:
            raise UsageError(f"layer {word!r}: {key} is given twice")
        given[key] = value
    found = {"batch": "1", "dtype": "float32", "device": "cpu", "threads": "", **given}
    for key, choices in (("dtype", _DTYPES), ("device", ("cpu", "cuda"))):
        if found[key] not in choices:
            near = nearest(found[key], choices)
            raise UsageError(f"layer {word!r}: {key} {found[key]!r} is none of {', '.join(choices)}.{near}")
    return found
