"""What a measured time belongs to: the processor or GPU it was taken on, and the versions of what was timed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NO_KERNELS = "none"
"""In the place of a fingerprint where the C++ kernels are not to be had: their operators are torch operators then."""
_RESTRICTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that take instructions away from the libraries that are timed."""


@dataclass(frozen=True)
class Machine:
    """``name``: processor with its vector instructions, or GPU. ``versions``: of the libraries and of our kernels."""

    name: str
    versions: str


def machine(device: str, native: str) -> Machine:
    """The machine that ``device`` (a torch device type) is on; ``native`` is the fingerprint of the C++ kernels."""
    import torch

    if device != "cpu":
        if device == "cuda" and torch.cuda.is_available():
            libraries = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
            return Machine(torch.cuda.get_device_name(), f"{libraries}, {triton_kernels()}")
        return Machine(f"no {device} device", f"torch {torch.__version__}")
    parts = (_processor(), *_features(), *(f"{n}={os.environ[n]}" for n in _RESTRICTIONS if os.environ.get(n)))
    return Machine(" ".join(parts), f"torch {torch.__version__}, oneDNN {_onednn()}, kernels {native}")


def native_kernels(*, load: bool = True) -> str:
    """Fingerprint of the C++ kernels, `NO_KERNELS` where they are not to be had.

    With ``load`` they are built and loaded, which takes half a minute the first time; without, the answer is what it
    will be if that succeeds.
    """
    from hasten.errors import HastenError
    from hasten.passes.ops.native import build

    if os.environ.get("HASTEN_NATIVE") == "0" or platform.system() != "Linux":
        return NO_KERNELS
    if load and not build.available():
        return NO_KERNELS
    try:
        return build.fingerprint()
    except HastenError:
        return NO_KERNELS


def triton_kernels() -> str:
    """Triton's version and a hash of the sources of our Triton convolution, for the key of a GPU."""
    from hasten.passes.ops import winograd_conv2d

    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    digest = hashlib.sha256()
    for name in ("triton.py", "transforms.py", "weights.py"):
        digest.update((Path(winograd_conv2d.__file__).parent / name).read_bytes())
    return f"Triton {compiler}, kernels {digest.hexdigest()[:12]}"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine() or "unknown processor"


def _features() -> list[str]:
    """Those vector instructions whose presence decides which kernels run."""
    import torch

    asked = {"avx2": "_is_avx2_supported", "avx512f": "_is_avx512_supported", "amx": "_is_amx_tile_supported"}
    return [name for name, test in asked.items() if getattr(torch.cpu, test, bool)()]


@cache
def _onednn() -> str:
    import torch

    found = re.search(r"MKL-DNN v([\w.]+)", torch.__config__.show())
    return found[1] if found else "none"
