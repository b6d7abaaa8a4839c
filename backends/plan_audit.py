"""What a TensorRT-RTX plan contains, read from its bytes without a GPU.

The serialized plan of TensorRT-RTX 1.4 to 1.7 carries the compiled program as text: kernels, jumps, the GPU
architectures. The format is not documented, so nothing here fails when the text is not found: the audit then says
"not readable".
"""

from __future__ import annotations

import mmap
import re
import struct
from typing import Any

MAGIC = b"vtrt"
HEADER_BYTES = 64
SM_BITS = {"sm75": 0x01, "sm80": 0x02, "sm86": 0x04, "sm89": 0x08, "sm120": 0x10, "sm121": 0x20}
NOT_READABLE = "not readable"

_KERNEL_SOURCE = b"__global__"
_NOT_TEXT = re.compile(rb"[^\t\n\r\x20-\x7e]")
_BACK = 1 << 16
_PROGRAM = re.compile(rb"header \{\n  version = [^\x00\x80-\xff]*")
_STEP = re.compile(r"^  (\w+)=\{ ", re.MULTILINE)
_KERNEL = re.compile(r"^  (?:runtime_)?function=\{ name=(\S+)", re.MULTILINE)
_JUMP = re.compile(r"^\s*cjmp\b", re.MULTILINE)
_LABEL = re.compile(r"^ *label (\w+):", re.MULTILINE)
_TARGETS = re.compile(r"^\s*cjmp\b.*?\btarget=\{([^}]*)\}", re.MULTILINE)


def audit(plan: bytes | mmap.mmap) -> dict[str, Any]:
    """Count what the program does, and what the plan's bytes are.

    ``readable``; ``stream_capturable``: whether the engine can be captured as a CUDA graph; ``accelerators``: its
    architectures; ``counts``: ``gemm_mha`` fused attentions, ``SiluGnor`` GroupNorm+SiLU kernels, ``Gnor`` GroupNorm
    kernels of any other kind, ``corrltn`` convolutions, ``fully_connected`` matrix products, ``runtime_fusion``
    products with fused neighbours, ``cjmp`` conditional jumps (an If or Loop whose body is skipped for real).
    ``behind_jumps``: the same counts of what lies right behind the labels that conditional jumps lead to, which is all
    of a branch without jumps of its own; what is counted above and not here runs at every call.
    ``bytes``: of the plan in all (``plan``), of ``kernels``, whose CUDA source each site of a graph holds anew with all
    its headers, of the ``program``'s text, and the ``rest``, which is the weights and what little names the layers.
    """
    programs = [m.group().decode("ascii") for m in _PROGRAM.finditer(plan)]
    if not programs:
        return {"readable": False, "reason": NOT_READABLE}
    text = "\n".join(programs)
    capturable = re.findall(r"stream_capturable=(\d)", text)
    accelerators = re.findall(r"accelerators=\{([^}]*)\}", text)
    return {
        "readable": True,
        "stream_capturable": capturable.count("1") == len(capturable) if capturable else None,
        "accelerators": sorted({name for group in accelerators for name in re.findall(r"sm\d+", group)}),
        "counts": _counts(text),
        "behind_jumps": _counts("\n".join(block for program in programs for block in _behind(program))),
        "bytes": _parts(plan, len(text)),
    }


def _parts(plan: bytes | mmap.mmap, program: int) -> dict[str, int]:
    kernels, at = 0, plan.find(_KERNEL_SOURCE)
    while at >= 0:
        end = _NOT_TEXT.search(plan, at)
        stop = len(plan) if end is None else end.start()
        kernels += stop - _start_of_text(plan, at)
        at = plan.find(_KERNEL_SOURCE, stop)
    return {"plan": len(plan), "kernels": kernels, "program": program, "rest": len(plan) - kernels - program}


def _start_of_text(plan: bytes | mmap.mmap, at: int) -> int:
    """Where the run of text begins that holds the byte ``at``."""
    while at > 0:
        before = max(0, at - _BACK)
        found = _NOT_TEXT.search(plan[before:at][::-1])
        if found is not None:
            return at - found.start()
        at = before
    return at


def _counts(text: str) -> dict[str, int]:
    kernels = _KERNEL.findall(text)
    steps = _STEP.findall(text)
    return {
        "gemm_mha": sum("_gemm_mha" in k or "_gemv_mha" in k for k in kernels),
        "SiluGnor": sum("SiluGnor" in k for k in kernels),
        "Gnor": sum("Gnor" in k and "SiluGnor" not in k for k in kernels),
        "corrltn": steps.count("corrltn"),
        "fully_connected": steps.count("fully_connected"),
        "runtime_fusion": steps.count("runtime_fusion"),
        "cjmp": len(_JUMP.findall(text)),
    }


def _behind(program: str) -> list[str]:
    """The text from each label that a conditional jump leads to, up to the next label."""
    _, *parts = _LABEL.split(program)
    blocks = dict(zip(parts[::2], parts[1::2], strict=True))
    targets = dict.fromkeys(t for found in _TARGETS.findall(program) for t in found.split())
    return [blocks[t] for t in targets if t in blocks]


def header_problem(plan: bytes | mmap.mmap, architectures: tuple[str, ...], version: str) -> str | None:
    """Say what is wrong with a TensorRT-RTX plan's header, or None: magic, size, version, architecture mask."""
    if len(plan) < HEADER_BYTES:
        return f"the plan has {len(plan)} bytes, fewer than its header"
    if plan[:4] != MAGIC:
        return f"the plan begins with {plan[:4]!r}, not {MAGIC!r}"
    (size,) = struct.unpack_from("<Q", plan, 0x10)
    if size != len(plan):
        return f"the header says {size} bytes, the plan has {len(plan)}"
    written = ".".join(map(str, plan[0x18:0x1C]))
    if written != version:
        return f"the header says version {written}, the builder is {version}"
    (mask,) = struct.unpack_from("<I", plan, 0x20)
    wanted = sum(SM_BITS[name] for name in architectures)
    if mask != wanted:
        found = [name for name, bit in SM_BITS.items() if mask & bit]
        return f"the header names {', '.join(found) or 'no architecture'}, asked for {', '.join(architectures)}"
    return None
