"""How often each rule fires on the real architectures, on FX graphs and on ONNX files of every exporter setting.

``python tests/tables/counts.py [--full] [MODEL …]`` prints the table; the expected counts are the registry's, which are
those of the architecture. Exit code 3 where one differs.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hasten.backends.optimize import optimize
from hasten.models import registry
from hasten.models.adapter import Adapter
from hasten.passes import catalog, pipeline
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.rule import Report

MODELS = ("sd15-unet", "sd15-vae-decoder", "sdxl-unet")
PROCESSORS = ("sdpa", "classic")
OPSETS = (18, 20, 22, 23)


@dataclass(frozen=True)
class Row:
    """One way to arrive: the graph, its counts, and the seconds that the passes took."""

    model: str
    how: str
    counts: dict[str, int]
    expected: dict[str, int]
    seconds: float

    @property
    def right(self) -> bool:
        return self.counts == self.expected


def counts(report: Report, expected: dict[str, int]) -> dict[str, int]:
    split = {key: key.partition(".") for key in expected}
    return {key: report[name].count(variant) for key, (name, _, variant) in split.items()}


def on_fx(adapter: Adapter, how: str) -> Row:
    """Capture with torch.export and run the rules."""
    inputs = adapter.example_inputs()
    _, report = optimize(adapter.module(), (), example_kwargs=inputs, verify="structure")
    seconds = sum(report.seconds[name] for name in catalog.default("fx"))
    return Row(adapter.name, how, counts(report, dict(adapter.expected)), dict(adapter.expected), seconds)


def exported(adapter: Adapter, opset: int, dynamic: bool):
    """The ONNX model that torch's exporter makes of the untouched module."""
    inputs = adapter.example_inputs()
    shapes = None
    if dynamic:
        shapes = {
            name: dict.fromkeys(adapter.dynamic_dims.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in inputs
        }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            adapter.module(),
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            verbose=False,
        )
    return program.model_proto


def on_onnx(adapter: Adapter, opset: int, dynamic: bool, how: str) -> Row:
    graph = OnnxGraph(exported(adapter, opset, dynamic))
    steps = [(name, {}) for name in catalog.default("onnx") if name != "legalise"]
    report = pipeline.run(graph, steps, pipeline.Context(), Report())
    found = counts(report, dict(adapter.expected))
    return Row(adapter.name, how, found, dict(adapter.expected), sum(report.seconds.values()))


def rows(names: tuple[str, ...], *, reduced: bool, opsets: tuple[int, ...] = OPSETS) -> Iterator[Row]:
    for name in names:
        for processor in PROCESSORS:
            adapter = registry.get(name, reduced=reduced, processor=processor)
            yield on_fx(adapter, f"FX, {processor}")
            for opset in opsets:
                for dynamic in (False, True):
                    how = f"ONNX {opset}, {processor}, {'dynamic' if dynamic else 'static'}"
                    yield on_onnx(adapter, opset, dynamic, how)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--full", action="store_true", help="real width instead of the reduced one")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    wrong = 0
    for row in rows(tuple(args.models), reduced=not args.full):
        wrong += not row.right
        numbers = "  ".join(
            f"{k} {v}" + ("" if v == row.expected[k] else f" (not {row.expected[k]})") for k, v in row.counts.items()
        )
        print(
            f"{'ok   ' if row.right else 'WRONG'} {row.model:26} {row.how:28} {row.seconds:6.1f} s  {numbers}",
            flush=True,
        )
    started = time.strftime("%Y-%m-%d")
    print(
        f"{started}: {wrong} rows differ from the architecture"
        if wrong
        else f"{started}: every row as the architecture"
    )
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
