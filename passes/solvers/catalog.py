"""Every solver by name, and the text that asks for one: ``name:key=value,key=value``, lists with ``/`` between items.

>>> canonical("ddim:eta=0.5")
'ddim:eta=0.5,keep_eps=false,spacing=leading,end=zero,offset=0,compat=diffusers'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

from hasten.errors import UsageError, nearest
from hasten.passes.solvers.hooks import Clip, Threshold, asked
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.table import SolverTable
from hasten.passes.steps import options
from hasten.passes.steps.options import Option, read_all

_SOLVERS: Mapping[str, str] = {
    "ddim": "builders:DDIM",
    "plms": "builders:PLMS",  # one more evaluation than steps
    "pndm": "builders:PNDM",  # PLMS after three steps of Runge-Kutta
    "ipndm": "builders:IPNDM",  # on a schedule of its own
    "dpm-solver": "builders:DPM_SOLVER",
    "dpm-singlestep": "builders:DPM_SINGLESTEP",
    "unipc": "builders:UNIPC",
    "deis": "builders:DEIS",
    "lms": "builders:LMS",
    "euler": "builders:EULER",
    "euler-ancestral": "builders:ANCESTRAL",
    "heun": "builders:HEUN",  # two evaluations a step
    "flow-euler": "builders:FLOW_EULER",
    "ltsp": "builders:LTSP",  # two networks: the denoiser and a guide
    "stsp": "builders:STSP",
    "guided": "builders:GUIDED",  # a solver of one network, and a guide beside it
    "caf": "builders:CAF",  # two networks: velocity and acceleration
}

PRESETS: Mapping[str, str] = {
    "dpm++2m": "dpm-solver:order=2,form=data",
    "dpm++3m": "dpm-solver:order=3,form=data",
    "dpm++2m-karras": "dpm-solver:order=2,form=data,levels=karras",
    "dpm++2m-sde": "dpm-solver:order=2,form=sde-data",
    "dpm-2m": "dpm-solver:order=2,form=noise,end=sigma_min",
    "dpm-3m": "dpm-solver:order=3,form=noise,end=sigma_min",
    "dpm++2s": "dpm-singlestep:order=2,form=data",
    "dpm++3s": "dpm-singlestep:order=3,form=data",
    "flow-heun": "heun",
    "ltsp4": "ltsp:order=4",
    "stsp4": "stsp:order=4",
}
"""Names in common use, and what they stand for; further options go after them as usual."""

X0: Mapping[str, Option] = {
    "clip": Option("number", "the largest x0, below as above; inf: none (diffusers: clip_sample_range)", low=0),
    "threshold": Option(
        "number", "the quantile that x0 is kept in (diffusers: dynamic_thresholding_ratio)", low=0, high=1
    ),
    "largest": Option("number", "the most that the threshold lets through (diffusers: sample_max_value)", low=1),
}
"""Options of every solver of one network: what happens to the predicted x0."""


@dataclass(frozen=True)
class Entry:
    """One solver: a line about it, its options, and ``build(process, steps, **options)``.

    ``starts_late``: ``build`` takes ``first``, the row to start at.
    """

    summary: str
    options: Mapping[str, Option]
    build: Callable[..., SolverTable]
    starts_late: bool = False


class Request(options.Request):
    """A solver's name with every option's value; its text reads back to the same request."""

    def with_options(self, **given: Any) -> Request:
        """The same solver with other values of some options; `UsageError` where it has no such option."""
        declared = entry(self.name).options
        read = read_all(self.name, declared, given)
        return Request(self.name, {**self.options, **{key: read[key] for key in given}})

    @property
    def hook(self) -> Clip | Threshold | None:
        """What the options ask for x0; `UsageError` where they ask for two things at once."""
        return asked(*(self.options.get(key) for key in X0))

    def build(self, process: Process, steps: int, *, first: int = 0) -> SolverTable:
        """Build the table of ``steps`` steps on ``process``, or what is left of it from row ``first`` on.

        The sample at ``first`` is then a picture with the noise of that row's level, and a method that remembers
        earlier values starts anew; `UsageError` for solvers that cannot start late (`Entry.starts_late`).
        """
        made = entry(self.name)
        given = {key: value for key, value in self.options.items() if key not in X0}
        if not first:
            return replace(made.build(process, steps, **given), hook=self.hook)
        if not made.starts_late:
            late = ", ".join(name for name in _SOLVERS if entry(name).starts_late)
            raise UsageError(f"{self.name} cannot start at step {first}: its start is fixed; those that can: {late}")
        if not 0 < first < (rows := len(made.build(process, steps, **given))):
            raise UsageError(f"{self.name}: step {first} is no step to start at; they go from 0 to {rows - 1}")
        return replace(made.build(process, steps, first=first, **given), hook=self.hook)


def names() -> tuple[str, ...]:
    """The solvers that can be asked for, and the names in common use."""
    return (*_SOLVERS, *PRESETS)


def entry(name: str) -> Entry:
    """Look a solver up; `UsageError` with the nearest name where there is none."""
    if name not in _SOLVERS:
        raise UsageError(f"no solver named {name!r}; solvers: {', '.join(names())}.{nearest(name, names())}")
    module, _, attribute = _SOLVERS[name].partition(":")
    return cast(Entry, getattr(import_module(f"hasten.passes.solvers.{module}"), attribute))


def build(text: str, process: Process | Mapping[str, Any], steps: int) -> SolverTable:
    """Build the table that ``text`` asks for: ``steps`` steps on a `Process`, or on what `Process.of` reads.

    >>> len(build("dpm++2m-karras", Process.diffusion(), 20))
    20
    """
    return parse(text).build(process if isinstance(process, Process) else Process.of(process), steps)


def canonical(text: str) -> str:
    """The same request with every option written out, so that it means the same elsewhere."""
    return str(parse(text))


def default(process: Process) -> str:
    """The plain first-order solver of a process: DDIM, or Euler's method for a flow."""
    return "flow-euler" if process.is_flow else "ddim:spacing=trailing,compat=none"


def parse(text: str) -> Request:
    """Read and check a request; `UsageError` for anything unknown, of the wrong type or out of range."""
    name, _, rest = text.strip().partition(":")
    preset, _, given = PRESETS.get(name, name).partition(":")
    options = {**_pairs(preset, given), **_pairs(preset, rest)}
    request = Request(preset, read_all(preset, entry(preset).options, options))
    _ = request.hook  # refuses what is two hooks at once
    return request


def _pairs(name: str, text: str) -> dict[str, str]:
    entry(name)
    given: dict[str, str] = {}
    for item in text.split(",") if text else ():
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{name}: option {item!r} is not written key=value")
        if key in given:
            raise UsageError(f"{name}: option {key!r} is given twice")
        given[key] = value
    return given
