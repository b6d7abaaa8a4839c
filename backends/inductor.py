"""AOTInductor packages: one ``.pt2`` file of compiled kernels and weights, the embedded default on a CPU."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.backends.manifest import Manifest
from hasten.backends.target import Target, parse_target
from hasten.errors import HastenError, MissingPackageError, UsageError, nearest

if TYPE_CHECKING:
    import torch

ARTIFACT = "model.pt2"
CODE_BYTES = 32 << 20
"""Room for the compiled code of a package, which holds the weights beside it."""


CPU_OPTIONS: dict[str, Any] = {"freezing": True}
"""Weights laid out for oneDNN's kernels at build time: 12.5 ms instead of 18.9 for a small UNet on two cores. Choosing
kernels by measurement (max_autotune) gained nothing beside it and doubled the build."""


def have_cxx_compiler() -> bool:
    """Whether the C++ compiler that Inductor would call is there (``$CXX``, else g++; cl on Windows)."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True


def require(target: Target) -> None:
    """Raise unless this machine can build ``target``: `MissingPackageError` for a compiler, `HastenError` for a GPU."""
    import torch

    if not have_cxx_compiler():
        asked = os.environ.get("CXX", "g++")
        raise MissingPackageError(
            f"target {target} compiles C++ and {asked!r} was not found: apt install g++, or set CXX to a C++17 "
            "compiler; onnxruntime:cpu needs none"
        )
    if target.device == "cuda" and not torch.cuda.is_available():
        raise HastenError(f"target {target} compiles on an NVIDIA GPU, and torch finds none here; build it on one")


def package(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    dynamic_shapes: Any,
    device: str,
    out_dir: Path,
    options: Mapping[str, Any] | None = None,
    *,
    name: str = ARTIFACT,
) -> list[str]:
    """Export ``module`` (flat: tensors in, tuple of tensors out), compile it, write the file ``name`` into ``out_dir``.

    ``dynamic_shapes`` is as `torch.export.export` takes it; ``options`` are Inductor's, beside `CPU_OPTIONS`. The
    package holds its weights and needs torch at the same version, but neither Python code nor a compiler, to run.
    Returns the file names.
    """
    import torch
    from torch._inductor import aoti_compile_and_package

    from hasten.backends.exported import exported
    from hasten.backends.frozen_subgraphs import frozen_subgraphs
    from hasten.backends.own_outputs import own_outputs

    require(parse_target(f"aoti:{device}"))
    for index, tensor in enumerate(example_inputs):
        if tensor.device.type != device:
            raise HastenError(
                f"target aoti:{device}: example input {index} is on {tensor.device}; move the module and its "
                f"inputs to {device}"
            )
    _check_options(options or {})
    _check_space(module, out_dir)
    with torch.no_grad(), frozen_subgraphs(), own_outputs():
        program = exported(module, tuple(example_inputs), dynamic_shapes)
        try:
            aoti_compile_and_package(
                program,
                package_path=str(out_dir / name),
                inductor_configs={**(CPU_OPTIONS if device == "cpu" else {}), **(options or {})},
            )
            files = [name, *_kernels(program, out_dir)]
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise HastenError(f"AOTInductor failed to compile for {device}: {first}") from error
    return files


OPAQUE = frozenset({"winograd_conv2d", "winograd_weight", "group_norm_affine", "apply_affine", "flash_attention"})
"""Operators of ours that a package calls by name; the others are compiled into it."""


def _kernels(program: torch.export.ExportedProgram, out_dir: Path) -> list[str]:
    """Put the library of C++ kernels beside a package that calls it, so that the engine needs no compiler to load."""
    from hasten.passes.ops.native import build

    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]  # branches and loops among them
    called = {n.target._schema.name for graph in graphs for n in graph.nodes if hasattr(n.target, "_schema")}
    if not called.intersection(f"hasten::{name}" for name in OPAQUE) or not build.available():
        return []
    shutil.copyfile(build.loaded(), out_dir / build.LIBRARY)
    return [build.LIBRARY]


def _check_space(module: torch.fx.GraphModule, out_dir: Path) -> None:
    """Raise as a full disk does before torch writes to one: its archive writer ends the whole process then."""
    weights = {t.data_ptr(): t.nbytes for t in module.state_dict(keep_vars=True).values()}
    if shutil.disk_usage(out_dir).free < sum(weights.values()) + CODE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out_dir))


def runtime_versions() -> dict[str, str]:
    """Find what a package depends on: torch, and the instructions of this CPU, which it is compiled for."""
    import torch

    return {"torch": torch.__version__, "cpu": " ".join(sorted(_cpu_features()))}


class PackageRunner:
    """Runs a package. Refuses one built by another torch version or for vector instructions this CPU lacks."""

    def __init__(self, artifact: Path, manifest: Manifest) -> None:
        import torch
        from torch._inductor import aoti_load_package

        from hasten.backends.package_pages import release_package_pages
        from hasten.passes.ops.native import build as native

        built, here = manifest.versions.get("torch", "?"), torch.__version__
        if _release(built) != _release(here):
            raise HastenError(
                f"engine '{artifact.parent}': built with torch {built}, and this is torch {here}: build it again"
            )
        lacking = sorted(set(manifest.versions.get("cpu", "").split()) - _cpu_features())
        if lacking and manifest.target == "aoti:cpu":
            raise HastenError(
                f"engine '{artifact.parent}': compiled for a CPU with {', '.join(lacking)}, which this one "
                "lacks: build it on this machine"
            )
        if (library := artifact.parent / native.LIBRARY).is_file():
            import hasten.passes.ops  # noqa: F401  (declares what the library implements)

            native.adopt(library)
        self._model = aoti_load_package(str(artifact))
        release_package_pages()
        self._device = parse_target(manifest.target).device

    def run_torch(self, inputs: list[torch.Tensor], /) -> list[torch.Tensor]:
        import torch

        with torch.no_grad():
            outputs = self._model(*inputs)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    def run_numpy(self, inputs: list[npt.NDArray[Any]], /) -> list[npt.NDArray[Any]]:
        import torch

        # torch warns of arrays that cannot be written to, though the engine only reads them
        ready = [torch.from_numpy(a if a.flags.writeable else np.array(a)).to(self._device) for a in inputs]
        return [t.cpu().numpy() for t in self.run_torch(ready)]


_VECTOR_FEATURES = ("amx", "avx", "bf16", "bmi", "dot", "f16c", "fma", "i8mm", "neon", "sve")


def _cpu_features() -> set[str]:
    """Name the instruction sets that a compiler would use here, as torch calls them."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # older torch does not tell
        return set()
    found = torch.cpu.get_capabilities()
    return {name for name, has in found.items() if has is True and name.startswith(_VECTOR_FEATURES)}


def _release(version: str) -> list[str]:
    return version.partition("+")[0].split(".")[:2]


def _check_options(options: Mapping[str, Any]) -> None:
    from torch._inductor import list_options

    known = list_options()
    for name in options:
        if name not in known:
            raise UsageError(f"Inductor has no option {name!r}.{nearest(name, known)}")
