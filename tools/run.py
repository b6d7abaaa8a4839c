"""``hasten run``: an engine on inputs from files, or on random ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hasten.errors import UsageError
from hasten.tools.arguments import whole
from hasten.tools.console import Console, duration, table
from hasten.tools.files import check_output
from hasten.tools.inputs import picture, read_inputs, write_outputs
from hasten.tools.runner import engine_runner, random_inputs
from hasten.tools.source import ENGINE, resolve
from hasten.tools.timing import take_turns

SUMMARY = "Run an engine. Inputs that no file gives are drawn from --seed, as the engine's manifest describes them."
EXAMPLES = (
    "hasten run engines/scenes-unet -o out.npz",
    "hasten run engines/scenes-unet inputs.npz -o out.npz --repeat 20",
    "hasten run engines/decoder latent=latent.npy -o picture.png",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine directory")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="inputs.npz, or NAME=FILE.npy")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the outputs: .npz, or .png for pictures"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of random inputs (default 0)")
    parser.add_argument("--shapes", metavar="NAME:1x4x64x64,…", help="sizes of random inputs")
    parser.add_argument(
        "--repeat", type=whole(1), default=1, metavar="N", help="timed runs after the first (default 1)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Load, gather inputs, run, write."""
    from hasten.backends.shapes import parse_shapes

    source = resolve(args.engine, kinds=(ENGINE,))
    if args.output is not None:
        check_output(args.output, ".npz", ".png")
    given = read_inputs(args.inputs)
    with console.progress(f"loading {source.text}"):
        runner = engine_runner(source)
    known = {t.name for t in runner.inputs}
    shapes = parse_shapes(args.shapes) if args.shapes is not None else None
    for name in shapes or {}:
        if name in given:
            raise UsageError(f"--shapes is for random inputs; {name!r} comes from a file")
    drawn: dict[str, Any] = {}
    if not known <= given.keys():
        sizes = {**{n: tuple(t.shape) for n, t in given.items() if n in known}, **(shapes or {})}
        drawn = {n: t for n, t in random_inputs(runner, args.seed, sizes).items() if n not in given}
    inputs = {**given, **drawn}
    with console.progress(f"running {source.text}"):
        outputs = runner.run(inputs)
        times = take_turns([lambda: runner.run(inputs)], args.repeat)[0]
    if args.output is not None:
        if args.output.suffix.lower() == ".png":
            picture(outputs)
        write_outputs(outputs, args.output)
    console.document(
        {
            "engine": source.text,
            "inputs": {n: _about(t, n in drawn) for n, t in inputs.items()},
            "outputs": {n: _statistics(t) for n, t in outputs.items()},
            "seconds": times.as_dict(),
            "written": [str(args.output)] if args.output is not None else [],
        }
    )
    shown = table("", "name", "type", "shape", ">mean", ">deviation")
    for side, tensors in (("input", inputs), ("output", outputs)):
        for name, tensor in tensors.items():
            stats = _statistics(tensor)
            numbers = ["" if stats[k] is None else f"{stats[k]:.3g}" for k in ("mean", "deviation")]
            label = f"{side} (random)" if side == "input" and name in drawn else side
            shown.add_row(label, name, stats["dtype"], str(tuple(tensor.shape)), *numbers)
    console.show(shown)
    for name, tensor in outputs.items():
        if bad := _statistics(tensor)["not_finite"]:
            console.note(f"warning: output {name!r}: {bad} of {tensor.numel()} values are NaN or infinity")
    spread = f" (p20 {duration(times.quantile(0.2))}, p80 {duration(times.quantile(0.8))})" if args.repeat > 1 else ""
    console.show(f"median of {args.repeat}: {duration(times.median)}{spread}")
    if args.output is not None:
        console.show(f"wrote {args.output}")
    return 0


def _about(tensor: Any, random: bool) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "random": random}


def _statistics(tensor: Any) -> dict[str, Any]:
    import torch

    finite = tensor.double()[torch.isfinite(tensor)] if tensor.is_floating_point() else tensor.double()
    some = finite.numel() > 0
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "mean": finite.mean().item() if some else None,
        "deviation": finite.std(correction=0).item() if some else None,
        "not_finite": tensor.numel() - finite.numel(),
    }
