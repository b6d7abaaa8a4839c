"""``hasten doctor``: what is installed, what can be built and run here, and how to get the rest."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hasten.errors import HastenError
from hasten.tools.console import Console, table

SUMMARY = (
    "Show what is installed, which targets can be built and run on this machine, and the command for what is missing."
)
EXAMPLES = ("hasten doctor", "hasten doctor --json")

PACKAGES = {
    "torch": "",
    "numpy": "",
    "onnx": "",
    "onnx-graphsurgeon": "",
    "onnxruntime": "",
    "safetensors": "",
    "diffusers": "hasten[diffusers]",
    "tensorrt-rtx-cu13": "hasten[tensorrt-rtx]",
    "tensorrt": "hasten[tensorrt]",
    "torch-tensorrt": "hasten[torch-tensorrt]",
    "openvino": "hasten[openvino]",
}
"""Distributions, and the extra that installs one; the core's own come with hasten."""
_OTHER_NAMES = {"onnxruntime": ("onnxruntime-gpu",), "tensorrt": ("tensorrt-cu13", "tensorrt-cu12")}


@dataclass(frozen=True)
class Ability:
    """What can be done with a target here; None is yes, text is why not and what to do."""

    target: str
    build: str | None
    run: str | None


def configure(parser: argparse.ArgumentParser) -> None:
    """It takes no options of its own."""


def run(args: argparse.Namespace, console: Console) -> int:
    """Look, and tell."""
    import torch

    import hasten
    from hasten.backends.inductor import have_cxx_compiler

    found = {name: _version(name) for name in PACKAGES}
    compiler = os.environ.get("CXX", "g++") if have_cxx_compiler() else None
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    abilities = targets()
    system: dict[str, Any] = {
        "hasten": hasten.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "c++ compiler": compiler,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "tuning": _tuning(),
    }
    _show(console, system, found, abilities)
    console.document(
        {
            "system": system,
            "packages": {
                name: {"version": found[name], "install": None if found[name] else _install(name)} for name in PACKAGES
            },
            "targets": [{"target": a.target, "build": a.build, "run": a.run} for a in abilities],
        }
    )
    return 0


def _show(console: Console, system: dict[str, Any], found: dict[str, str | None], abilities: list[Ability]) -> None:
    about = table("system", "")
    for name, value in system.items():
        text = ", ".join(value) if isinstance(value, list) else value
        about.add_row(name, text or ("none: apt install g++, or set CXX" if name == "c++ compiler" else "none"))
    packages = table("package", "version", "install")
    for name, number in found.items():
        packages.add_row(name, number or "not installed", "" if number else _install(name))
    can = table("target", "build here", "run here", "why not")
    for ability in abilities:
        reasons = dict.fromkeys(r for r in (ability.build, ability.run) if r)
        can.add_row(ability.target, *("no" if r else "yes" for r in (ability.build, ability.run)), "; ".join(reasons))
    console.show(about, "", packages, "", can)


def targets() -> list[Ability]:
    """Find out about every backend; one architecture stands for all of a backend's."""
    import torch

    from hasten.backends import inductor, onnxruntime, tensorrt, torch_tensorrt
    from hasten.backends.target import parse_target
    from hasten.errors import need

    gpu = None if torch.cuda.is_available() else "runs on an NVIDIA GPU, and torch finds none here"
    here = _architecture()
    abilities = []
    for device, missing in (("cpu", None), ("cuda", gpu)):
        for backend in ("inductor", "aoti"):
            build = _reason(inductor.require, parse_target(f"{backend}:{device}"))
            # torch.compile builds where it runs; a package needs no compiler any more
            abilities.append(Ability(f"{backend}:{device}", build, build if backend == "inductor" else missing))
    for device, missing in (("cpu", None), ("cuda", gpu)):
        provider = _reason(onnxruntime.require_provider, device)
        abilities.append(Ability(f"onnxruntime:{device}", provider, provider or missing))
    for backend, module, any_gpu in (("tensorrt", "tensorrt", False), ("tensorrt-rtx", "tensorrt_rtx", True)):
        build = _reason(tensorrt.require, parse_target(f"{backend}:{here if here and not any_gpu else 'sm89'}"))
        shown = f"{backend}:{'smXX' if any_gpu or here is None else here}"
        abilities.append(Ability(shown, build, _reason(lambda m=module, b=backend: need(m, extra=b)) or gpu))
    build = _reason(torch_tensorrt.require)
    abilities.append(Ability("torch-tensorrt", build, build))
    return abilities


def _tuning() -> str:
    from hasten.backends.tuning_machine import native_kernels
    from hasten.backends.tuning_store import Store
    from hasten.tools.tune import summary

    return summary(Store(native=native_kernels(load=False)))


def _reason(check: Callable[..., object], *args: object) -> str | None:
    try:
        check(*args)
    except HastenError as error:
        return str(error)
    except Exception as error:  # a library that is installed and does not load is what a user comes here for
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _architecture() -> str | None:
    import torch

    from hasten.backends.target import ARCHITECTURES

    if not torch.cuda.is_available():
        return None
    name = "sm" + "".join(map(str, torch.cuda.get_device_capability()))
    return name if name in ARCHITECTURES["tensorrt"] else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return next(filter(None, map(_version, _OTHER_NAMES.get(name, ()))), None)


def _install(name: str) -> str:
    return f"pip install '{PACKAGES[name]}'" if PACKAGES[name] else f"pip install {name}"
