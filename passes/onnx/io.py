"""ONNX files: one clear sentence for whatever is wrong, writing under a temporary name, external data both ways."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from hasten.errors import UsageError

OLDEST_OPSET = 11
"""The oldest opset that the function bodies can be written in."""
INLINE_LIMIT = 1_500_000_000
"""Bytes of weights above which `write` puts them into a file of their own; a protobuf file ends at 2 GB."""
EXTERNAL_FROM = 1024
"""Bytes from which a tensor goes into the external file."""
_LOCAL_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "hasten"})
_MAGIC = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PK\x03\x04", "a zip archive (a torch checkpoint or .pt2 package)"),
    (b"\x80\x02", "a Python pickle (an old torch checkpoint)"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"ORTM", "an .ort file"),
    (b"ftrt", "a TensorRT engine"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with 'git lfs pull'"),
)
_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Field number -> wire type of ModelProto, to tell a truncated model from something else."""


class Read(NamedTuple):
    """A model with its weights in memory, where it came from, and what a user should know about it."""

    model: onnx.ModelProto
    source: str
    notes: tuple[str, ...]


def read(source: str | os.PathLike[str] | onnx.ModelProto, *, detached: bool = False) -> Read:
    """Load an ONNX model (``.onnxtxt``: ONNX's text format), external data included, or raise `UsageError`.

    ``detached``: a model in memory may have weights in a file, where they stay.
    """
    if isinstance(source, onnx.ModelProto):
        where = "the given ModelProto"
        for tensor in () if detached else _external(source):
            raise UsageError(
                f"{where}: tensor {tensor.name!r} is in the external file {_entry(tensor, 'location')!r}, "
                "and a proto has no folder to look in; give the model's path"
            )
        model = source
    else:
        path = Path(source)
        where = str(path)
        model = _parse(path)
        _load_external(model, path)
    _check(model, where)
    return Read(model, where, tuple(_notes(model)))


def write(model: onnx.ModelProto, path: str | os.PathLike[str], *, external: bool | None = None) -> list[Path]:
    """Write ``model``; returns the files.

    Weights above `INLINE_LIMIT`, or all with ``external=True``, go to ``<name>.data`` beside it. What is in another
    file already stays there.
    Every file is written under a temporary name and renamed when whole. ``model`` is as it was afterwards.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    inside = (t for t in _all_tensors(model) if t.data_location != onnx.TensorProto.EXTERNAL)
    tensors = [t for t in inside if t.data_type != onnx.TensorProto.STRING]
    apart = external if external is not None else sum(_stored_bytes(t) for t in tensors) > INLINE_LIMIT
    if not apart:
        _replace(path, lambda file: file.write(model.SerializeToString()))
        return [path]
    beside = path.with_name(path.name + ".data")
    moved = [t for t in tensors if _stored_bytes(t) >= EXTERNAL_FROM]
    _replace(beside, lambda file: _move_out(moved, beside.name, file))
    try:
        _replace(path, lambda file: file.write(model.SerializeToString()))
    finally:
        for tensor in moved:
            _read_tensor(tensor, beside, str(path))
    return [path, beside]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all tensors that ``model`` holds, those of branches and bodies among them."""
    return sum(_stored_bytes(t) for t in _all_tensors(model) if t.data_type != onnx.TensorProto.STRING)


def _replace(path: Path, fill: Any) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_out(tensors: Iterable[onnx.TensorProto], location: str, file: BinaryIO) -> None:
    for tensor in tensors:
        content = _raw(tensor)
        # Runtimes map large tensors into memory, which needs whole pages.
        file.write(b"\0" * (-file.tell() % (4096 if len(content) >= 1 << 16 else 64)))
        offset = file.tell()
        file.write(content)
        for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(name)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", offset), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))


