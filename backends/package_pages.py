"""Give back the pages of a loaded package's file: the runtime has copied the weights out of them.

A package of AOTInductor is a shared library with the weights among its read-only data. Loading maps it and copies every
weight into a buffer of the runtime's own; the pages that were read for it stay in the process, so weights count twice.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

PAGEOUT = 21
"""Linux's MADV_PAGEOUT: what lies unchanged in a file leaves memory, and is read again if it is wanted again."""
_LARGE = 1 << 20
"""Bytes: smaller mappings are the library's tables, in use at every call."""
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r--p \S+ \S+ \S+ +(\S.*\.so)\n")


def release_package_pages(maps: Path = Path("/proc/self/maps")) -> int:
    """Ask Linux to take back large read-only mappings of packages; return how many bytes were asked for.

    Elsewhere, and on kernels before 5.4, nothing happens: only memory is at stake.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    asked = 0
    for start, end, path in _LINE.findall(maps.read_text()):
        first, size = int(start, 16), int(end, 16) - int(start, 16)
        if size >= _LARGE and "aotinductor" in path and madvise(first, size, PAGEOUT) == 0:
            asked += size
    return asked
