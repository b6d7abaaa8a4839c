"""``hasten compare``: two things that should compute the same, on the same inputs."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasten.errors import UsageError, VerificationError
from hasten.tools.arguments import number, source_options, whole
from hasten.tools.console import Console, duration, table
from hasten.tools.inputs import check_finite, read_inputs
from hasten.tools.runner import Runner, Tensors, open_runner, random_inputs
from hasten.tools.source import ENGINE, MODEL, ONNX, PROGRAM, resolve
from hasten.tools.timing import take_turns

SUMMARY = (
    "Run two of (model, .onnx, .pt2, engine) on the same inputs and compare every output; exit code 5 if they differ."
)
EXAMPLES = (
    "hasten compare unet.onnx unet.fast.onnx",
    "hasten compare scenes-unet engines/scenes-unet --rtol 1e-3",
    "hasten compare scenes-dit scenes-dit.pt2 --inputs inputs.npz --repeat 20 --json",
)


@dataclass(frozen=True)
class Difference:
    """How far one output of B is from A's.

    ``max_abs`` is the largest error, ``max_relative`` that over A's largest magnitude, ``relative`` the norm of the
    error over A's norm. ``reason`` is why the two cannot be compared, or where NaN and infinity do not agree.
    """

    name: str
    max_abs: float | None
    max_relative: float | None
    relative: float | None
    reason: str = ""

    def within(self, rtol: float) -> bool:
        """Whether both relative errors are at most ``rtol``."""
        return not self.reason and max(self.max_relative or 0.0, self.relative or 0.0) <= rtol

    def text(self) -> str:
        """One line."""
        if self.reason:
            return f"output {self.name!r}: {self.reason}"
        return (
            f"output {self.name!r} is off by {self.max_abs:.3g} at most, {self.max_relative:.3g} of the largest value "
            f"and {self.relative:.3g} of the norm"
        )


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("a", metavar="A", help="the reference: model name, .onnx, .pt2, diffusers directory, or engine")
    parser.add_argument("b", metavar="B", help="what is compared with it")
    parser.add_argument("--inputs", action="append", default=[], metavar="FILE", help="inputs.npz, or NAME=FILE.npy")
    parser.add_argument("--shapes", metavar="NAME:1x4x64x64,…", help="sizes of random inputs")
    parser.add_argument("--seed", type=whole(0), default=0, help="of random inputs (default 0)")
    parser.add_argument("--rtol", type=number, default=1e-4, help="largest relative error that passes (default 1e-4)")
    parser.add_argument("--repeat", type=whole(1), default=5, metavar="N", help="timed runs of each (default 5)")
    source_options(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Open both, run both, compare, time."""
    kinds = (ONNX, PROGRAM, MODEL, ENGINE)
    sources = []
    for text in (args.a, args.b):
        named = resolve(text, kinds=kinds).kind == MODEL
        extra = {"reduced": args.reduced, "weights": args.weights} if named else {}
        sources.append(resolve(text, kinds=kinds, **extra))
    if MODEL not in {s.kind for s in sources} and (args.reduced or args.weights):
        raise UsageError("--reduced and --weights are for named models; none is compared here")
    with console.progress("reading"):
        a, b = (open_runner(s) for s in sources)
    inputs = _inputs(a, b, args)
    with console.progress("running") as tell:
        tell("first runs", 0.0)
        rows = differences(a.run(inputs), b.run(inputs))
        tell("timing", 0.5)
        times = take_turns([lambda: a.run(inputs), lambda: b.run(inputs)], args.repeat)
    passed = all(row.within(args.rtol) for row in rows)
    console.document(
        {
            "a": a.label,
            "b": b.label,
            "rtol": args.rtol,
            "passed": passed,
            "inputs": {name: {"dtype": _dtype(t), "shape": list(t.shape)} for name, t in inputs.items()},
            "outputs": [asdict(row) for row in rows],
            "seconds": {"a": times[0].as_dict(), "b": times[1].as_dict()},
        }
    )
    shown = table("output", ">max abs", ">of largest", ">of norm", "")
    for row in rows:
        cells = ["" if v is None else f"{v:.3g}" for v in (row.max_abs, row.max_relative, row.relative)]
        shown.add_row(row.name, *cells, row.reason or ("passed" if row.within(args.rtol) else f"above {args.rtol:g}"))
    timed = table("", ">median", ">p20", ">p80")
    for side, runner, taken in zip("AB", (a, b), times, strict=True):
        spread = (taken.median, taken.quantile(0.2), taken.quantile(0.8))
        timed.add_row(f"{side}: {runner.label}", *map(duration, spread))
    console.show(shown, "", timed, f"\nB takes {times[1].median / times[0].median:.2f} of A's time")
    console.show("PASSED" if passed else "FAILED")
    if not passed:
        worst = next(row for row in rows if not row.within(args.rtol))
        raise VerificationError(f"{b.label} differs from {a.label}: {worst.text()}; --rtol is {args.rtol:g}")
    return 0


