"""Docstring examples run, and what the documents show is what there is."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import hasten
from hasten.passes import catalog

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(hasten.__path__, "hasten."))
NEEDS_A_GPU_PACKAGE = {f"hasten.passes.ops.{op}.triton" for op in ("group_norm_act", "geglu", "winograd_conv2d")}


def test_modules_are_found() -> None:
    assert {"hasten.passes.pattern", "hasten.backends.dynamo", "hasten.tools.cli"} <= set(MODULES)


@pytest.mark.parametrize("name", [m for m in MODULES if m not in NEEDS_A_GPU_PACKAGE and not m.endswith("worker")])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def shell_commands(text: str) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    return [
        line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line and not line.startswith("#")
    ]


def test_every_command_of_the_readme_is_one_the_parser_takes() -> None:
    from hasten.tools import cli

    for command in shell_commands((ROOT / "README.md").read_text()):
        words = shlex.split(command, comments=True)
        if words[:1] == ["hasten"]:
            cli.parser(words[1]).parse_args(words[2:])


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = re.findall(r"^(?:\$ )?make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert used
    assert set(used) <= set(targets)


def test_readme_lists_every_rule() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in catalog.names() if f"`{name}`" not in text] == []


def test_contributing_shows_the_real_file() -> None:
    """The rule that CONTRIBUTING.md walks through is the file itself, not a copy that ages."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = re.search(r"<!-- passes/rules/geglu.py -->\n```python\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == (ROOT / "passes" / "rules" / "geglu.py").read_text()


def test_changelog_names_this_version() -> None:
    assert f"## {hasten.__version__}" in (ROOT / "CHANGELOG.md").read_text()
