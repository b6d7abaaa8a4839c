"""Files that the verbs write: under a temporary name in the same folder, renamed when whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from hasten.errors import HastenError, UsageError


def check_output(path: Path, *suffixes: str) -> Path:
    """Refuse, before any work, a path that cannot be written or that has another ending than the file needs."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"output '{path}' must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"output '{path}' is a directory; give the path of a file")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    return path


def check_folder(path: Path) -> Path:
    """Make a folder for several files, or say why that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output '{path}' cannot be a folder: {error.strerror or error}") from error
    return path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file and rename it to ``path``; nothing is left behind if it fails.

    The temporary name has the same ending, which decides the format for some writers.
    """
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise HastenError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write text."""
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))
