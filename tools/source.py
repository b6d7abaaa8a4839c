"""What a SOURCE on the command line means: an ONNX file, a .pt2 file, a model's name or directory, an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.backends.manifest import MANIFEST
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

    from hasten.models.adapter import Adapter

ONNX, PROGRAM, MODEL, ENGINE = "an ONNX file", "a .pt2 file", "a model", "an engine"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_FOREIGN = {
    ".safetensors": "holds weights without a model; name the model, and the weights' directory with --weights",
    ".gguf": "is a GGUF file, which is not read; name the diffusers directory it was made from",
    ".plan": "is a TensorRT plan, which is not read; build an engine from the ONNX file it was made from",
    ".engine": "is a TensorRT engine, which is not read; build an engine from the ONNX file it was made from",
    ".ort": "is an ONNX Runtime format file, which is not read; give the .onnx file it was made from",
}


@dataclass(frozen=True)
class Source:
    """A resolved source; ``text`` is what `hasten.build` takes, ``kind`` `ONNX`, `PROGRAM`, `MODEL` or `ENGINE`.

    A named model's text ends in ``-reduced`` where that was asked for.
    """

    text: str
    kind: str
    weights: Path | None = None

    @property
    def path(self) -> Path:
        return Path(self.text)

    def adapter(self) -> Adapter:
        """The description of a named model, or of one in a directory."""
        from hasten.models.diffusers_dir import from_source, is_directory_source
        from hasten.models.registry import get

        if is_directory_source(self.text):
            return from_source(self.text)
        return get(self.text, weights=self.weights)

    def program(self, dtype: str | None = None) -> torch.export.ExportedProgram:
        """Capture a model on its example inputs, or read a .pt2 file."""
        from hasten.backends.capture import capture

        if self.kind == PROGRAM:
            if dtype is not None:
                raise UsageError(f"--dtype: {self.text} has its dtypes already; convert the module and export it again")
            return load_program(self.path)
        import torch

        adapter = self.adapter()
        wanted = getattr(torch, dtype or "float32")
        return capture(adapter.module().to(wanted), (), adapter.example_inputs(dtype=wanted))


def resolve(
    text: str,
    *,
    kinds: tuple[str, ...] = (ONNX, PROGRAM, MODEL),
    reduced: bool = False,
    weights: Path | None = None,
) -> Source:
    """Say what ``text`` is, without reading more than names; `UsageError` unless it is one of ``kinds``."""
    kind = _kind(text)
    if kind not in kinds:
        instead = "; `hasten run` runs it and `hasten inspect` shows what it was built from" if kind == ENGINE else ""
        raise UsageError(f"source '{text}' is {kind}, and this verb takes {', '.join(kinds)}{instead}")
    if kind != MODEL:
        for option, given in (("--reduced", reduced), ("--weights", weights is not None)):
            if given:
                raise UsageError(f"{option} is for named models; '{text}' is {kind}")
        return Source(text, kind)
    if _is_directory(text):
        if reduced or weights is not None:
            option = "--reduced" if reduced else "--weights"
            raise UsageError(f"{option} is for named models; '{text}' is a directory with its own configuration")
        return Source(text, kind)
    if reduced and not text.endswith("-reduced"):
        text += "-reduced"
    return Source(text, kind, weights)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Read a .pt2 file, including one that `hasten optimize` wrote, whose graph holds operators of this package."""
    import hasten.passes.ops  # noqa: F401  (registers the operators)
    from hasten.backends.program import load_program as load

    if not path.is_file():
        raise UsageError(f"source '{path}': there is no such file")
    return load(path)


def program_inputs(program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs of a program; `UsageError` where it has none."""
    if program.example_inputs is None:
        raise UsageError("the .pt2 file has no example inputs; export it again and keep them")
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def _kind(text: str) -> str:
    path = Path(text)
    suffix = path.suffix.lower()
    if not text:
        raise UsageError("the source is an empty word; give an .onnx or .pt2 file, a model's name or a directory")
    if (path / MANIFEST).exists():
        return ENGINE
    if suffix in (".onnx", ".onnxtxt"):
        return ONNX
    if suffix == ".pt2":
        return PROGRAM
    if _is_directory(text) or _is_name(text):
        return MODEL
    if path.is_dir():
        raise UsageError(
            f"source '{text}' is a directory without {MANIFEST} (an engine), config.json or model_index.json (a model)"
        )
    if suffix in _PICKLES:
        raise UsageError(
            f"source '{text}' has the name of a Python pickle, which is never loaded: it could run any code; "
            "save the program with torch.export.save (.pt2) or the weights as safetensors"
        )
    if suffix in _FOREIGN:
        raise UsageError(f"source '{text}' {_FOREIGN[suffix]}")
    if path.is_file():
        raise UsageError(f"source '{text}': the name of a file must end in .onnx or .pt2")
    from hasten.models.registry import names

    raise UsageError(
        f"there is no file, directory or model {text!r}; `hasten models` lists the models.{nearest(text, names())}"
    )


def _is_name(text: str) -> bool:
    from hasten.models.registry import names

    return text in names()


def _is_directory(text: str) -> bool:
    from hasten.models.diffusers_dir import is_directory_source

    return is_directory_source(text)
