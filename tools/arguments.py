"""What several verbs take on the command line, and a parser that answers a wrong word with one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hasten.errors import UsageError, nearest
from hasten.passes import catalog

VERIFY = ("structure", "sites", "model")
DTYPES = ("float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of ending the process, and names the nearest option for one that is unknown."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            word = unknown[0].partition("=")[0]
            if word.startswith("-"):
                raise UsageError(f"there is no option {word!r}.{nearest(word, options)}")
            raise UsageError(f"there is one word too many: {word!r}")
        return found


def examples(lines: Iterable[str]) -> str:
    """The end of a verb's help."""
    return "\n".join(("examples:", *(f"  {line}" for line in lines)))


def output_options(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    group.add_argument("-v", "--verbose", action="count", default=0, help="say more, with tracebacks; -vv: everything")
    group.add_argument("-q", "--quiet", action="count", default=0, help="no progress and no warnings")


def source_options(parser: argparse.ArgumentParser) -> None:
    """How a named model is read."""
    group = parser.add_argument_group("named models")
    group.add_argument("--reduced", action="store_true", help="the model's reduced form: all blocks, narrow and small")
    group.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="a diffusers model directory (safetensors) instead of random weights",
    )


def cache_options(parser: argparse.ArgumentParser) -> None:
    """The step cache."""
    group = parser.add_argument_group("step cache (an approximation: steps that change little reuse an earlier result)")
    group.add_argument(
        "--cache",
        metavar="POLICY",
        help="NAME:OPTION=VALUE,…, such as teacache:threshold=0.25,model=flux, or a file that calibrate wrote",
    )
    group.add_argument(
        "--cache-form",
        metavar="FORM",
        help="conditional (a branch in the graph) or straight (none; a sampler is unrolled)",
    )
    group.add_argument("--region", metavar="FIRST:LAST", help="the blocks that a reused step leaves out")


SOLVER_HELP = (
    "NAME, or NAME:OPTION=VALUE,…, such as unipc:order=2,levels=karras: the sampler's loop goes into the engine"
)


def sampler_options(parser: argparse.ArgumentParser) -> None:
    """A whole sampler in the engine; `sampling` reads what was given."""
    group = parser.add_argument_group("sampler (the whole loop in the engine: noise in, latents out)")
    group.add_argument("--solver", metavar="NAME", help=SOLVER_HELP)
    group.add_argument("--steps", type=whole(1), metavar="N", help="what the engine does unless told otherwise: 20")
    group.add_argument(
        "--guidance", type=number, metavar="SCALE", help="classifier-free guidance (1, the default: none)"
    )
    group.add_argument(
        "--guidance-form",
        metavar="FORM",
        help="batched (one call of twice the batch), sequential (two calls), embedded (the network takes it), none",
    )
    group.add_argument("--rescale", action="store_true", help="guidance that can be rescaled at run time")
    group.add_argument(
        "--noise", metavar="KIND", help="of stochastic solvers: seed (made in the engine), input or none"
    )
    group.add_argument("--inpaint", action="store_true", help="pictures of which a part is kept")
    group.add_argument(
        "--rows", type=whole(1), metavar="N", help="most evaluations that the engine takes (default 128)"
    )
    group.add_argument(
        "--decoder",
        metavar="DIR",
        help="pixels instead of latents: a diffusers AutoencoderKL's directory, a registered decoder, or own (bundled "
        "models)",
    )
    group.add_argument(
        "--scheduler", type=Path, metavar="FILE", help="scheduler_config.json: what the network was trained on"
    )
    group.add_argument(
        "--time-scale",
        type=positive,
        metavar="X",
        help="what the network is told is X times the training's time: 0.001 for one that wants 0 to 1 (FLUX: the "
        "default there; 1 elsewhere)",
    )


def _decoder(args: argparse.Namespace) -> Any:
    from hasten.backends.decoder import decoder_of

    return None if args.decoder is None else decoder_of(args.decoder, str(args.source))


def sampling(args: argparse.Namespace) -> Any:
    """The `hasten.Sampling` that `sampler_options` asked for, None without one."""
    if args.solver is None:
        given = ("steps", "guidance", "guidance_form", "noise", "rows", "scheduler", "rescale", "inpaint", "decoder")
        if extra := [name for name in (*given, "time_scale") if getattr(args, name)]:
            raise UsageError(f"--{extra[0].replace('_', '-')} is of a sampler; say which: --solver NAME")
        return None
    from hasten.backends.sampling import Sampling

    return Sampling(
        solver=args.solver,
        steps=args.steps or 20,
        guidance=1.0 if args.guidance is None else args.guidance,
        form=args.guidance_form,
        rescale=args.rescale,
        noise=args.noise,
        inpaint=args.inpaint,
        rows=args.rows,
        process=None if args.scheduler is None else _scheduler(args.scheduler),
        time_scale=args.time_scale,
        decoder=_decoder(args),
    )


