"""Calibration files: what was recorded, on what, and what was fitted to it; one JSON object, written as a whole.

``--cache file.json`` reads ``policy`` and ``options`` of it, which are there once something is fitted. Files with equal
settings and other seeds are shards of one recording: `merge` puts them together.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hasten.errors import HastenError, UsageError
from hasten.passes.steps.fitting import Sample

FORMAT = 1
_SETTINGS = ("model", "kind", "region", "steps", "shape", "dtype", "guidance", "distance", "weights")
"""What two recordings must have in common to be one."""
_ANY_STEPS = ("teacache", "first-block", "dbcache", "easycache", "magcache")
"""Policies that run at another number of steps; MagCache's ratios are interpolated."""


@dataclass(frozen=True)
class Calibration:
    """What a file holds. ``request`` is the policy as it was asked for, without what is to be found.

    ``shape`` is that of the model's first input in one run; ``share`` the part of the operations that a reused call
    leaves out; ``state_bytes`` what the cache carries from call to call. ``samples`` are recorded runs; ``tried`` masks
    that were tried on the runs of ``tried_on`` seeds, with the mean squared error of the result.
    """

    model: str
    request: str
    region: str
    steps: int
    shape: tuple[int, ...]
    dtype: str
    guidance: float | None
    distance: int
    weights: str
    how: str
    share: float
    state_bytes: int
    versions: Mapping[str, str]
    samples: tuple[Sample, ...] = ()
    tried: Mapping[str, float] = field(default_factory=dict)
    tried_on: tuple[int, ...] = ()
    policy: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The policy's name."""
        return self.request.partition(":")[0]

    def difference(self, other: Calibration) -> str | None:
        """The first setting in which two recordings differ, in words; None where they go together."""
        for name in _SETTINGS:
            if getattr(self, name) != getattr(other, name):
                return f"{name} {_shown(getattr(self, name))} and {_shown(getattr(other, name))}"
        return None

    def write(self, path: Path) -> None:
        """Write the file under a temporary name, and rename it."""
        content = {"format": FORMAT, **asdict(replace(self, samples=()))}
        if self.policy is None:  # not fitted yet: nothing that --cache could read
            del content["policy"], content["options"]
        content["tried"] = {mask: error if math.isfinite(error) else None for mask, error in self.tried.items()}
        content["samples"] = [sample.as_dict() for sample in self.samples]
        partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
        try:
            partial.write_text(json.dumps(content, indent=None, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise HastenError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)


def read(path: Path) -> Calibration:
    """Read a file that `Calibration.write` wrote; `UsageError` says what is wrong with any other."""
    content = _content(path)
    if content.get("format") != FORMAT or not isinstance(content.get("samples"), list):
        raise UsageError(
            f"calibration file {path} holds no recording that this version reads (format {content.get('format')!r}, "
            f"expected {FORMAT}); record again with `hasten calibrate`"
        )
    fields = {name: content[name] for name in Calibration.__dataclass_fields__ if name in content}
    try:
        made = Calibration(**{**fields, "samples": (), "shape": tuple(content["shape"])})
        samples = tuple(Sample.from_dict(s, made.steps) for s in content["samples"])
    except (TypeError, KeyError) as error:
        raise UsageError(f"calibration file {path} is incomplete: {error}; record again") from None
    except UsageError as error:
        raise UsageError(f"calibration file {path}: {error}; record again") from None
    tried = {mask: math.inf if error is None else float(error) for mask, error in made.tried.items()}
    return replace(made, samples=samples, tried=tried, tried_on=tuple(made.tried_on))


def merge(calibrations: Sequence[Calibration], names: Sequence[str]) -> Calibration:
    """One recording of all; a run that is in several counts once. `UsageError` where settings differ."""
    first, *others = calibrations
    for other, name in zip(others, names[1:], strict=True):
        if told := first.difference(other):
            raise UsageError(f"cannot merge {names[0]} and {name}: {told}; only recordings with equal settings are one")
    samples = {(s.seed, s.label): s for c in calibrations for s in c.samples}
    tried_on = {c.tried_on for c in calibrations if c.tried}
    comparable = len(tried_on) == 1 and len({c.request for c in calibrations}) == 1
    return replace(
        first,
        samples=tuple(samples[key] for key in sorted(samples)),
        tried={mask: error for c in calibrations for mask, error in c.tried.items()} if comparable else {},
        tried_on=tried_on.pop() if comparable else (),
        policy=None,
        options={},
        fit={},
    )


def check_fits(
    calibration: str | os.PathLike[str] | Mapping[str, Any],
    model: str | None = None,
    steps: int | None = None,
    shape: Sequence[int] | None = None,
) -> None:
    """Raise `UsageError` where a calibration is used on another model, number of steps or shape than it was made on.

    ``calibration`` is a file, or its content. ``model`` is a name or a directory, ``shape`` that of the model's first
    input; its first axis, the batch, may differ. What is None, or what a file written by hand does not say, is not
    compared. Policies whose decisions are made anew in each run go with any number of steps.
    """
    content = calibration if isinstance(calibration, Mapping) else _content(Path(calibration))
    what = "the calibration" if isinstance(calibration, Mapping) else f"calibration file {os.fspath(calibration)}"
    again = "calibrate this one: hasten calibrate"
    if model is not None and content.get("model") not in (None, model):
        raise UsageError(f"{what} is of the model {content['model']!r}, and this is {model!r}; {again}")
    options = content.get("options") or {}
    bound = content.get("policy") not in _ANY_STEPS and options.get("stretch") != "nearest"
    if bound and steps is not None and content.get("steps") not in (None, steps):
        raise UsageError(f"{what} is for {content['steps']} steps, and the run has {steps}; run as many, or {again}")
    made = content.get("shape")
    if shape is not None and made is not None and list(made[1:]) != list(shape[1:]):
        raise UsageError(
            f"{what} is for inputs of {_shown(tuple(made))}, and these are {_shown(tuple(shape))}; {again}"
        )


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"calibration file {path}: {error.strerror or error}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise UsageError(f"calibration file {path} is damaged or cut short, it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"calibration file {path} holds a {type(content).__name__}, not an object; record again")
    return content


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else repr(value)
