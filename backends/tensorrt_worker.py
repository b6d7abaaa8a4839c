"""Build one TensorRT plan in a process of its own: ``python -m hasten.backends.tensorrt_worker request.json``.

The builder can crash the process it runs in, so it never runs in the caller's. The request is a JSON object (see
`hasten.backends.tensorrt.build_plan`); the answer is written to its ``answer`` path. Only the module that the request
names is imported, ``tensorrt`` or ``tensorrt_rtx``: they are the same interface, and what one lacks is found with
hasattr.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from hasten.backends import processors

_MAX_THREADS = 8
"""Each of the builder's threads takes memory (60 MB in an SD1.5 loop), and the plan is the same with one or two."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse the model, build for the architectures and profiles, write the plan; returns the answer."""
    started = time.monotonic()
    trt = import_module(request["module"])
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    if builder is None:
        return {"error": f"the builder does not start: {log.last() or 'no reason given'}"}
    builder.max_threads = min(processors.count(), _MAX_THREADS)
    # Networks are strongly typed, by default from TensorRT 11 on: precision is in the graph, never in a flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(request["model"]):
        return {"error": f"the ONNX parser refuses the graph: {_parse_errors(parser)}"}
    config = builder.create_builder_config()
    if hasattr(config, "num_compute_capabilities"):  # TensorRT-RTX: builds for named architectures without a GPU
        config.num_compute_capabilities = len(request["architectures"])
        for index, name in enumerate(request["architectures"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    if request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profiles"].items():
            profile.set_shape(name, *map(tuple, shapes))
        if config.add_optimization_profile(profile) < 0:
            return {"error": f"the shapes do not fit the graph: {log.last() or 'no reason given'}"}
    layers: dict[str, int] = {}
    for index in range(network.num_layers):
        kind = str(network.get_layer(index).type).rpartition(".")[2]
        layers[kind] = layers.get(kind, 0) + 1
    plan = Path(request["plan"])
    if not _write(trt, builder, network, config, plan):
        return {"error": f"the build fails: {log.last() or 'no reason given'}"}
    return {
        "version": trt.__version__,
        "layers": layers,
        "malformed": _malformed(trt, log.logger, plan),
        "seconds": time.monotonic() - started,
    }


def _write(trt: Any, builder: Any, network: Any, config: Any, plan: Path) -> bool:
    """Build and write the plan, piece by piece where the builder can; whether it was built."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        made = builder.build_serialized_network(network, config)
        if made is not None:
            plan.write_bytes(made)
        return made is not None
    failed: list[OSError] = []
    with plan.open("wb") as file:

        class Writer(trt.IStreamWriter):
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # the builder lets no exception through
                    failed.append(error)
                    return 0

        built = builder.build_serialized_network_to_stream(network, config, Writer())
    if failed:
        raise failed[0]
    return bool(built)


def _malformed(trt: Any, logger: Any, path: Path) -> bool | None:
    """Ask the runtime whether the plan is malformed; None where it cannot be asked without a GPU (TensorRT)."""
    runtime = trt.Runtime(logger)
    if not hasattr(runtime, "get_engine_validity"):
        return None
    if path.stat().st_size == 0:
        return True
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        memoryview(plan) as seen,
    ):
        _, diagnostics = runtime.get_engine_validity(seen)
    return bool(int(diagnostics) & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE))


def _parse_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc().strip()}" for e in errors) or "no reason"


class _Log:
    """Keeps the builder's errors; everything else it says is for its developers."""

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if str(severity).rpartition(".")[2] in ("ERROR", "INTERNAL_ERROR"):
                    errors.append(message.strip())

        self.errors = errors
        self.logger = Logger()

    def last(self) -> str:
        """Join the last few errors: the first of them names the place, the last the consequence."""
        return "; ".join(self.errors[-3:])


def _die_with(parent: int) -> None:
    """End this process when the one that started it is gone, so that nobody writes into an abandoned folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(path: str) -> None:
    """Serve the request file at ``path``."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    if hasattr(os, "getppid"):
        threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    try:
        answer = build(request)
    except OSError as error:  # a full disk, say: the caller has words for it
        answer = {"errno": error.errno}
    partial = Path(request["answer"] + ".tmp")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(partial, request["answer"])


if __name__ == "__main__":
    main(sys.argv[1])
