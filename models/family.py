"""`Family`: how one diffusers class becomes an `Adapter`, whatever its configuration; `Architecture`: a named one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.errors import UsageError, nearest, need
from hasten.models.adapter import Adapter
from hasten.models.census import census
from hasten.models.diffusers_weights import load_directory, read_config
from hasten.models.inputs import Input
from hasten.models.random_weights import filled

Config = Mapping[str, Any]
Sizes = Mapping[str, int]
PROCESSORS = ("sdpa", "classic")


def no_multiples(config: Config) -> Sizes:
    """Say that no size must be a multiple of anything."""
    return {}


@dataclass(frozen=True)
class Family:
    """One diffusers class.

    ``inputs(config, sizes)`` lists the forward's inputs, ``wrap(model, config, sizes)`` returns the module with that
    forward; ``sizes`` are what a configuration does not say (tokens of a prompt, ...). ``multiples(config)`` gives
    what a dynamic size must be a multiple of. ``processors`` is whether the attention can be spelled in both of
    diffusers' ways. ``time_scale`` is what its pipelines multiply a scheduler's times by for the network.
    """

    name: str
    class_name: str
    inputs: Callable[[Config, Sizes], tuple[Input, ...]]
    wrap: Callable[[nn.Module, Config, Sizes], nn.Module]
    sizes: Sizes
    output_names: tuple[str, ...] = ("sample",)
    multiples: Callable[[Config], Sizes] = no_multiples
    processors: bool = True
    batch: int = 2
    time_scale: float = 1.0

    def model_class(self) -> Any:
        """Return the diffusers class."""
        return getattr(need("diffusers", extra="diffusers"), self.class_name)

    def complete(self, config: Config) -> dict[str, Any]:
        """Add the class's defaults to a configuration that a file leaves incomplete."""
        parameters = inspect.signature(self.model_class().__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**defaults, **{k: v for k, v in config.items() if not k.startswith("_")}}

    def from_directory(
        self, directory: Path, *, name: str, processor: str = "sdpa", variant: str | None = None
    ) -> Adapter:
        """Describe the model in a diffusers model directory; the weights are read when the module is built.

        Raises `UsageError` where the directory holds another class, no safetensors, or an unsupported option.
        """
        config = read_config(directory)
        if config["_class_name"] != self.class_name:
            raise UsageError(
                f"{directory} holds a {config['_class_name']}, but {name} is a {self.class_name}; "
                f"name a directory with a {self.class_name}"
            )
        config = self.complete(config)
        return self.describe(
            name=name,
            description=f"{self.class_name} from {directory}",
            config=config,
            sizes=self.sizes,
            expected=None,
            trained=True,
            processor=processor,
            make=lambda _: load_directory(self.model_class(), directory, variant),
        )

    def from_architecture(self, architecture: Architecture, *, reduced: bool, processor: str = "sdpa") -> Adapter:
        """Describe a registered architecture with random weights."""
        if reduced and not architecture.reduced:
            raise UsageError(f"{architecture.name} is small already; there is no reduced form of it")
        config = {**architecture.config, **(architecture.reduced if reduced else {})}
        sizes = {**self.sizes, **architecture.sizes, **(architecture.reduced_sizes if reduced else {})}
        return self.describe(
            name=architecture.name + ("-reduced" if reduced else ""),
            description=architecture.description + (", reduced: same blocks, narrow and small" if reduced else ""),
            config=config,
            sizes=sizes,
            expected=architecture.expected,
            trained=False,
            processor=processor,
            make=lambda dtype: filled(lambda: self.model_class()(**config), dtype=dtype),
        )

    def describe(
        self,
        *,
        name: str,
        description: str,
        config: Config,
        sizes: Sizes,
        expected: Mapping[str, int] | None,
        trained: bool,
        processor: str,
        make: Callable[[torch.dtype], nn.Module],
    ) -> Adapter:
        """Put an adapter together; ``expected`` is counted where it is None.

        ``make`` builds the diffusers model; it is told which type its weights will be used in.
        """
        check_processor(name, processor, allowed=self.processors)

        def finish(model: nn.Module) -> nn.Module:
            if self.processors:
                set_processor(model, processor)
            return self.wrap(model, config, sizes)

        def skeleton() -> nn.Module:
            made = self.model_class()  # outside: modules imported inside would keep their own tensors on meta
            with torch.device("meta"):
                return finish(made(**config)).to("meta").eval()

        inputs = self.inputs(config, sizes)
        return Adapter(
            name=name,
            family=self.name,
            description=description,
            trained=trained,
            inputs=inputs,
            output_names=self.output_names,
            expected=census(skeleton(), inputs) if expected is None else expected,
            build=lambda dtype: finish(make(dtype)),
            skeleton=skeleton,
            batch=self.batch,
            multiples=self.multiples(config),
        )


@dataclass(frozen=True)
class Architecture:
    """A named configuration: ``config`` as diffusers spells it, ``reduced`` what the small form changes.

    The reduced form has the same blocks, levels and layers, hence the same ``expected`` counts.
    """

    name: str
    family: Family
    description: str
    config: Config
    expected: Mapping[str, int]
    reduced: Config = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)
    reduced_sizes: Sizes = field(default_factory=dict)


def check_processor(name: str, processor: str, *, allowed: bool) -> None:
    """Refuse a spelling of attention that does not exist, or that this model does not have."""
    if processor not in PROCESSORS:
        raise UsageError(
            f"unknown attention processor {processor!r}; there are {', '.join(PROCESSORS)}."
            f"{nearest(processor, PROCESSORS)}"
        )
    if processor == "classic" and not allowed:
        raise UsageError(f"{name} has an attention processor of its own; processor='classic' does not apply to it")


def set_processor(model: nn.Module, processor: str) -> None:
    """Spell every attention as one call (``sdpa``) or as baddbmm, softmax and bmm (``classic``)."""
    attention = need("diffusers.models.attention_processor", extra="diffusers")
    chosen = attention.AttnProcessor2_0 if processor == "sdpa" else attention.AttnProcessor
    for module in model.modules():
        if isinstance(module, attention.Attention):
            module.set_processor(chosen())
