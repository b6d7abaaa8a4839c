"""hasten: a compiler that makes diffusion models faster by rewriting their graphs.

Public names are resolved on first use: ``import hasten`` imports neither torch nor onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.backends.build import build as build
    from hasten.backends.cached_callable import reset as reset
    from hasten.backends.cached_callable import step_cache as step_cache
    from hasten.backends.cached_run import CachedRun as CachedRun
    from hasten.backends.engine import Engine as Engine
    from hasten.backends.engine import load as load
    from hasten.backends.optimize import optimize as optimize
    from hasten.backends.optimize import optimize_onnx as optimize_onnx
    from hasten.backends.sampler import Sampler as Sampler
    from hasten.backends.sampler import sampler as sampler
    from hasten.backends.sampling import Sampling as Sampling
    from hasten.backends.target import Target as Target
    from hasten.errors import HastenError as HastenError
    from hasten.passes.rule import Report as Report
    from hasten.passes.rule import Rule as Rule
    from hasten.passes.solvers.scheduler import Scheduler as Scheduler

__version__ = "0.1.0"

_HOMES = {
    "CachedRun": "hasten.backends.cached_run",
    "Engine": "hasten.backends.engine",
    "HastenError": "hasten.errors",
    "Report": "hasten.passes.rule",
    "Rule": "hasten.passes.rule",
    "Scheduler": "hasten.passes.solvers.scheduler",
    "Sampler": "hasten.backends.sampler",
    "Sampling": "hasten.backends.sampling",
    "Target": "hasten.backends.target",
    "build": "hasten.backends.build",
    "load": "hasten.backends.engine",
    "optimize": "hasten.backends.optimize",
    "optimize_onnx": "hasten.backends.optimize",
    "reset": "hasten.backends.cached_callable",
    "sampler": "hasten.backends.sampler",
    "step_cache": "hasten.backends.cached_callable",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
