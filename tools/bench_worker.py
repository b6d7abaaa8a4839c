"""One implementation of one work in a process of its own: ``python -m hasten.tools.bench_worker CPUS``.

CPUS is a JSON list of the processors to stay on, or null. A request is one line of JSON on stdin, its answer one line
on stdout. ``build`` and ``prepare`` make something, ``warm`` and ``run`` call it and answer with seconds, ``memory``
answers with the peak since it was made. An answer is an object; with ``error`` in it, the request failed. Nothing
heavy is imported before the implementation asks for it, so that the memory is what the implementation needs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from hasten.tools.bench_memory import peak_bytes, reset_peak
from hasten.tools.bench_subject import Subject


class Worker:
    """The state between requests: the call, and how to wait for what it started."""

    def __init__(self) -> None:
        self.call: Any = None
        self.cuda = False

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        if request["do"] in ("build", "prepare"):
            started = time.perf_counter()
            module, _, name = request["function"].partition(":")
            subject = Subject(**request["subject"])
            made = getattr(import_module(module), name)(subject, Path(request["folder"]), **request["options"])
            if request["do"] == "build":
                return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
            self.call, self.cuda = made, subject.device == "cuda"
            return self._first(started, Path(request["folder"]))
        if request["do"] == "warm":
            return {"seconds": self._warm(request["calls"], request["enough"])}
        if request["do"] == "run":
            for _ in range(request["untimed"]):
                self.call()
            return {"seconds": self._timed(request["calls"])}
        if request["do"] == "memory":
            return {"peak_bytes": peak_bytes(), "device_peak_bytes": _device_peak() if self.cuda else None}
        raise ValueError(f"there is no request {request['do']!r}")

    def _first(self, started: float, folder: Path) -> dict[str, Any]:
        """The first call compiles where a compiler waits for it; its outputs are kept as files to compare."""
        outputs = self.call()
        self._wait()
        answer = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
        import numpy as np

        files = []
        for index, array in enumerate(arrays(outputs)):
            files.append(str(folder / f"output-{index}.npy"))
            np.save(files[-1], array)
        del outputs
        gc.collect()
        reset_peak()
        return {**answer, "outputs": files}

    def _warm(self, calls: int, enough: float) -> list[float]:
        """Call so many times, fewer once ``enough`` seconds are over."""
        seconds: list[float] = []
        while len(seconds) < calls and (not seconds or sum(seconds) < enough):
            seconds.append(self._timed(1))
        reset_peak()
        return seconds

    def _timed(self, calls: int) -> float:
        """Seconds per call."""
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        self._wait()
        return (time.perf_counter() - started) / calls

    def _wait(self) -> None:
        if self.cuda and "torch" in sys.modules:
            sys.modules["torch"].cuda.synchronize()


def arrays(outputs: Any) -> list[Any]:
    """Any implementation's outputs as numpy arrays; floating ones in float32."""
    import numpy as np

    if hasattr(outputs, "copy_outputs_to_cpu"):  # ONNX Runtime's binding
        outputs = outputs.copy_outputs_to_cpu()
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    made = []
    for output in outputs:
        array = np.asarray(output if isinstance(output, np.ndarray) else output.detach().float().cpu().numpy())
        made.append(array.astype(np.float32) if array.dtype.kind == "f" else array)
    return made


def _device_peak() -> int | None:
    """What is used of the GPU now, by whatever library; torch's own peak where that is more."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.cuda.max_memory_reserved())


def _die_with(parent: int) -> None:
    """End this process when the one that started it is gone; a compiler would keep it going for minutes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(cpus: list[int] | None) -> None:
    """Serve requests until stdin ends. What libraries print on stdout goes to stderr."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    if hasattr(os, "getppid"):
        threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
