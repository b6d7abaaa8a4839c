"""What ``hasten bench`` times: a named model, or one layer, each written as a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.tools.source import MODEL, resolve

GRAMMARS = {
    "conv": "conv:320-320@64x64,batch=2",
    "upsample-conv": "upsample-conv:512-512@64x64",
    "group-norm-silu": "group-norm-silu:128@256x256,groups=32",
    "geglu": "geglu:320-1280@4096,batch=2",
}
"""The layers, each as an example: channels, outputs where they are given, the map's height and width or the tokens."""
_FORMS = {
    "conv": r"(?P<channels>\d+)-(?P<outputs>\d+)@(?P<height>\d+)x(?P<width>\d+)",
    "upsample-conv": r"(?P<channels>\d+)-(?P<outputs>\d+)@(?P<height>\d+)x(?P<width>\d+)",
    "group-norm-silu": r"(?P<channels>\d+)@(?P<height>\d+)x(?P<width>\d+)",
    "geglu": r"(?P<channels>\d+)-(?P<outputs>\d+)@(?P<tokens>\d+)",
}
_OPTIONS: dict[str, dict[str, int]] = {name: {"batch": 1} for name in _FORMS}
_OPTIONS["group-norm-silu"]["groups"] = 32

SETS: dict[str, tuple[str, ...]] = {
    "layers": (
        "conv:320-320@64x64,batch=2",
        "conv:640-640@32x32,batch=2",
        "conv:512-512@64x64",
        "conv:1280-1280@16x16,batch=2",
        "conv:256-256@128x128",
        "conv:128-128@256x256",
        "upsample-conv:512-512@64x64",
        "upsample-conv:256-256@128x128",
        "group-norm-silu:128@256x256",
        "group-norm-silu:512@64x64",
        "group-norm-silu:320@64x64",
    ),
    "models": (
        "sd15-vae-decoder@latent:1x4x32x32",
        "sd15-vae-decoder@latent:1x4x64x64",
    ),
    "large": (
        "sd15-unet@sample:2x4x64x64",
        "dit-xl-2@hidden_states:2x4x32x32",
    ),
}
"""The rows of BENCHMARKS.md: sizes that Stable Diffusion's UNet and VAE decoder have, and whole models; ``large`` ones
take several GB in each implementation, which is a process that stays: time few of them in one run."""


@dataclass(frozen=True)
class Work:
    """One thing to time. ``word`` says all of it but ``weights``, and `parse_work` reads it again."""

    word: str
    weights: Path | None = None

    @property
    def is_layer(self) -> bool:
        return is_layer(self.word)


def is_layer(word: str) -> bool:
    """Whether a word is meant to be a layer: it has a colon before any ``@``, as a model's sizes have not."""
    return ":" in word.partition("@")[0]


def parse_work(word: str, *, reduced: bool = False, weights: Path | None = None, shapes: str | None = None) -> Work:
    """A layer, or a model's name with sizes of its inputs after an ``@``; `UsageError` for anything else.

    ``reduced``, ``weights`` and ``shapes`` are for named models; a model's own sizes go before ``shapes``.

    >>> parse_work("conv:8-8@4x4,batch=1").word, parse_work("sd15-vae-decoder@latent:1x4x8x8", reduced=True).word
    ('conv:8-8@4x4', 'sd15-vae-decoder-reduced@latent:1x4x8x8')
    """
    if is_layer(word):
        return Work(layer_word(*parse_layer(word)))
    name, at, own = word.partition("@")
    if at and not own:
        raise UsageError(f"source {word!r}: there are no sizes after '@', as in sd15-vae-decoder@latent:1x4x32x32")
    source = resolve(name, kinds=(MODEL,), reduced=reduced, weights=weights)
    asked = own or shapes
    if asked:
        from hasten.backends.shapes import parse_profiles
        from hasten.tools.sizes import sized

        sized(source.adapter(), parse_profiles(asked))
    return Work(f"{source.text}@{asked}" if asked else source.text, source.weights)


def works(words: Iterable[str], sets: Iterable[str], **options: Any) -> list[Work]:
    """All that was asked for, once each; `UsageError` where an option is for named models and there is none."""
    listed = [*words, *(word for name in sets for word in SETS[name])]
    if not listed:
        raise UsageError(
            "no source was given; name a model, a layer as in conv:320-320@64x64,batch=2, or --set "
            f"{' or '.join(SETS)}; --render reads what was timed before"
        )
    if all(map(is_layer, listed)):
        for option, given in options.items():
            if given:
                raise UsageError(f"--{option} is for named models, and only layers were given")
    return list(dict.fromkeys(parse_work(word, **options) for word in listed))


def parse_layer(word: str) -> tuple[str, dict[str, int]]:
    """A layer's name and its sizes.

    >>> parse_layer("group-norm-silu:64@8x8,batch=2")
    ('group-norm-silu', {'channels': 64, 'height': 8, 'width': 8, 'batch': 2, 'groups': 32})
    """
    name, _, rest = word.partition(":")
    if name not in _FORMS:
        raise UsageError(f"there is no layer {name!r}; layers: {', '.join(_FORMS)}.{nearest(name, _FORMS)}")
    form, *items = rest.split(",")
    read = re.fullmatch(_FORMS[name], form)
    if read is None:
        raise UsageError(f"layer {word!r}: {form!r} is not written as in {GRAMMARS[name]}")
    sizes = {key: _size(word, key, text) for key, text in read.groupdict().items()}
    given: dict[str, int] = {}
    for item in items:
        key, equals, text = item.partition("=")
        known = _OPTIONS[name]
        if not equals or key not in known:
            raise UsageError(f"layer {word!r}: there is no {key!r}; it takes {', '.join(known)}.{nearest(key, known)}")
        if key in given:
            raise UsageError(f"layer {word!r}: {key} is given twice")
        given[key] = _size(word, key, text)
    sizes.update({**_OPTIONS[name], **given})
    if "groups" in sizes and sizes["channels"] % sizes["groups"]:
        raise UsageError(f"layer {word!r}: {sizes['channels']} channels do not make {sizes['groups']} groups")
    return name, sizes


def layer_word(name: str, sizes: Mapping[str, int]) -> str:
    """How a layer is written, without options that have their usual values."""
    outputs = f"-{sizes['outputs']}" if "outputs" in sizes else ""
    where = str(sizes["tokens"]) if "tokens" in sizes else f"{sizes['height']}x{sizes['width']}"
    more = [f",{key}={sizes[key]}" for key, usual in _OPTIONS[name].items() if sizes[key] != usual]
    return f"{name}:{sizes['channels']}{outputs}@{where}{''.join(more)}"


def _size(word: str, key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"layer {word!r}: {key} is {text!r}, which is not a whole number from 1 up")
    return int(text)
