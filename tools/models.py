"""``hasten models``: what can be named as a source."""

from __future__ import annotations

import argparse
from typing import Any

from hasten.errors import MissingPackageError
from hasten.tools.console import Console, table

SUMMARY = "List the model names, with their parameters, the patterns in them, and whether trained weights come along."
EXAMPLES = ("hasten models", "hasten models --json")


def configure(parser: argparse.ArgumentParser) -> None:
    """It takes no options of its own."""


def run(args: argparse.Namespace, console: Console) -> int:
    """Describe every model; without diffusers, name them."""
    from hasten.models.registry import BUNDLED, names

    every = names()
    bases = [n for n in every if not n.endswith("-reduced")]
    missing = ""
    rows: list[dict[str, Any]] = []
    for name in bases:
        row: dict[str, Any] = {"name": name, "reduced": f"{name}-reduced" in every, "trained": name in BUNDLED}
        try:
            row.update(_details(name))
        except MissingPackageError as error:
            missing = str(error)
        rows.append(row)
    shown = table("model", ">parameters", "patterns", "weights", "what it is")
    for row in rows:
        patterns = ", ".join(f"{rule} {count}" for rule, count in row.get("expected", {}).items() if "." not in rule)
        parameters = f"{row['parameters'] / 1e6:,.1f} M" if "parameters" in row else "?"
        weights = "bundled" if row["trained"] else "random"
        shown.add_row(row["name"], parameters, patterns or "?", weights, row.get("description", "?"))
    console.show(
        shown,
        "\nNAME-reduced is the same architecture, narrow and small, for every model with random weights.\n"
        "A diffusers directory is a source as well: path/to/pipeline#unet.",
    )
    if missing:
        console.note(f"parameters and patterns need diffusers: {missing}")
    console.document({"models": rows})
    return 0


def _details(name: str) -> dict[str, Any]:
    from hasten.models.registry import get

    adapter = get(name)
    return {
        "family": adapter.family,
        "description": adapter.description,
        "parameters": adapter.parameters,
        "expected": dict(adapter.expected),
        "inputs": {i.name: list(i.shape) for i in adapter.inputs},
        "outputs": list(adapter.output_names),
    }
