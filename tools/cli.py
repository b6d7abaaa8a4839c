"""``hasten VERB SOURCE [options]``: finds the verb, imports its file, and turns every error into one line and a code.

A verb is a module of this folder with ``SUMMARY``, ``EXAMPLES``, ``configure(parser)`` and ``run(args, console)``,
which returns the exit code. stdout is for results, stderr for progress and messages.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import hasten
from hasten.errors import HastenError, UsageError, nearest
from hasten.tools.arguments import Parser, examples, output_options
from hasten.tools.console import Console

VERBS = {
    "models": "the model names, with parameters and the patterns in them",
    "inspect": "operators, costs, what the rules match, what they nearly match and why not",
    "optimize": "rewrite an ONNX file, or a PyTorch model into a .pt2 file",
    "build": "build an engine directory",
    "run": "run an engine on inputs from files, or on random ones",
    "generate": "pictures from a bundled model, plain and optimised, with the same seeds",
    "compare": "two of (model, ONNX, .pt2, engine) on the same inputs: errors and times",
    "calibrate": "record a model's runs, fit a step cache to them, write what --cache reads",
    "tune": "time the implementations of a model's convolutions on this machine, and keep the times",
    "bench": "times of models and layers in several implementations, side by side in one run",
    "doctor": "what is installed, which targets can be built and run here, and what is missing",
}
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; see `hasten.errors` for the codes."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        verb, rest = _verb(words)
    except UsageError as error:
        print(f"hasten: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as done:  # --help, --version
        return int(done.code or 0)
    command = import_module(f"hasten.tools.{verb}")
    try:
        args = parser(verb).parse_args(rest)
    except UsageError as error:
        print(f"hasten {verb}: {error} (hasten {verb} --help)", file=sys.stderr)
        return error.exit_code
    except SystemExit as done:
        return int(done.code or 0)
    return _run(command, verb, args)


def parser(verb: str) -> Parser:
    """The options of one verb."""
    command = import_module(f"hasten.tools.{verb}")
    made = Parser(
        prog=f"hasten {verb}",
        description=command.SUMMARY,
        epilog=examples(command.EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.configure(made)
    output_options(made)
    return made


def _run(command: Any, verb: str, args: argparse.Namespace) -> int:
    console = Console(verb, json=args.json, verbosity=args.verbose - args.quiet)
    try:
        with warnings.catch_warnings(), console.logging():
            if console.verbosity < 1:  # of torch and its exporter; nothing that a user could act on
                warnings.simplefilter("ignore")
            with redirect_stdout(sys.stderr if args.json else sys.stdout):
                code: int = command.run(args, console)
        console.finish(code)
    except HastenError as error:
        code = error.exit_code
        console.fail(str(error), code)
        if console.verbosity > 0:
            traceback.print_exc()
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.fail("interrupted", code)
    except (
        BrokenPipeError
    ):  # `hasten … | head`: nobody reads any more, and the interpreter must not complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = 1
        reason = " ".join(str(error).split()) or "no message"
        hint = "" if console.verbosity > 0 else "; -v shows the traceback"
        console.fail(f"unexpected {type(error).__name__}: {reason}{hint}", code)
        if console.verbosity > 0:
            traceback.print_exc()
    return code


def _verb(words: list[str]) -> tuple[str, list[str]]:
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in VERBS.items())
    parser = Parser(
        prog="hasten",
        usage="hasten VERB SOURCE [options]",
        description="Make diffusion models faster by rewriting their graphs.",
        epilog=f"verbs:\n{listed}\n\nhasten VERB --help shows the options of a verb, with examples.\n\n"
        "exit codes: 0 done; 1 failed; 2 wrong usage; 3 an expectation was not met; 4 something optional is\n"
        "missing (its install command is printed); 5 verification found a difference.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hasten {hasten.__version__}")
    if not words:
        parser.print_help(sys.stderr)
        raise UsageError("no verb given; `hasten --help` lists the verbs")
    if words[0].startswith("-"):
        parser.parse_args(words[:1])
        raise UsageError(f"the first word must be a verb, not {words[0]!r}; `hasten --help` lists the verbs")
    if words[0] not in VERBS:
        raise UsageError(f"there is no verb {words[0]!r}; verbs: {', '.join(VERBS)}.{nearest(words[0], VERBS)}")
    return words[0], words[1:]


if __name__ == "__main__":
    sys.exit(main())
