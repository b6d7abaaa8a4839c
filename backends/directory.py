"""How an engine directory comes to be: under a temporary name, renamed when whole, one builder at a time."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hasten.backends.manifest import MANIFEST, is_engine_directory, read_manifest
from hasten.errors import HastenError, UsageError

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""How long a build waits for another build of the same output."""


@contextmanager
def publish(out: str | os.PathLike[str], *, overwrite: bool = False, wait: float = WAIT_SECONDS) -> Iterator[Path]:
    """Give the body an empty temporary folder beside ``out``; rename it to ``out`` when the body ends without an error.

    An existing engine is replaced only with ``overwrite``, and a folder that is neither empty nor an engine never.
    While the body runs, ``<out>.lock`` is held; another process waits ``wait`` seconds for it. What builds that were
    killed left beside ``out`` is removed. A full disk is one `HastenError`.
    """
    target = Path(os.path.realpath(out))
    _refuse_to_replace(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire(timeout=wait)
    except Timeout:
        raise HastenError(
            f"{_holder(target)} is building engine '{target}': waited {wait:g} s; wait for it or choose another output"
        ) from None
    except OSError as error:
        raise HastenError(f"engine '{target}' cannot be written: {error.strerror or error}") from error
    try:
        _remove_leftovers(target)
        _refuse_to_replace(target, overwrite)  # the build that was waited for may have written it
        yield from _fill_and_rename(target)
    finally:
        lock.release()


def _fill_and_rename(target: Path) -> Iterator[Path]:
    partial = _beside(target, "new")
    try:
        partial.mkdir()
        yield partial
        _rename(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise HastenError(
                f"engine '{target}': no space left on the disk; nothing was written: free some or choose another folder"
            ) from error
        raise


def _rename(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
        return
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_to_replace(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"output '{target}' is a file; an engine is a directory")
    entries = sorted(p.name for p in target.iterdir())
    if not entries:
        return
    if not is_engine_directory(target):
        raise UsageError(f"output '{target}' is neither empty nor an engine (it holds {entries[0]!r}); choose another")
    if not overwrite:
        raise UsageError(f"output '{target}' is an engine already; --force (overwrite=True) replaces it")
    try:
        listed = {MANIFEST, *read_manifest(target, check_files=False).files}
    except HastenError:
        return  # a damaged or other-version engine: it may be replaced
    if foreign := [name for name in entries if name not in listed]:
        raise UsageError(f"output '{target}' holds {foreign[0]!r}, which is not part of the engine; move it away first")


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.hasten-{kind}"


def _leftovers(target: Path, kind: str) -> list[tuple[int, Path]]:
    name = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.[0-9a-f]{{8}}\.hasten-{kind}")
    found = ((name.fullmatch(p.name), p) for p in target.parent.iterdir())
    return [(int(m[1]), p) for m, p in found if m]


def _remove_leftovers(target: Path) -> None:
    """With the lock held nobody else builds ``target``, so every temporary folder of it belongs to a dead build."""
    for pid, old in _leftovers(target, "old"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames: the engine that was there is still the best one
            logger.warning("engine '%s': put back after process %d died while replacing it", target, pid)
            os.rename(old, target)
    for pid, partial in _leftovers(target, "new"):
        logger.info("removing '%s', left by process %d", partial, pid)
        shutil.rmtree(partial, ignore_errors=True)


def _holder(target: Path) -> str:
    held = _leftovers(target, "new")
    if not held:
        return "another process"
    return f"process {max(held, key=lambda item: item[1].stat().st_mtime)[0]}"


def _is_disk_full(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
