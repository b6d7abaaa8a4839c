"""The options that diffusers' schedulers have, so that a misspelt one is told from one of another class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.passes.solvers.configuration import PROCESS, SAMPLER, X0

OPTIONS = (*PROCESS, *X0, *SAMPLER, "solver_p")
"""Of all classes that are read; the last is a scheduler of diffusers to take instead of the predictor, and not read."""


def check_overrides(options: Mapping[str, Any]) -> None:
    """Refuse an override that no scheduler has; a key that begins with ``_`` is not an option."""
    for name in options:
        if name not in OPTIONS and not name.startswith("_"):
            raise UsageError(f"no scheduler has an option {name!r}.{nearest(name, OPTIONS)}")


def choice(
    config: Mapping[str, Any], key: str, own: Collection[str], others: Collection[str], *, otherwise: str
) -> str:
    """The value of ``config[key]``, one of ``own``.

    ``otherwise`` where the key is missing, or its value is one of ``others``: what other classes say there, which
    diffusers lets stand for the class's default when a configuration changes hands. `UsageError` for anything else.
    """
    value = config.get(key)
    if value is None or value in others:
        return otherwise
    if value not in own:
        name = config.get("_class_name", "configuration")
        raise UsageError(f"{name}: {key} {value!r} is none of {', '.join(own)}.{nearest(str(value), own)}")
    return str(value)
