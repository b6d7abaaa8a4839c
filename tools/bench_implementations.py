"""The implementations that ``hasten bench`` compares, as data: what makes each, and what it needs.

The functions are named, not imported: they are called in a worker process (`hasten.tools.bench_worker`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hasten.errors import HastenError, MissingPackageError, UsageError, nearest, need

_TORCH, _RUNTIMES = "hasten.tools.bench_torch", "hasten.tools.bench_runtimes"


@dataclass(frozen=True)
class Implementation:
    """``build``, where there is one, runs in a process that ends; ``open`` gives the call that is timed.

    Both are ``module:function`` and take (subject, folder, **options). ``packages`` are (module, extra) pairs.
    """

    name: str
    open: str
    build: str | None = None
    device: str = "cpu"
    build_options: Mapping[str, Any] = field(default_factory=dict)
    open_options: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[tuple[str, str], ...] = ()
    compiles: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is what the others are a baseline for."""
        return "hasten" in self.name.split("-")


def _eager(name: str, device: str = "cpu", **options: Any) -> Implementation:
    return Implementation(name, f"{_TORCH}:eager", device=device, open_options=options)


def _compiled(name: str, device: str = "cpu", **options: Any) -> Implementation:
    return Implementation(name, f"{_TORCH}:compiled", device=device, open_options=options, compiles=True)


def _runtime(name: str, runtime: str, device: str = "cpu", **more: Any) -> Implementation:
    build = "build_openvino" if runtime == "openvino" else "build_onnx"
    return Implementation(name, f"{_RUNTIMES}:{runtime}", f"{_RUNTIMES}:{build}", device, **more)


def _engine(name: str, target: str, *, compiles: bool = False) -> Implementation:
    options = {"target": target}
    build = f"{_RUNTIMES}:build_engine"
    return Implementation(name, f"{_RUNTIMES}:engine", build, build_options=options, compiles=compiles)


IMPLEMENTATIONS: dict[str, Implementation] = {
    made.name: made
    for made in (
        _eager("eager"),
        _eager("eager-channels-last", channels_last=True),
        _compiled("inductor"),
        _compiled("inductor-max-autotune", mode="max-autotune"),
        _compiled("inductor-freezing", freezing=True),
        _compiled("inductor-freezing-channels-last", freezing=True, channels_last=True),
        _runtime("onnxruntime", "onnxruntime"),
        _runtime("openvino", "openvino", packages=(("openvino", "openvino"),)),
        _compiled("hasten-inductor", backend="hasten"),
        _compiled("hasten-inductor-freezing", backend="hasten", freezing=True),
        _compiled("hasten-inductor-freezing-channels-last", backend="hasten", freezing=True, channels_last=True),
        _engine("hasten-aoti", "aoti:cpu", compiles=True),
        _engine("hasten-onnxruntime", "onnxruntime:cpu"),
        _eager("cuda-eager", "cuda"),
        _compiled("cuda-inductor-max-autotune", "cuda", mode="max-autotune"),
        _runtime("cuda-onnxruntime", "onnxruntime", "cuda"),
        _compiled("cuda-hasten", "cuda", backend="hasten", mode="max-autotune"),
    )
}
REFERENCES = {"cpu": "eager", "cuda": "cuda-eager"}
"""Whose outputs are right, by device."""


def parse_names(text: str) -> tuple[str, ...]:
    """``eager,inductor`` -> names; `UsageError` for one that is unknown or named twice."""
    names = tuple(text.split(","))
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise UsageError(
                f"there is no implementation {name!r}; implementations: {', '.join(IMPLEMENTATIONS)}."
                f"{nearest(name, IMPLEMENTATIONS)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"implementation {name!r} is named twice")
    return names


def chosen(names: Iterable[str] | None) -> tuple[list[Implementation], dict[str, str]]:
    """Those that were asked for, or else all that can run on this CPU; and why the others of those are left out.

    Raises what is missing where an implementation was asked for by name.
    """
    if names is not None:
        asked = [IMPLEMENTATIONS[name] for name in names]
        for implementation in asked:
            require(implementation)
        return asked, {}
    found, left_out = [], {}
    for implementation in IMPLEMENTATIONS.values():
        if implementation.device != "cpu":
            continue
        try:
            require(implementation)
        except MissingPackageError as missing:
            left_out[implementation.name] = str(missing)
        else:
            found.append(implementation)
    return found, left_out


def check_baseline(name: str | None, implementations: Iterable[Implementation]) -> None:
    """`UsageError` for a baseline that is not timed."""
    listed = [made.name for made in implementations]
    if name is not None and name not in listed:
        raise UsageError(f"--baseline {name!r} is none of {', '.join(listed)}.{nearest(name, listed)}")


def require(implementation: Implementation) -> None:
    """Raise `MissingPackageError` or `HastenError` with what this machine lacks for it."""
    for module, extra in implementation.packages:
        if find_spec(module) is None:
            need(module, extra=extra)
    if implementation.compiles and implementation.device == "cpu" and not _have_compiler():
        raise MissingPackageError(
            f"{implementation.name} compiles C++, and there is no compiler here: apt install g++, or set CXX"
        )
    if implementation.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise HastenError(f"{implementation.name} needs an NVIDIA GPU, and torch finds none here")
        if implementation.name == "cuda-onnxruntime":
            from hasten.backends.onnxruntime import require_provider

            require_provider("cuda")


def _have_compiler() -> bool:
    """Cheap where the usual compiler is there; torch, which knows all the ways to name another, is asked otherwise."""
    if shutil.which("g++"):
        return True
    from hasten.backends.inductor import have_cxx_compiler

    return have_cxx_compiler()
