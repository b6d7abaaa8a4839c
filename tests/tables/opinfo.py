"""PyTorch's own samples of every operator that a rule touches, through the rewriting and compared with eager.

    python tests/tables/opinfo.py [--only NAME ...] [--dtype float32 ...] [--json]

`torch.testing`'s OpInfo database gives the samples: odd shapes, absent operands, non-contiguous inputs, numbers where
tensors are usual. Each is compiled alone (a bystander stays as it is) and inside what makes a rule fire: an activation
behind a norm, a softmax and a second product behind a first one, an upsampling before a convolution, a gate. Types and
shapes must be eager's, errors must be raised where eager raises. Prints one row a composition; exit code 1 on a
difference. NaN of eager's is not compared: a row of scores that are all minus infinity is NaN when it is spelled out,
and 0 in every fused attention.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from in_eager import clear, hits, rewritten, tensors
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Norm of the difference over the norm of eager's result."""

Body = Callable[..., Any]


FUNCTIONS = {"nn.functional.scaled_dot_product_attention": F.scaled_dot_product_attention}
"""Instead of the database's wrapper, which sets a seed, and so is none of Dynamo's."""


def plain(op: OpInfo) -> Body:
    return FUNCTIONS.get(op.name, op.op)


def then(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[OpInfo], Body]:
    """The activation of the operator's (first) result."""

    def compose(op: OpInfo) -> Body:
        function = plain(op)

        def body(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return activation(result[0] if isinstance(result, tuple) else result)

        return body

    return compose


def spelled_silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def spelled_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x * 2**-0.5))


def scaled_and_shifted(x: torch.Tensor) -> torch.Tensor:
    """The way a time embedding modulates a norm."""
    ones = torch.linspace(0.5, 1.5, x.shape[0] * x.shape[1]).to(x.dtype).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
    return F.silu(x * (1 + ones) + ones)


def attended(scores: torch.Tensor) -> torch.Tensor:
    """Softmax and a second product: the operator made the scores."""
    if scores.ndim < 2:
        return scores
    values = torch.linspace(-1, 1, scores.shape[-1] * 3).to(scores.dtype)
    values = values.reshape(*(1,) * (scores.ndim - 2), scores.shape[-1], 3).expand(*scores.shape[:-2], -1, -1)
    return (scores * 0.25).softmax(-1) @ values


