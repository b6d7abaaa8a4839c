"""Memory of this process and of the machine, in bytes, as Linux tells it; other systems tell less."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int | None:
    """The most that was resident since the process began, or since `reset_peak`; None where nobody knows."""
    found = _kilobytes(_STATUS, "VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Give free memory back and let the peak start again from what is resident; False where that cannot be done."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """What a new process could use without anything being swapped out; None where nobody says."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _kilobytes(path: Path, key: str) -> int | None:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    words = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    return None if words is None else int(words[1]) * 1024
