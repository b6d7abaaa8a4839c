"""The import root, the wheel and the folder tree say the same thing; who may import whom is enforced."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hasten

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("backends", "models", "passes", "tools")
HEAVY = {"torch", "onnx", "onnx_graphsurgeon", "onnxruntime", "diffusers", "triton", "tensorrt", "tensorrt_rtx"}

ALLOWED = {
    "passes/pattern.py": set(),
    "passes/rule.py": set(),
    "passes/pipeline.py": set(),
    "passes/catalog.py": set(),
    "passes/rules": set(),
    "passes/solvers": {"torch"},  # where diffusers' schedulers are probed or stood in for, when that is used
    "passes/fx": {"torch", "onnx"},
    "passes/ops": {"torch", "triton"},
    "passes/onnx": {"onnx", "onnx_graphsurgeon", "onnxruntime"},
}
"""Folder or file -> the heavy packages that it may import, at whatever depth; numpy is not heavy."""


def imports(file: Path) -> set[str]:
    """Modules that a file imports outside ``if TYPE_CHECKING``."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", PARTS)
def test_link_leads_to_the_folder(part: str) -> None:
    link = ROOT / "src" / "hasten" / part
    assert link.is_symlink(), f"{link} is not a link: run git config core.symlinks true, then git checkout -- src"
    assert link.resolve() == ROOT / part


@pytest.mark.parametrize("part", PARTS)
def test_every_folder_with_modules_is_a_package(part: str) -> None:
    for module in (ROOT / part).rglob("*.py"):
        assert (module.parent / "__init__.py").is_file(), f"{module.parent} needs an __init__.py, or the wheel lacks it"


@pytest.mark.parametrize("part", PARTS)
def test_a_module_under_two_names_is_refused(part: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {part}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import hasten.{part}, not {part}: a module under two names is two modules" in done.stderr


def test_import_is_light() -> None:
    code = "import sys, hasten, hasten.passes.pattern, hasten.passes.rules.attention, hasten.tools.cli; "
    code += f"print({sorted(HEAVY)!r} and sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    assert all(getattr(hasten, name) is not None for name in hasten.__all__)
    with pytest.raises(AttributeError, match="module 'hasten' has no attribute 'optimise'"):
        _ = hasten.optimise


@pytest.mark.parametrize("part", ALLOWED)
def test_who_may_import_whom(part: str) -> None:
    for file in files(part):
        heavy = {m.split(".")[0] for m in imports(file)} & HEAVY
        assert heavy <= ALLOWED[part], f"{file.relative_to(ROOT)} imports {heavy - ALLOWED[part]}"


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [("passes", ("backends", "models", "tools")), ("backends", ("tools",)), ("models", ("tools", "backends"))],
)
def test_layers(part: str, forbidden: tuple[str, ...]) -> None:
    for file in files(part):
        wrong = {m for m in imports(file) if m.startswith(tuple(f"hasten.{f}" for f in forbidden))}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_optional_packages_are_asked_for_by_name() -> None:
    """An import of an optional package at the top of a module would be an error without instructions."""
    optional = {"diffusers", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "openvino", "polygraphy"}
    for part in PARTS:
        for file in files(part):
            tops = {
                alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
                for node in ast.parse(file.read_text()).body
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            assert not tops & optional, f"{file.relative_to(ROOT)} imports {tops & optional} at the top"


def test_no_module_is_called_utils() -> None:
    assert [f for part in PARTS for f in files(part) if re.fullmatch(r"_?(utils?|helpers?|misc)\.py", f.name)] == []