def _raw(tensor: onnx.TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    return _size(tensor)


def _size(tensor: onnx.TensorProto) -> int:
    """Bytes that the content of a tensor of this type and shape takes."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


_BITS = {
    getattr(onnx.TensorProto, name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if hasattr(onnx.TensorProto, name)
}
"""Types that share bytes."""


def _parse(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise UsageError(f"cannot read {path}: it is a folder; give the path of an .onnx file in it")
    if not path.exists():
        raise UsageError(f"cannot read {path}: there is no such file; give the path of an .onnx file")
    size = path.stat().st_size
    if size == 0:
        raise UsageError(f"cannot read {path}: the file is empty; export or download it again")
    with path.open("rb") as file:
        head = file.read(64)
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise UsageError(f"cannot read {path}: it is {what}, not an ONNX model")
    if path.suffix == ".onnxtxt":
        try:
            return onnx.parser.parse_model(path.read_text())
        except (onnx.parser.ParseError, UnicodeDecodeError) as error:
            line = " ".join(str(error).split())
            raise UsageError(f"cannot read {path}: it is not ONNX's text format: {line}") from error
    if size >= 1 << 31:
        raise UsageError(
            f"cannot read {path}: it has {size} bytes and protobuf ends at 2 GB; export it again with external data"
        )
    content = path.read_bytes()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise UsageError(f"cannot read {path}: {_diagnose(content)}") from error
    if not model.HasField("graph"):
        raise UsageError(f"cannot read {path}: {_diagnose(content)}")
    return model


def _diagnose(content: bytes) -> str:
    """Why bytes are no model: cut short, or not ONNX at all."""
    foreign = "it is not an ONNX model (no protobuf of one); give the path of an .onnx file"
    position, seen = 0, 0
    while position < len(content):
        tag, position = _varint(content, position)
        number, wire = tag >> 3, tag & 7
        if _FIELDS.get(number) != wire:
            return foreign
        length, position = _varint(content, position)
        if wire == 2:
            if position + length > len(content):
                missing = position + length - len(content)
                return (
                    f"it is cut short: at least {missing} of {position + length} bytes are missing; download it again"
                )
            position += length
        seen += 1
    return (
        "it holds no graph: the file is cut short or not an ONNX model; export or download it again"
        if seen
        else foreign
    )


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(content) and shift < 64:
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            break
    return value, position


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        wrapped = onnx.GraphProto(node=function.node)
        for graph in _graphs(wrapped):
            yield from graph.node


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (t for t in _all_tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)


def _entry(tensor: onnx.TensorProto, key: str) -> str:
    return next((e.value for e in tensor.external_data if e.key == key), "")


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    folder = Path(os.path.realpath(path.parent))
    for tensor in _external(model):
        location = _entry(tensor, "location")
        file = Path(os.path.realpath(folder / location))
        if not location or folder not in file.parents:
            raise UsageError(
                f"{path}: tensor {tensor.name!r} is said to be in {location!r}, outside the model's folder; "
                "such a path is never followed"
            )
        if not file.is_file():
            raise UsageError(
                f"{path}: tensor {tensor.name!r} needs {_size(tensor)} bytes of the external file {location!r}, "
                f"which is not there; put it into {path.parent}"
            )
        _read_tensor(tensor, file, str(path))


def _read_tensor(tensor: onnx.TensorProto, file: Path, where: str) -> None:
    offset, wanted = _number(tensor, "offset", 0, where), _size(tensor)
    length = _number(tensor, "length", wanted, where)
    if length != wanted:
        raise UsageError(
            f"{where}: tensor {tensor.name!r} takes {wanted} bytes and its entry for {file.name!r} says {length}; "
            "export the model again"
        )
    with file.open("rb") as opened:
        opened.seek(offset)
        content = opened.read(length)
    if len(content) < length:
        raise UsageError(
            f"{where}: tensor {tensor.name!r} needs bytes {offset} to {offset + length} of the external file "
            f"{file.name!r}, which has {file.stat().st_size}; copy or download it again"
        )
    tensor.raw_data = content
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _number(tensor: onnx.TensorProto, key: str, default: int, where: str) -> int:
    text = _entry(tensor, key)
    if text and not text.isdigit():
        raise UsageError(f"{where}: tensor {tensor.name!r} has {key} {text!r} in its external file, which is no number")
    return int(text) if text else default


def _check(model: onnx.ModelProto, where: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is None and any(n.domain in ("", "ai.onnx") for n in _nodes(model)):
        raise UsageError(f"{where}: names no version (opset) of the standard operators; export it again")
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        how = "convert it with onnx.version_converter" if opset < OLDEST_OPSET else "update the onnx package"
        raise UsageError(f"{where}: has opset {opset}, and hasten reads {OLDEST_OPSET} to {newest}; {how}")
    if model.ir_version > onnx.IR_VERSION:
        raise UsageError(
            f"{where}: has IR version {model.ir_version}, and onnx {onnx.__version__} reads up to {onnx.IR_VERSION}; "
            "update the onnx package"
        )
    for graph in _graphs(model.graph):
        _check_order(graph.node, where)
    for function in model.functions:
        _check_order(function.node, where)


def _check_order(nodes: Iterable[onnx.NodeProto], where: str) -> None:
    """No value may depend on itself. Order does not matter here: an unsorted graph is sorted later."""
    makers = {name: node for node in nodes for name in node.output if name}
    done: set[int] = set()
    active: set[int] = set()
    for start in makers.values():
        if id(start) in done:
            continue
        stack = [(start, iter(_reads(start)))]
        active.add(id(start))
        while stack:
            node, operands = stack[-1]
            for name in operands:
                maker = makers.get(name)
                if maker is None or id(maker) in done:
                    continue
                if id(maker) in active:
                    raise UsageError(f"{where}: the graph has a cycle: tensor {name!r} depends on itself")
                active.add(id(maker))
                stack.append((maker, iter(_reads(maker))))
                break
            else:
                stack.pop()
                active.discard(id(node))
                done.add(id(node))


def _reads(node: onnx.NodeProto) -> list[str]:
    """Names that a node and the graphs inside it read."""
    names = [n for n in node.input if n]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            made = {o for n in graph.node for o in n.output} | {i.name for i in graph.input}
            names += [n for inner in graph.node for n in _reads(inner) if n not in made]
    return names


def _notes(model: onnx.ModelProto) -> Iterator[str]:
    """What is left alone because nothing is known about it."""
    local = {(f.domain, f.name) for f in model.functions}
    foreign: dict[str, set[str]] = {}
    for node in _nodes(model):
        known = node.domain in _LOCAL_DOMAINS or node.domain == "com.microsoft" or (node.domain, node.op_type) in local
        if not known:
            foreign.setdefault(node.domain, set()).add(node.op_type)
    for domain, ops in sorted(foreign.items()):
        yield f"operators of the unknown domain {domain!r} are left alone: {', '.join(sorted(ops))}"
