"""Python's collector of reference cycles, while a graph is made and before its memory is wanted by another process.

Capturing, rewriting and exporting make objects by the million that all live to the end. A collection in between walks
over each of them and over every imported module, finds nothing, and comes again once a quarter more was made.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_off() -> Iterator[None]:
    """Collect nothing while the body runs; what is counted by references alone is freed as ever."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def let_go() -> None:
    """Give back the memory of what nothing holds any more: graphs and their modules hold each other."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library than glibc, whose allocator keeps what was freed
        return
    trim(0)