def _inputs(a: Runner, b: Runner, args: argparse.Namespace) -> Tensors:
    """From files, or else from whichever side knows what its inputs mean."""
    missing = {t.name for t in a.inputs} ^ {t.name for t in b.inputs}
    if missing:
        raise UsageError(
            f"{a.label} has inputs {', '.join(t.name for t in a.inputs)} and {b.label} has "
            f"{', '.join(t.name for t in b.inputs)}; only things with the same inputs can be compared"
        )
    if args.inputs:
        if args.shapes is not None:
            raise UsageError("--shapes is for random inputs; --inputs gives the inputs themselves")
        inputs = read_inputs([Path(i) if "=" not in i else i for i in args.inputs])
        check_finite(inputs)
        return inputs
    shapes = None
    if args.shapes is not None:
        from hasten.backends.shapes import parse_shapes

        shapes = parse_shapes(args.shapes)
    fixed, other = sorted((a, b), key=lambda r: sum(isinstance(d, str) for t in r.inputs for d in t.shape))
    if fixed.examples is None and other.examples is not None and not shapes:
        batch = next((t.shape[0] for t in fixed.inputs if t.shape), None)
        return other.examples(args.seed, batch if isinstance(batch, int) else None)
    return random_inputs(fixed, args.seed, shapes)


def differences(a: Tensors, b: Tensors) -> list[Difference]:
    """Compare outputs by name, or in order where the names differ; `UsageError` unless there are as many."""
    if len(a) != len(b):
        raise UsageError(f"A has outputs {', '.join(a)} and B has {', '.join(b)}; only as many can be compared")
    other = b if a.keys() == b.keys() else dict(zip(a, b.values(), strict=True))
    return [_difference(name, want, other[name]) for name, want in a.items()]


def _difference(name: str, want: Any, got: Any) -> Difference:
    import torch

    if want.shape != got.shape:
        return Difference(name, None, None, None, f"B's shape is {tuple(got.shape)} instead of {tuple(want.shape)}")
    if want.numel() == 0:
        return Difference(name, 0.0, 0.0, 0.0)
    x, y = want.double(), got.double()
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)) or not torch.equal(x[torch.isinf(x)], y[torch.isinf(y)]):
        return Difference(name, None, None, None, "NaN or infinity does not stand in the same places")
    x, y = x[finite], y[finite]
    if x.numel() == 0:
        return Difference(name, 0.0, 0.0, 0.0)
    error = (y - x).abs()
    worst = error.max().item()
    if worst == 0:
        return Difference(name, 0.0, 0.0, 0.0)
    # All of A is zero where the divisor is: any error is then as large as an error can be.
    largest, norm = x.abs().max().item(), x.norm().item()
    if largest == 0:
        return Difference(name, worst, None, None, f"A is zero everywhere and B reaches {worst:.3g}")
    return Difference(name, worst, worst / largest, error.norm().item() / norm)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
