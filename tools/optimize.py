"""``hasten optimize``: a source in, a rewritten file of the same kind out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.tools.arguments import DTYPES, choice_options, one_of, passes, rule_options, source_options, target
from hasten.tools.console import Console
from hasten.tools.files import check_folder, check_output, replace
from hasten.tools.report import choices_table, heading, misses_table, rules_table
from hasten.tools.source import ONNX, Source, program_inputs, resolve

if TYPE_CHECKING:
    import onnx
    import torch

SUMMARY = (
    "Rewrite a graph with the exact rules: .onnx to .onnx; a .pt2 file, named model or diffusers directory to .pt2."
)
EXAMPLES = (
    "hasten optimize unet.onnx -o unet.fast.onnx --expect attention=32",
    "hasten optimize scenes-unet -o scenes-unet.pt2 --verify model",
    "hasten optimize unet.onnx -o unet.rtx.onnx --target tensorrt-rtx:sm89 --dump passes/",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SOURCE", help=".onnx or .pt2 file, model name, or diffusers directory")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--target", type=target, help="what to legalise for: onnxruntime:cpu for ONNX, else inductor:cpu"
    )
    parser.add_argument("--passes", type=passes, metavar="NAME,…", help="these passes instead of the default ones")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the graph after every pass there, as text")
    parser.add_argument("--dtype", type=one_of(DTYPES), help="convert a named model first")
    parser.add_argument("--save-external-data", action="store_true", help="put an ONNX file's weights into FILE.data")
    source_options(parser)
    rule_options(parser)
    choice_options(parser)
    parser.set_defaults(shapes=None)


def run(args: argparse.Namespace, console: Console) -> int:
    """Rewrite, check the expectations, write."""
    source = resolve(args.source, reduced=args.reduced, weights=args.weights)
    is_onnx = source.kind == ONNX
    check_output(args.output, ".onnx" if is_onnx else ".pt2")
    if source.path.exists() and args.output.exists() and source.path.samefile(args.output):
        raise UsageError(f"output '{args.output}' is the source itself; choose another name")
    if args.save_external_data and not is_onnx:
        raise UsageError(f"--save-external-data is for ONNX files; '{source.text}' is {source.kind}")
    if args.dtype is not None and is_onnx:
        raise UsageError("--dtype is for named models; an ONNX file has its dtypes already")
    if args.dump is not None:
        check_folder(args.dump)
    from hasten.tools.rewrite import rewrite

    graph, original, found = rewrite(source, args, console)
    if is_onnx and args.verify == "model":
        _verify_onnx(original, graph, source)
    console.document(found.as_dict())
    console.show(heading(found), "", rules_table(found.report, found.expected))
    if (missed := misses_table(found.report, everything=console.verbosity > 0)) is not None:
        console.show("", missed)
    if (chosen := choices_table(found.report, everything=console.verbosity > 0)) is not None:
        console.show("", chosen)
    found.report.expect(args.expect)
    with console.progress(f"writing {args.output}"):
        if is_onnx:
            written = _write_onnx(graph, args.output, external=True if args.save_external_data else None)
        else:
            written = _write_program(graph, original, args.output)
            if any(name.startswith("hasten.") for name in found.report.ops_after):
                found.report.notes.append("import hasten.passes.ops before torch.export.load reads the file")
    found.report.outputs = [str(p) for p in written]
    for note in found.report.notes:
        console.show(f"note: {note}")
    console.show(f"wrote {', '.join(found.report.outputs)}")
    console.document(found.as_dict())
    return 0


def _write_onnx(model: onnx.ModelProto, path: Path, *, external: bool | None) -> list[Path]:
    from hasten.passes.onnx import io

    return io.write(model, path, external=external)


def _write_program(graph: torch.fx.GraphModule, original: torch.export.ExportedProgram, path: Path) -> list[Path]:
    import torch

    program = reexport(graph, original)
    replace(path, lambda partial: torch.export.save(program, partial))
    return [path]


def reexport(graph: torch.fx.GraphModule, original: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Export a rewritten graph with the inputs, outputs and symbolic sizes of the program it was made from."""
    import torch
    from torch.utils import _pytree

    args, kwargs = program_inputs(original)
    wanted = {s.arg.name for s in original.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    described = [n.meta.get("val") for n in original.graph.nodes if n.op == "placeholder" and n.name in wanted]
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    leaves = [v.clone() if isinstance(v, torch.Tensor) else v for v in leaves]  # sizes are told apart by identity
    shapes = torch.export.ShapesCollection()
    dynamic = False
    for leaf, value in zip(leaves, described, strict=True):
        if isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor):
            axes = {axis: _dim(size, original) for axis, size in enumerate(value.shape) if not isinstance(size, int)}
            if axes:
                shapes[leaf], dynamic = axes, True
    args, kwargs = _pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        return torch.export.export(graph, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False)


def _dim(size: Any, program: torch.export.ExportedProgram) -> Any:
    """A symbolic size as `torch.export` takes it: a symbol, a multiple of one, or what it finds out itself."""
    from torch.export import Dim

    expression = size.node.expr
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return Dim.AUTO
    factor = expression / symbols[0]
    bounds = program.range_constraints.get(symbols[0])
    if not factor.is_Integer or bounds is None:
        return Dim.AUTO
    high = None if str(bounds.upper) in ("oo", "int_oo") else int(bounds.upper)
    dim = Dim(str(symbols[0]), min=max(1, int(bounds.lower)), max=high)
    return dim if factor == 1 else int(factor) * dim


def _verify_onnx(original: onnx.ModelProto, graph: onnx.ModelProto, source: Source) -> None:
    """Run both whole models on random inputs."""
    from hasten.errors import VerificationError
    from hasten.tools.compare import differences
    from hasten.tools.runner import onnx_runner, random_inputs

    before, after = onnx_runner(original, source.text), onnx_runner(graph, "the rewritten model")
    for seed in (0, 1):
        inputs = random_inputs(before, seed)
        for row in differences(before.run(inputs), after.run(inputs)):
            if not row.within(1e-4):
                raise VerificationError(
                    f"the rewritten model differs from {source.text} on random inputs (seed {seed}): {row.text()}"
                )
