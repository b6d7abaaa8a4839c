"""Build and load the C++ kernels.

One shared library, compiled for the processor at hand by the compiler that Inductor would call (``$CXX``, else g++),
in half a minute, once: its file name is a hash of the sources, the compiler, its flags and torch's version. Where
there is no compiler the operators keep their form in torch operators. ``HASTEN_NATIVE=0`` turns the kernels off.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from hasten.errors import HastenError
from hasten.passes.ops.native.schemas import SCHEMAS

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = ("attention.cpp", "binding.cpp", "group_norm.cpp", "pool.cpp", "winograd.cpp")
HEADERS = ("attention.h", "group_norm.h", "pool.h", "scratch.h", "transpose.h", "vector.h", "winograd.h")
LIBRARY = "hasten_native.so"
SECONDS = 600
"""What one compilation may take on a slow machine."""


def cache_folder() -> Path:
    """The folder of everything that is kept between runs: ``$HASTEN_CACHE_DIR``, else the user's cache directory."""
    named = os.environ.get("HASTEN_CACHE_DIR")
    return Path(named) if named else user_cache_path("hasten")


_loaded: list[Path] = []
"""The library of this process, once there is one: operators can be implemented once only."""


@cache
def load() -> str | None:
    """Load the library, building it first where it is not there; None, or why the kernels are not to be had."""
    if _loaded:
        return None
    if (why := _refused()) is not None:
        return why
    try:
        path = built()
        torch.ops.load_library(str(path))
    except (HastenError, OSError) as error:
        logger.warning("the C++ kernels are not used: %s", error)
        return str(error)
    _loaded.append(path)
    return None


def adopt(path: Path) -> None:
    """Load the library that came with an engine, unless one is loaded already; raises `HastenError` where it cannot."""
    if _loaded:
        return
    if (why := _refused()) is not None:
        raise HastenError(f"the engine '{path.parent}' calls hasten's C++ kernels, and {why}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise HastenError(f"the C++ kernels of the engine '{path.parent}' cannot be loaded: {error}") from error
    _loaded.append(path)
    load.cache_clear()


def loaded() -> Path:
    """The library that this process uses; only after `load` or `adopt` succeeded."""
    return _loaded[0]


def _refused() -> str | None:
    if os.environ.get("HASTEN_NATIVE") == "0":
        return "HASTEN_NATIVE=0 turns the C++ kernels off"
    if platform.system() != "Linux":
        return f"the C++ kernels are built on Linux only, and this is {platform.system()}"
    return None


def available() -> bool:
    """Whether the kernels are loaded; builds and loads them on the first call."""
    return load() is None


@cache
def built() -> Path:
    """Where the library for this machine lies, built if need be.

    Raises `HastenError` where there is no compiler or it fails.
    """
    compiler = _compiler()
    folder = cache_folder() / "native" / fingerprint()
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HastenError(
            f"cannot keep the C++ kernels in {folder}: {error}; set HASTEN_CACHE_DIR to a folder"
        ) from error
    with FileLock(folder / "lock"):
        if not (folder / LIBRARY).is_file():
            logger.info("compiling the C++ kernels for this processor, once")
            _compile(compiler, folder)
    return folder / LIBRARY


@cache
def fingerprint() -> str:
    """Tells one build from another: sources, compiler, flags, processor, torch."""
    from hasten.passes.ops.winograd_conv2d import codegen  # whose package asks this module for the kernels

    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((HERE / name).read_bytes())
    compiler = _compiler()
    flags = (*_flags(compiler), *_link_flags())
    for text in (codegen.header(), _schemas(), torch.__version__, compiler, *flags, _target(compiler)):
        digest.update(text.encode())
    return digest.hexdigest()[:24]


@cache
def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, RuntimeError) as error:
        asked = os.environ.get("CXX", "g++")
        raise HastenError(f"no C++ compiler ({asked!r} was not found); apt install g++, or set CXX") from error


def _flags(compiler: str) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [
        *("-std=c++20", "-O3", native, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
        *("-fPIC", "-shared", "-fvisibility=hidden", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-Wno-psabi"),
        *(f"-I{path}" for path in include_paths()),
    ]


def _link_flags() -> list[str]:
    libraries = Path(torch.__file__).parent / "lib"
    return [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]


@cache
def _target(compiler: str) -> str:
    """The compiler's version and the instructions that it takes this processor to have."""
    flags = [f for f in _flags(compiler) if f.startswith(("-march", "-mcpu"))]
    command = [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    return "\n".join(sorted(line for line in made.stdout.splitlines() if "__DATE__" not in line))


def _schemas() -> str:
    return "#pragma once\n" + "".join(f'#define {name} R"({text})"\n' for name, text in SCHEMAS.items())


def _compile(compiler: str, folder: Path) -> None:
    from hasten.passes.ops.winograd_conv2d import codegen

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        generated = Path(scratch)
        (generated / "transforms.h").write_text(codegen.header())
        (generated / "schemas.h").write_text(_schemas())
        command = [
            *(compiler, *_flags(compiler), f"-I{generated}", f"-I{HERE}"),
            *(str(HERE / name) for name in SOURCES),
            *("-o", str(generated / LIBRARY), *_link_flags()),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HastenError(f"{compiler} could not compile the C++ kernels: {error}") from error
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise HastenError(f"{compiler} could not compile the C++ kernels: {lines[0].strip()}")
        os.replace(generated / LIBRARY, folder / LIBRARY)
