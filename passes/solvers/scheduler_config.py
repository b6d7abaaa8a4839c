"""What a scheduler is made from: a configuration of diffusers, which it reads, keeps, writes and lets others read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from hasten.errors import UsageError, need
from hasten.passes.solvers.catalog import Request
from hasten.passes.solvers.config_keys import check_overrides
from hasten.passes.solvers.configuration import SOLVER
from hasten.passes.solvers.from_config import read_config
from hasten.passes.solvers.hooks import Hook
from hasten.passes.solvers.process import Process

FILE = "scheduler_config.json"
DOWNLOAD = ("cache_dir", "force_download", "local_dir", "local_files_only", "proxies", "revision", "token")
"""Options of `Configured.from_pretrained` that diffusers takes to find a file."""

Self = TypeVar("Self", bound="Configured")


class Config(dict[str, Any]):
    """A diffusers configuration: a mapping whose keys can be read as attributes, and which stays as it is."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the configuration has no {name!r}")
        return self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            "a scheduler's configuration cannot be changed; make another scheduler with "
            "Scheduler.from_config(scheduler.config, KEY=VALUE)"
        )

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = _refuse
    clear = pop = popitem = setdefault = update = __ior__ = _refuse


class Configured:
    """A solver, a process and the configuration that they were read from."""

    order: int

    def __init__(self, config: Mapping[str, Any], solver: str | None = None) -> None:
        self.solver = solver
        self._read(config)

    def _read(self, config: Mapping[str, Any]) -> None:
        read = read_config(config, self.solver)
        self._config = Config(config)
        self.request: Request = read.request
        self.process: Process = read.process
        self.order = 2 if self.request.name == "heun" else 1

    @property
    def config(self) -> Config:
        """The configuration, frozen."""
        return self._config

    @property
    def _internal_dict(self) -> Config:
        """Where pipelines of diffusers put a configuration that they correct (``steps_offset`` of old ones)."""
        return self._config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        self._read(config)

    def register_to_config(self, **options: Any) -> None:
        """Change options of the configuration, as some pipelines do; the next `set_timesteps` goes by them."""
        check_overrides(options)
        self._read(_overridden(self._config, options))

    @property
    def hook(self) -> Hook | None:
        """What happens to the predicted x0."""
        return self.request.hook

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """The squared signal level at the training times, (T,) float32; a flow has none (`AttributeError`)."""
        if self.process.bars is None:
            raise AttributeError("alphas_cumprod: the model is a flow, whose signal level at time t is 1 - t / T")
        return torch.tensor(self.process.bars, dtype=torch.float32)

    @property
    def compatibles(self) -> list[type]:
        """The classes of diffusers that take this configuration; none for one of no class of theirs."""
        kind = getattr(need("diffusers", extra="diffusers"), str(self._config.get("_class_name")), None)
        return [] if kind is None else list(kind.from_config(dict(self._config)).compatibles)

    @classmethod
    def from_config(cls: type[Self], config: Any, solver: str | None = None, **overrides: Any) -> Self:
        """Make one from a diffusers scheduler or its configuration, some options of which may be overridden.

        ``solver`` is a request for the catalog, as ``unipc:order=3``; the scheduler's own unless given. A configuration
        that clips or thresholds the predicted x0 goes on doing so. Keys of a configuration that mean nothing here are
        kept; `UsageError` for an override that is no option of any scheduler.
        """
        check_overrides(overrides)
        kind = type(config).__name__ if hasattr(config, "config") else None
        if isinstance(config, Configured):
            kind, solver = None, solver or config.solver
        stored = getattr(config, "config", config)
        if not isinstance(stored, Mapping):
            raise UsageError(
                f"from_config takes a scheduler or its configuration, not {config!r}; from_pretrained reads a folder"
            )
        given = _overridden(stored, overrides)
        if kind is not None:
            given.setdefault("_class_name", kind)
        return cls(given, solver)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        folder: str | os.PathLike[str],
        subfolder: str | None = None,
        solver: str | None = None,
        **options: Any,
    ) -> Self:
        """Make one from the ``scheduler_config.json`` in a folder, or from that of a model on the Hub by its name.

        ``options`` are overrides as for `from_config`, and what diffusers takes to download (``revision``, ``token``,
        …), which is its work. `UsageError` where there is no such file.
        """
        download = {key: options.pop(key) for key in DOWNLOAD if key in options}
        stored = _stored(Path(folder), subfolder, download)
        return cls.from_config(stored, solver or stored.pop(SOLVER, None), **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``scheduler_config.json``, which `from_pretrained` reads, and diffusers as that of its own scheduler.

        A pipeline with this scheduler is saved as one that needs it: ``from hasten import Scheduler`` before the
        pipeline's ``from_pretrained``, for diffusers imports no other package by itself.
        """
        plain = {key: value for key, value in self._config.items() if key not in ("_use_default_values", SOLVER)}
        if self.solver is not None:
            plain[SOLVER] = self.solver
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{FILE}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(plain, indent=2, default=_listed) + "\n", encoding="utf-8")
        unfinished.replace(path)


def _overridden(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``options``, which are then no defaults that diffusers may replace."""
    given = {**config, **options}
    if "_use_default_values" in given:
        given["_use_default_values"] = [key for key in given["_use_default_values"] if key not in options]
    return given


def _stored(folder: Path, subfolder: str | None, download: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a folder or a file, or on the Hub."""
    if not folder.exists():
        scheduler = need("diffusers", extra="diffusers").DDIMScheduler
        try:
            return dict(scheduler.load_config(str(folder), subfolder=subfolder, **download))
        except OSError as error:
            raise UsageError(f"{folder} is no folder here, and diffusers found no scheduler there: {error}") from error
    places = [folder / (subfolder or "") / FILE, folder / FILE] if folder.is_dir() else [folder]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        hint = "; give subfolder='scheduler'" if (folder / "scheduler" / FILE).is_file() else ""
        raise UsageError(f"there is no {FILE} in {places[0].parent}, which save_pretrained writes{hint}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise UsageError(f"{path} holds no configuration but {read!r}; save_pretrained of a scheduler writes one")
    return read


def _listed(value: Any) -> Any:
    """What JSON has no form of its own for: arrays and tensors, as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise UsageError(f"the configuration cannot be written: {value!r} has no form in JSON")