def spelled_attention(op: OpInfo) -> Body:
    """What `F.scaled_dot_product_attention` is documented to compute."""

    def body(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return F.dropout(scores.softmax(-1), dropout_p) @ v

    return body


def upsampled_first(op: OpInfo) -> Body:
    """The sample's convolution, whatever its strides, behind an upsampling."""

    def body(x, weight, bias=None, **kwargs):
        return op.op(F.interpolate(x, scale_factor=2.0, mode="nearest") if x.ndim == 4 else x, weight, bias, **kwargs)

    return body


def convolved(x: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution of a map; everything else as it is."""
    if x.ndim != 4:
        return x
    weight = torch.linspace(-1, 1, 27 * x.shape[1]).to(x.dtype).reshape(3, x.shape[1], 3, 3)
    return F.conv2d(x, weight, padding=1)


def doubled(mode: str) -> Callable[[OpInfo], Body]:
    """The sample's input, upsampled by two before a 3x3 convolution."""

    def compose(op: OpInfo) -> Body:
        def body(x, *args, **kwargs):
            return convolved(F.interpolate(x, scale_factor=2.0, mode=mode))

        return body

    return compose


def gated(op: OpInfo) -> Body:
    """GEGLU where the sample has GLU."""

    def body(x, dim=-1):
        value, gate = x.chunk(2, dim)
        return value * F.gelu(gate)

    return body


NORMS = {
    "alone": plain,
    "silu": then(F.silu),
    "y*sigmoid(y)": then(spelled_silu),
    "gelu": then(F.gelu),
    "spelled gelu": then(spelled_gelu),
    "tanh gelu": then(lambda x: F.gelu(x, approximate="tanh")),
    "scale, shift, silu": then(scaled_and_shifted),
}
PRODUCTS = {"alone": plain, "softmax, product": then(attended)}
ACTIVATIONS = {"alone": plain}
COMPOSITIONS: dict[str, dict[str, Callable[[OpInfo], Body]]] = {
    "nn.functional.scaled_dot_product_attention": {"alone": plain, "spelled": spelled_attention, "silu": then(F.silu)},
    "nn.functional.group_norm": NORMS,
    "native_group_norm": NORMS,
    "nn.functional.layer_norm": {"alone": plain, "silu": then(F.silu), "spelled gelu": then(spelled_gelu)},
    "nn.functional.instance_norm": {"alone": plain, "silu": then(F.silu)},
    "nn.functional.batch_norm": {"silu": then(F.silu)},
    "nn.functional.gelu": ACTIVATIONS,
    "nn.functional.silu": ACTIVATIONS,
    "nn.functional.glu": {"alone": plain, "gelu gate": gated},
    "softmax": ACTIVATIONS,
    "softmax.with_dtype": ACTIVATIONS,
    "matmul": PRODUCTS,
    "__rmatmul__": PRODUCTS,
    "mm": PRODUCTS,
    "bmm": PRODUCTS,
    "baddbmm": PRODUCTS,
    "addbmm": PRODUCTS,
    "einsum": PRODUCTS,
    "nn.functional.interpolate.nearest": {"alone": plain, "conv2d": then(convolved), "2x, conv2d": doubled("nearest")},
    "nn.functional.interpolate.nearest-exact": {
        "alone": plain,
        "conv2d": then(convolved),
        "2x, conv2d": doubled("nearest-exact"),
    },
    "nn.functional.upsample_nearest": {"alone": plain, "conv2d": then(convolved)},
    "nn.functional.conv2d": {"alone": plain, "upsampled": upsampled_first, "silu": then(F.silu)},
    "erf": {"alone": plain, "of a gelu": lambda op: spelled_gelu},
    "var": ACTIVATIONS,
    "mean": ACTIVATIONS,
    "split": ACTIVATIONS,
    "chunk": ACTIVATIONS,
    "repeat_interleave": ACTIVATIONS,
    "masked_fill": ACTIVATIONS,
    "where": ACTIVATIONS,
}


FIRES = frozenset(
    [
        *((name, composition) for name in ("nn.functional.group_norm", "native_group_norm") for composition in NORMS),
        *((name, "softmax, product") for name in ("matmul", "__rmatmul__", "mm", "bmm", "baddbmm", "einsum")),
        ("nn.functional.scaled_dot_product_attention", "alone"),
        ("nn.functional.scaled_dot_product_attention", "spelled"),
        ("nn.functional.scaled_dot_product_attention", "silu"),
        ("nn.functional.layer_norm", "spelled gelu"),
        ("nn.functional.glu", "gelu gate"),
        ("nn.functional.interpolate.nearest", "2x, conv2d"),
        ("nn.functional.interpolate.nearest-exact", "2x, conv2d"),
        ("erf", "of a gelu"),
    ]
)
"""Compositions that a rule must rewrite for some samples; it may leave others alone. In no other one a rule fires."""


@dataclass
class Row:
    """``samples`` of one composition: how many were rewritten, equal to eager, and refused by both."""

    operator: str
    composition: str
    samples: int = 0
    rewritten: int = 0
    equal: int = 0
    refused: int = 0
    random: int = 0
    different: list[str] = field(default_factory=list)


def operators() -> dict[str, OpInfo]:
    """The database's entries for `COMPOSITIONS`, by name and variant."""
    known = {".".join(filter(None, (op.name, op.variant_test_name))): op for op in op_db}
    return {name: known[name] for name in COMPOSITIONS}


def samples(op: OpInfo, dtype: torch.dtype) -> Iterator[SampleInput]:
    if dtype in op.supported_dtypes("cpu"):
        torch.manual_seed(0)
        yield from op.sample_inputs("cpu", dtype, requires_grad=False)
        if dtype == torch.float32 and op.error_inputs_func is not None:
            yield from (error.sample_input for error in op.error_inputs("cpu"))


def difference(want: list[torch.Tensor], got: list[torch.Tensor], dtype: torch.dtype) -> str | None:
    kinds = [[(str(t.dtype), tuple(t.shape)) for t in ts] for ts in (want, got)]
    if kinds[0] != kinds[1]:
        return f"{kinds[1]} instead of {kinds[0]}"
    for a, b in zip(want, got, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return "other integers"
            continue
        known = ~a.isnan()
        x, y = a[known].double(), b[known].double()
        if not torch.equal(x.isinf(), y.isinf()) or bool(y.isnan().any()):
            return "infinities or NaN in other places"
        finite = x.isfinite()
        error, norm = float((x - y)[finite].norm()), float(x[finite].norm())
        if not error <= TOLERANCE[dtype] * max(norm, 1e-6):
            return f"relative error {error / max(norm, 1e-6):.2g}"
    return None


def check(op: OpInfo, body: Body, sample: SampleInput, dtype: torch.dtype, row: Row) -> None:
    """Run one sample in eager and rewritten, and count what happened."""
    row.samples += 1
    args = (sample.input, *sample.args)
    clear()
    torch.manual_seed(1)
    try:
        want = tensors(body(*args, **sample.kwargs))
    except Exception as error:
        try:
            torch.compile(body, backend=rewritten, fullgraph=True, dynamic=False)(*args, **sample.kwargs)
        except Exception:
            row.refused += 1
        else:
            row.different.append(f"{dtype} {sample.summary()}: eager raises {type(error).__name__}")
        return
    torch.manual_seed(2)
    if (again := difference(want, tensors(body(*args, **sample.kwargs)), dtype)) is not None:
        row.random += 1  # active dropout: only shapes and types can be compared
    torch.manual_seed(1)
    try:
        got = tensors(torch.compile(body, backend=rewritten, fullgraph=True, dynamic=False)(*args, **sample.kwargs))
    except Exception as error:
        row.different.append(f"{dtype} {sample.summary()}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    row.rewritten += bool(hits())
    if again is not None:
        want, got = ([t.new_zeros(t.shape) for t in ts] for ts in (want, got))
    if (why := difference(want, got, dtype)) is None:
        row.equal += 1
    else:
        row.different.append(f"{dtype} {sample.summary()}: {why}")


def measure(name: str, composition: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Row:
    """One row of the table."""
    op, row = operators()[name], Row(name, composition)
    body = COMPOSITIONS[name][composition](op)
    with torch.no_grad():
        for dtype in dtypes:
            for sample in samples(op, dtype):
                check(op, body, sample, dtype, row)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="operators whose name contains one of these")
    parser.add_argument("--dtype", nargs="*", choices=[str(d)[6:] for d in DTYPES], help="only these types")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    dtypes = tuple(d for d in DTYPES if not arguments.dtype or str(d)[6:] in arguments.dtype)
    out = sys.stderr if arguments.json else sys.stdout
    rows = []
    print(f"{'operator':42} {'composition':20} samples rewritten equal refused", file=out)
    for name, compositions in COMPOSITIONS.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        for composition in compositions:
            row = measure(name, composition, dtypes)
            rows.append(row)
            counts = f"{row.samples:7} {row.rewritten:9} {row.equal:5} {row.refused:7}"
            print(f"{name:42} {composition:20} {counts}", file=out, flush=True)
            for text in row.different:
                print(f"    {text}", file=out, flush=True)
    total = {k: sum(getattr(r, k) for r in rows) for k in ("samples", "rewritten", "equal", "refused", "random")}
    total["different"] = sum(len(r.different) for r in rows)
    print(", ".join(f"{count} {what}" for what, count in total.items()), file=out)
    if arguments.json:
        json.dump([asdict(r) for r in rows], sys.stdout, indent=1)
    wrong = [r for r in rows if bool(r.rewritten) != ((r.operator, r.composition) in FIRES)]
    for row in wrong:
        print(f"{row.operator}, {row.composition}: {row.rewritten} rewritten", file=out)
    return 1 if wrong or total["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
