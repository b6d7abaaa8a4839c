"""Every step-cache policy by name, and the text that asks for one.

``name:key=value,key=value``, or a calibration file: a JSON object ``{"policy": name, "options": {…}}`` with anything
else beside them that tells where it came from. Lists have ``/`` between their items.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from hasten.errors import UsageError, nearest
from hasten.passes.steps.options import Option, Request, read_all
from hasten.passes.steps.policy import Policy

_POLICIES: Mapping[str, str] = {
    "teacache": "thresholds:TEACACHE",  # distances of a signal, summed: needs a polynomial
    "first-block": "thresholds:FIRST_BLOCK",  # distance of the first block's residual: needs no calibration
    "dbcache": "thresholds:DBCACHE",  # the same with a warm-up, limits and more blocks at either end
    "easycache": "thresholds:EASYCACHE",  # the model's input and output alone
    "adacache": "fitted:ADACACHE",  # how far away the next computed call is, from the last one's change
    "magcache": "fitted:MAGCACHE",  # a calibrated curve of magnitudes
    "smoothcache": "fitted:SMOOTHCACHE",  # masks from error curves, module by module
    "mask": "fixed:MASK",  # the caller's own
    "fora": "fixed:FORA",
    "deepcache": "fixed:DEEPCACHE",  # the inner levels of a UNet
    "taylorseer": "extrapolated:TAYLORSEER",  # every n-th call, extrapolated between
    "spectrum": "extrapolated:SPECTRUM",
    "meancache": "extrapolated:MEANCACHE",
}


@dataclass(frozen=True)
class Entry:
    """One policy. ``bare``: the option that may be written without its name, as in ``mask:1001``."""

    summary: str
    options: Mapping[str, Option]
    build: Callable[..., Policy]
    bare: str = ""


def names() -> tuple[str, ...]:
    """The policies that can be asked for."""
    return tuple(_POLICIES)


def entry(name: str) -> Entry:
    """Look a policy up; `UsageError` with the nearest name where there is none."""
    if name not in _POLICIES:
        raise UsageError(
            f"no step-cache policy named {name!r}; policies: {', '.join(_POLICIES)}.{nearest(name, _POLICIES)}"
        )
    module, _, attribute = _POLICIES[name].partition(":")
    return cast(Entry, getattr(import_module(f"hasten.passes.steps.builders.{module}"), attribute))


def parse(text: str) -> Policy:
    """Build the policy that ``text`` asks for.

    >>> parse("first-block:threshold=0.1").decision.threshold
    0.1
    """
    return build(read(text))


def build(request: Request) -> Policy:
    """Build what was read."""
    return entry(request.name).build(**request.options)


def canonical(text: str) -> str:
    """The same request with every option written out, so that it means the same elsewhere; a file is taken in.

    >>> canonical("fora")
    'fora:interval=2,last=1,payload=value'
    """
    return str(read(text))


def read(text: str) -> Request:
    """Read and check a request; `UsageError` for anything unknown, of the wrong type or out of range."""
    text = text.strip()
    if text.endswith(".json"):
        name, given = _from_file(Path(text))
    else:
        name, _, rest = text.partition(":")
        given = _from_text(name, rest)
    return Request(name, read_all(name, entry(name).options, given))


def _from_text(name: str, text: str) -> dict[str, Any]:
    bare, given = entry(name).bare, {}
    for position, item in enumerate(text.split(",") if text else ()):
        key, equals, value = item.partition("=")
        if not equals and position == 0 and bare:
            key, value = bare, item
        elif not equals or not key or not value:
            raise UsageError(f"{name}: option {item!r} is not written key=value")
        if key in given:
            raise UsageError(f"{name}: option {key!r} is given twice")
        given[key] = value
    return given


def _from_file(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"calibration file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"calibration file {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("policy"), str):
        raise UsageError(f'calibration file {path} has no "policy"; it needs {{"policy": name, "options": {{…}}}}')
    options = content.get("options", {})
    if not isinstance(options, dict):
        raise UsageError(f'calibration file {path}: "options" is {options!r}; it must be an object')
    return content["policy"], {key: value for key, value in options.items() if value is not None}
