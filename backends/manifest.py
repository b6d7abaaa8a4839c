"""The manifest of an engine directory: what was built, from what, and the sha256 of every file.

``manifest.json`` is one JSON object. Reading it checks everything that can be checked without running the engine. The
hashes find damage and mixed-up files; they are no signature: an engine holds machine code, so load only engines that
you trust as you trust a program.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hasten.errors import HastenError

FORMAT = "hasten-engine"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_MAX_BYTES = 64 << 20
Dim = int | str
"""A fixed size; or a symbol such as ``h``, or an expression of symbols such as ``8*h``."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @classmethod
    def of(cls, value: Any) -> TensorSpec:
        """Read what `as_dict` wrote; TypeError or KeyError where it is something else."""
        shape = tuple(_typed(d, int, str) for d in _typed(value["shape"], list))
        return cls(_typed(value["name"], str), _typed(value["dtype"], str), shape)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Manifest:
    """What an engine directory says about itself.

    ``artifact`` is the file that the target's runtime opens. ``dims`` gives (least, greatest) of every symbol in the
    shapes. ``constants`` are the arguments that were frozen at build time, by name. ``state`` lists the tensors that
    the caller carries from step to step. ``cache`` is the step cache: its policy's text, form, region, and the
    ``programs`` beside the main one. ``loop`` is the sampler in the engine: its bounds and what it runs unless it is
    told otherwise (`sampling.Looping`). ``audit`` is what was found in a TensorRT plan. ``seconds`` is the time of
    the build.
    """

    target: str
    artifact: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    versions: Mapping[str, str]
    report: Mapping[str, Any]
    seconds: float
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    state: tuple[Mapping[str, Any], ...] = ()
    audit: Mapping[str, Any] | None = None
    cache: Mapping[str, Any] | None = None
    loop: Mapping[str, Any] | None = None
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Make the JSON object."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "target": self.target,
            "artifact": self.artifact,
            "inputs": [t.as_dict() for t in self.inputs],
            "outputs": [t.as_dict() for t in self.outputs],
            "dims": {name: list(bounds) for name, bounds in self.dims.items()},
            "constants": dict(self.constants),
            "state": [dict(s) for s in self.state],
            "versions": dict(self.versions),
            "report": dict(self.report),
            "audit": None if self.audit is None else dict(self.audit),
            "cache": None if self.cache is None else dict(self.cache),
            "loop": None if self.loop is None else dict(self.loop),
            "seconds": self.seconds,
            "files": {name: {"sha256": sha, "size": size} for name, (sha, size) in self.files.items()},
        }

    def as_program(self) -> dict[str, Any]:
        """What the manifest of an engine of several programs says of this one: see `program`."""
        sides = {side: [t.as_dict() for t in getattr(self, side)] for side in ("inputs", "outputs")}
        return {"artifact": self.artifact, **sides, "audit": self.audit}

    def program(self, said: Mapping[str, Any]) -> Manifest:
        """The manifest of one program of this engine, of which it says ``said`` (`as_program`)."""
        inputs, outputs = (tuple(TensorSpec.of(t) for t in said[side]) for side in ("inputs", "outputs"))
        return replace(self, artifact=said["artifact"], inputs=inputs, outputs=outputs, audit=said["audit"])


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Hash every file in ``directory``, write the manifest beside them, and return it with ``files`` filled in."""
    files = {p.name: (sha256(p), p.stat().st_size) for p in sorted(directory.iterdir()) if p.name != MANIFEST}
    whole = Manifest(**{**vars(manifest), "files": files})
    partial = directory / (MANIFEST + ".tmp")
    partial.write_text(json.dumps(whole.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, directory / MANIFEST)
    return whole


def read_manifest(path: str | os.PathLike[str], *, check_files: bool = True) -> Manifest:
    """Read the manifest of the engine directory ``path``; `HastenError` with the reason if it is not whole.

    ``check_files=False`` reads the manifest alone and looks at no other file.
    """
    directory = Path(path)

    def refuse(reason: str) -> HastenError:
        return HastenError(f"engine '{directory}': {reason}")

    if not directory.is_dir():
        raise refuse("there is no such directory")
    file = directory / MANIFEST
    if file.is_symlink():
        raise refuse(f"{MANIFEST} is a link; an engine holds plain files")
    if not file.is_file():
        raise refuse(f"{MANIFEST} is missing, so this is no engine directory")
    if file.stat().st_size > _MAX_BYTES:
        raise refuse(f"{MANIFEST} has {file.stat().st_size} bytes, more than any manifest ({_MAX_BYTES})")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse(f"{MANIFEST} is not JSON ({error})") from error
    manifest = _parse(content, refuse)
    if check_files:
        _check_files(directory, manifest, refuse)
    return manifest


def is_engine_directory(path: Path) -> bool:
    """Whether ``path`` holds a manifest of this format, of whatever version."""
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_Refuse = Callable[[str], HastenError]
_KEYS = (
    "target",
    "artifact",
    "inputs",
    "outputs",
    "dims",
    "constants",
    "state",
    "versions",
    "report",
    "audit",
    "cache",
    "seconds",
    "files",
)


def _parse(content: Any, refuse: _Refuse) -> Manifest:
    if not isinstance(content, dict):
        raise refuse(f"{MANIFEST} holds a JSON {type(content).__name__}, not an object")
    if (found := content.get("format")) != FORMAT:
        raise refuse(f"{MANIFEST} has format {found!r}, not {FORMAT!r}")
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise refuse(
            f"{MANIFEST} has format version {version!r} and this hasten reads {FORMAT_VERSION}: build the engine again"
        )
    if missing := [key for key in _KEYS if key not in content]:
        raise refuse(f"{MANIFEST} lacks {', '.join(map(repr, missing))}")
    try:
        return Manifest(
            target=_typed(content["target"], str),
            artifact=_typed(content["artifact"], str),
            inputs=tuple(TensorSpec.of(t) for t in _typed(content["inputs"], list)),
            outputs=tuple(TensorSpec.of(t) for t in _typed(content["outputs"], list)),
            dims={k: _bounds(v) for k, v in _typed(content["dims"], dict).items()},
            constants=_typed(content["constants"], dict),
            state=tuple(_typed(s, dict) for s in _typed(content["state"], list)),
            versions={k: _typed(v, str) for k, v in _typed(content["versions"], dict).items()},
            report=_typed(content["report"], dict),
            audit=_typed(content["audit"], dict, type(None)),
            cache=_typed(content["cache"], dict, type(None)),
            loop=_typed(content.get("loop"), dict, type(None)),
            seconds=_typed(content["seconds"], float, int),
            files={
                k: (_typed(v["sha256"], str), _typed(v["size"], int)) for k, v in _typed(content["files"], dict).items()
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(f"{MANIFEST} is malformed ({type(error).__name__}: {error})") from error


def _typed(value: Any, *types: type) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{value!r} is no {types[0].__name__}")
    return value


def _file(value: Any) -> tuple[str, int]:
    return _typed(value["sha256"], str), _typed(value["size"], int)


def _bounds(value: Any) -> tuple[int, int | None]:
    low, high = _typed(value, list)
    return _typed(low, int), _typed(high, int, type(None))


def _check_files(directory: Path, manifest: Manifest, refuse: _Refuse) -> None:
    for name in manifest.files:
        if name in ("", ".", "..", MANIFEST) or any(c in name for c in "/\\:\0"):
            raise refuse(f"{MANIFEST} names the file {name!r}, which is no plain name inside the directory")
    if manifest.artifact not in manifest.files:
        raise refuse(f"{MANIFEST} names the artifact {manifest.artifact!r}, which is not among its files")
    for entry in sorted(directory.iterdir()):
        if entry.name != MANIFEST and entry.name not in manifest.files:
            raise refuse(f"holds {entry.name!r}, which its manifest does not list: remove it or build the engine again")
    for name, (sha, size) in manifest.files.items():
        file = directory / name
        if file.is_symlink():
            raise refuse(f"{name!r} is a link; an engine holds plain files")
        if not file.is_file():
            raise refuse(f"{name!r} is missing: build the engine again")
        if (found := file.stat().st_size) != size:
            raise refuse(f"{name!r} has {found} bytes instead of {size}: build the engine again")
        if sha256(file) != sha:
            raise refuse(
                f"{name!r} has changed since the engine was built (its sha256 differs): build the engine again"
            )
