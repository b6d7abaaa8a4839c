"""The caller's side of `hasten.tools.bench_worker`: start it, ask it within a time, end it with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MALLOC = {
    "keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(16 << 20)},
    "default": {},
}
"""What glibc's allocator does with freed memory. ``keep`` keeps it, for every worker alike: the default returns large
maps to the system after each call and faults every page in again, which can cost more than the computation, and
runtimes with arenas of their own never pay it."""


class WorkerError(Exception):
    """The worker failed, died, or took too long; the message is the reason."""


class WorkerProcess:
    """A worker; ``folder`` is for its files and what it says on stderr."""

    def __init__(self, folder: Path, *, threads: int, cpus: Sequence[int] | None, malloc: str) -> None:
        self._stderr = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by close)
        count = str(threads)
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), count),
            # empty caches, so that the time of preparing is that of a first time
            **{key: str(folder / key.lower()) for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")},
            **MALLOC[malloc],
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hasten.tools.bench_worker", json.dumps(cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send one request and wait for its answer; `WorkerError` where there is none, or it is an error."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise WorkerError(f"no answer to {request['do']!r} within {timeout:g} s (--timeout)") from None
        except OSError:
            line = ""
        if not line:
            raise WorkerError(self._death(request["do"]))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and whatever it started, and wait until its memory is free."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._stderr.close()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a request that was never read
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._answers.put(line)
        self._answers.put("")

    def _death(self, doing: str) -> str:
        code = self._process.wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"the process {how} during {doing!r}" + (f": {said[-1].strip()}" if said else "")
