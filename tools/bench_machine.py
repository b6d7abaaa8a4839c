"""Where and with what ``hasten bench`` ran: processor or GPU, processors to stay on, versions, load."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hasten.errors import UsageError

PACKAGES = ("torch", "onnxruntime", "openvino", "diffusers")
ENVIRONMENT = ("DNNL_", "GOMP_", "HASTEN_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "ORT_", "OV_", "TORCHINDUCTOR_")
"""How variables begin that the libraries read, paths excepted. Workers get them, but for the numbers of threads."""


def cores() -> list[int] | int:
    """The processors that this process may use; their number where the system does not say which."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pinned(threads: int | None) -> tuple[int, tuple[int, ...] | None]:
    """The threads to use and the processors to stay on (None: the system has no pinning).

    All processors where no number is given; `UsageError` for more threads than those.
    """
    found = cores()
    count = found if isinstance(found, int) else len(found)
    wanted = threads or count
    if wanted > count:
        raise UsageError(
            f"--threads is {wanted} and this process may use {count} processor{'s' if count != 1 else ''}; more "
            "threads than processors would wait for each other"
        )
    return wanted, None if isinstance(found, int) else tuple(found[:wanted])


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def gpu() -> str:
    """The first GPU's name, for works that run on it."""
    import torch

    return str(torch.cuda.get_device_name(0))


def versions() -> dict[str, str]:
    """Of everything that computes; packages that are not installed are left out."""
    import hasten

    found = {"hasten": hasten.__version__, "python": platform.python_version()}
    return found | {package: number for package in PACKAGES if (number := _version(package))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def conditions() -> dict[str, Any]:
    """What a row says of the time it was made: date, load of the machine before, and variables that change times."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "load": load(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT) and os.sep not in v},
    }


def load() -> float | None:
    """How many processes wanted to run in the last minute, on average; None where nobody says."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
