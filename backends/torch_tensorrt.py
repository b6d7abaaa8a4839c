"""torch_tensorrt: an optional way to a GPU for straight-line graphs (it has no converter for torch.cond)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.backends.inductor import PackageRunner
from hasten.backends.manifest import Manifest
from hasten.errors import HastenError, need

if TYPE_CHECKING:
    import torch

ARTIFACT = "model.pt2"
SETTINGS = {
    "use_explicit_typing": True,
    "immutable_weights": True,
    # It guesses that a square additive mask is causal unless told otherwise: wrong for any other mask.
    "attn_bias_is_causal": False,
}


def package(
    module: torch.fx.GraphModule, example_inputs: Sequence[torch.Tensor], dynamic_shapes: Any, out_dir: Path
) -> list[str]:
    """Compile ``module`` for the GPU at hand and write ``model.pt2``; returns the file names."""
    import torch

    compiler = need("torch_tensorrt", extra="torch-tensorrt")
    require()
    refuse_control_flow(module)
    inputs = [t.cuda() for t in example_inputs]
    with torch.no_grad():
        program = torch.export.export(module.cuda(), tuple(inputs), dynamic_shapes=dynamic_shapes, strict=False)
        known = getattr(compiler.dynamo, "CompilationSettings", None)
        fields = getattr(known, "__dataclass_fields__", SETTINGS)
        settings = {name: value for name, value in SETTINGS.items() if name in fields}
        compiled = compiler.dynamo.compile(program, inputs=inputs, **settings)
        compiler.save(compiled, str(out_dir / ARTIFACT), output_format="aot_inductor", retrace=True, arg_inputs=inputs)
    return [ARTIFACT]


def require() -> None:
    """Raise `MissingPackageError` unless torch_tensorrt is installed, `HastenError` where there is no GPU."""
    import torch

    need("torch_tensorrt", extra="torch-tensorrt")
    if not torch.cuda.is_available():
        raise HastenError(
            "target torch-tensorrt compiles for the GPU at hand, and torch finds none here; build it on one"
        )


def refuse_control_flow(module: torch.fx.GraphModule) -> None:
    """Raise `HastenError` naming the first conditional or loop."""
    for node in module.graph.nodes:
        kind = str(getattr(node.target, "_name", ""))
        if node.op == "call_function" and kind in ("cond", "while_loop", "scan"):
            raise HastenError(
                f"target torch-tensorrt: node {node.name!r} is a torch.{kind}, which torch_tensorrt has no "
                "converter for; build tensorrt or tensorrt-rtx instead"
            )


def runtime_versions() -> dict[str, str]:
    """Find the versions that an engine needs to be loaded with."""
    import torch

    compiler = need("torch_tensorrt", extra="torch-tensorrt")
    return {"torch": torch.__version__, "torch-tensorrt": str(compiler.__version__)}


class ProgramRunner(PackageRunner):
    """Runs a package whose TensorRT parts torch_tensorrt's operator executes."""

    def __init__(self, artifact: Path, manifest: Manifest) -> None:
        need("torch_tensorrt", extra="torch-tensorrt")  # registers that operator
        super().__init__(artifact, manifest)
