"""Measured times on disk: one JSON file in the user's cache directory, shared by every process of this user.

It is read without a lock, for it is only ever replaced whole; it is written under ``tuning.json.lock``, merged with
what other processes wrote meanwhile. Nothing that is wrong with it stops anything: the roofline model chooses then.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from hasten.backends.tuning_file import Entries, Key, Measurement, read, reason, text
from hasten.backends.tuning_machine import Machine
from hasten.errors import HastenError
from hasten.passes.choice import Layer

logger = logging.getLogger(__name__)

WAIT_SECONDS = 10.0
"""How long a write waits for another process's."""
_in_memory: dict[Path, Entries] = {}
"""What could not be written, by file, for the rest of this process."""
_warned: set[tuple[Path, str]] = set()


class Store:
    """The file at ``path``, by default ``tuning.json`` in ``$HASTEN_CACHE_DIR`` or the user's cache directory.

    ``native`` is the fingerprint of the C++ kernels, by default that of this machine's, which are built if need be.
    ``machines`` describes the machine of a device type, by default `hasten.backends.tuning_machine.machine`.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        native: str | None = None,
        machines: Callable[[str], Machine] | None = None,
    ) -> None:
        self.path = path if path is not None else _default_path()
        self._native = native
        self._machines = machines
        self._known: dict[str, Machine] = {}
        self._read_as: tuple[int, ...] | None = None
        self._entries: Entries = {}

    def get(self, layer: Layer) -> Measurement | None:
        """What was measured for ``layer`` on this machine, with these versions."""
        return self._all().get(self._key(layer))

    def put(self, layer: Layer, measurement: Measurement) -> None:
        """Keep a run, in the place of an older one; where it cannot be written, this process still has it."""
        added = {self._key(layer): measurement}
        try:
            self._write(added)
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            _in_memory.setdefault(self.path, {}).update(added)
            why = f"another process holds {self.path}.lock" if isinstance(error, Timeout) else reason(error)
            self._warn(
                f"cannot write {self.path}: {why}; what is measured serves this process only: make the file and "
                "its folder writable, or set HASTEN_CACHE_DIR to another folder"
            )

    def here(self) -> dict[Layer, Measurement]:
        """Everything that holds on this machine, with these versions."""
        return {k.layer: m for k, m in self._all().items() if k.machine == self._machine(k.layer.device)}

    def foreign(self) -> int:
        """How many entries belong to other machines or versions."""
        return len(self._all()) - len(self.here())

    def clear(self) -> tuple[int, list[Path]]:
        """Remove the file, and one that was kept aside; returns how many entries there were, and what was removed."""
        count = len(self._all(quiet=True))
        _in_memory.pop(self.path, None)
        there = [p for p in (self.path, self._aside) if p.exists()]
        if there:
            try:
                with FileLock(f"{self.path}.lock", timeout=WAIT_SECONDS):
                    for path in there:
                        path.unlink(missing_ok=True)
            except (OSError, NotImplementedError) as error:
                raise HastenError(f"cannot remove {self.path}: {reason(error)}; remove it by hand") from error
        self._read_as, self._entries = None, {}
        return count, there

    @property
    def _aside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.corrupt")

    def _machine(self, device: str) -> Machine:
        if device not in self._known:
            from hasten.backends import tuning_machine

            if self._machines is not None:
                self._known[device] = self._machines(device)
            else:
                if self._native is None:
                    self._native = tuning_machine.native_kernels()
                self._known[device] = tuning_machine.machine(device, self._native)
        return self._known[device]

    def _key(self, layer: Layer) -> Key:
        return Key(self._machine(layer.device), layer)

    def _all(self, *, quiet: bool = False) -> Entries:
        stamp = _stamp(self.path)
        if stamp != self._read_as:
            self._entries, wrong = read(self.path)
            self._read_as = stamp
            if wrong and not quiet:
                self._warn(
                    f"cannot read the measured times in {self.path}: {wrong}; the roofline model chooses instead: "
                    "remove the file with `hasten tune --clear`, and measure again"
                )
        return {**self._entries, **_in_memory.get(self.path, {})}

    def _write(self, added: Entries) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=WAIT_SECONDS):
            if self.path.exists() and not (self.path.stat().st_mode & 0o222 and os.access(self.path, os.W_OK)):
                raise PermissionError(13, "the file is read-only")  # a rename over it would succeed all the same
            entries, wrong = read(self.path)
            if wrong:
                os.replace(self.path, self._aside)
                logger.info("%s: kept aside as %s", self.path, self._aside)
            for left in self.path.parent.glob(f".{self.path.name}.*.new"):  # with the lock held: of a killed process
                left.unlink(missing_ok=True)
            pending = {**_in_memory.get(self.path, {}), **added}
            partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.new")
            try:
                partial.write_text(text({**entries, **pending}), encoding="utf-8")
                os.replace(partial, self.path)
            finally:
                partial.unlink(missing_ok=True)
            _in_memory.pop(self.path, None)

    def _warn(self, message: str) -> None:
        """Once a process: a store is opened for every model that is compiled."""
        if (self.path, message) not in _warned:
            _warned.add((self.path, message))
            logger.warning(message)


def _default_path() -> Path:
    from hasten.passes.ops.native.build import cache_folder

    return cache_folder() / "tuning.json"


def _stamp(path: Path) -> tuple[int, ...]:
    """Tells whether the file was replaced; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size