def _scheduler(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--scheduler: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--scheduler: {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--scheduler: {path} holds a {type(found).__name__}, not a scheduler's configuration")
    from hasten.passes.solvers.process import Process

    try:
        Process.of(found)
    except UsageError as error:
        raise UsageError(f"--scheduler: {path}: {str(error).removeprefix('process: ')}") from error
    return found


def rule_options(parser: argparse.ArgumentParser, *, verify: bool = True) -> None:
    """What the rules may do and must find."""
    group = parser.add_argument_group("rules")
    group.add_argument(
        "--expect",
        type=expectations,
        default={},
        metavar="RULE=N,…",
        help="fail (exit code 3) unless each rule, or rule.variant, has exactly so many sites",
    )
    group.add_argument("--skip", type=pass_names, default=(), metavar="NAME,…", help="leave these passes out")
    group.add_argument("--fuel", type=whole(0), metavar="N", help="stop after N rewrites, to bisect a difference")
    group.add_argument(
        "--strict",
        action="store_true",
        help="fail (exit code 5) where a rewrite does not verify, instead of undoing it",
    )
    if verify:
        group.add_argument(
            "--verify",
            type=one_of(VERIFY),
            default="sites",
            metavar="LEVEL",
            help="structure: the graph is well formed; sites (default): and every rewrite equals what it replaces; "
            "model: and the whole result equals the original",
        )


def choice_options(parser: argparse.ArgumentParser) -> None:
    """How implementations are chosen; `choosing` reads what was given."""
    group = parser.add_argument_group("choice of implementations (float32 convolutions on a CPU)")
    group.add_argument(
        "--tune",
        type=one_of(("off", "cached", "on")),
        default="cached",
        metavar="MODE",
        help="off: by the roofline model; cached (default): by what `hasten tune` measured, else the model; on: "
        "measure what is missing",
    )
    group.add_argument("--memory-budget", type=size, metavar="SIZE", help="for transformed weights and workspace: 2GiB")
    group.add_argument(
        "--max-error",
        type=positive,
        metavar="E",
        help="relative rms error against float64 that the model may have; it is measured, and layers give way",
    )
    group.add_argument(
        "--strict-nan", action="store_true", help="nothing that spreads a NaN or infinity further than the original"
    )
    group.add_argument("--half", action="store_true", help="implementations that round more in float16 layers as well")


def choosing(args: argparse.Namespace) -> Any:
    """The `hasten.backends.choosing.Choosing` that `choice_options` asked for."""
    from hasten.backends.choosing import Choosing

    return Choosing(args.tune, args.memory_budget, args.max_error, args.strict_nan, args.half)


def size(text: str) -> int:
    """``512MiB``, ``2GB`` or a number of bytes -> bytes.

    >>> size("2KiB"), size("3MB"), size("17")
    (2048, 3000000, 17)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or 512MiB, 2GB")
    unit = found[2] or ""
    power = " KMGT".index(unit[:1].upper() or " ")
    return int(float(found[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def whole(least: int) -> Callable[[str], int]:
    """A whole number from ``least`` up."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return number

    return read


def number(text: str) -> float:
    """A finite number from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """One of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}.{nearest(text, choices)}")
        return text

    return read


def target(text: str) -> str:
    """A target, as `hasten.backends.target.parse_target` reads it."""
    from hasten.backends.target import parse_target

    try:
        return str(parse_target(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2] or str(error)) from error


def rule_names() -> tuple[str, ...]:
    """The rules: those passes that match sites."""
    return catalog.default("fx")


def expectations(text: str) -> dict[str, int]:
    """``attention=32,group-norm-act.silu=45`` -> counts by rule.

    >>> expectations("attention=32,group-norm-act.silu=45")
    {'attention': 32, 'group-norm-act.silu': 45}
    """
    counts: dict[str, int] = {}
    for item in text.split(","):
        key, equals, count = item.partition("=")
        if not equals or not count.isdecimal():
            raise argparse.ArgumentTypeError(f"{item!r} is not written RULE=NUMBER, as in attention=32")
        name = key.partition(".")[0]
        if name not in rule_names():
            raise argparse.ArgumentTypeError(
                f"there is no rule {name!r}; rules: {', '.join(rule_names())}.{nearest(name, rule_names())}"
            )
        if key in counts:
            raise argparse.ArgumentTypeError(f"{key!r} is named twice")
        counts[key] = int(count)
    return counts


def pass_names(text: str) -> tuple[str, ...]:
    """``gelu,attention`` -> names of passes."""
    names = tuple(text.split(","))
    for name in names:
        if name not in catalog.names():
            raise argparse.ArgumentTypeError(
                f"there is no pass {name!r}; passes: {', '.join(catalog.names())}.{nearest(name, catalog.names())}"
            )
    return names


def passes(text: str) -> str:
    """A pipeline, as `hasten.passes.pipeline.parse` reads it."""
    from hasten.passes.pipeline import parse

    try:
        parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("passes: ")) from error
    return text
