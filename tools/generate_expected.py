"""What a step cache is expected to do, told before a run: the mask where it is known, the gain, the state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.backends.manifest import Manifest
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.fitting import speedup


def expected(asked: str, manifest: Manifest, calls: int) -> str:
    """One line about a run of ``calls`` calls with an engine that was built with ``--cache`` ``asked``.

    A schedule's mask is known; that of other policies where a calibration predicted it for as many calls.
    """
    cache = manifest.cache or (manifest.loop or {}).get("cache") or {}
    state = f"state {sum(s['bytes'] for s in manifest.state) / 1e6:.3g} MB"
    name = cache["policy"].partition(":")[0]
    mask = _mask(asked, cache["policy"], calls)
    if mask is None:
        return f"step cache {name}: the mask is not known before the run; {state}"
    gain = speedup([mask], cache["share"])
    return (
        f"step cache {name}: predicted mask {mask}, {mask.count('1')} of {calls} steps computed, {gain:.2f}x as fast "
        f"by the operations left out; {state}"
    )


def _mask(asked: str, built: str, calls: int) -> str | None:
    bits = parse(built).decision.mask(calls)
    if bits is not None:
        return "1" + "".join(str(int(bit)) for bit in bits[1:])
    if not asked.strip().endswith(".json"):
        return None
    content: Mapping[str, Any] = json.loads(Path(asked.strip()).read_text(encoding="utf-8"))
    told = (content.get("fit") or {}).get("predicted") or {}
    return str(told["mask"]) if content.get("steps") == calls and "mask" in told else None
