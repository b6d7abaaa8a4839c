"""Every node case of ONNX's own backend test through the optimiser: what is recognised, and whether the outputs stay.

Run it as a script for the table: ``python tests/tables/onnx_node_tests.py [--target onnxruntime:cpu] [--only
attention]``. Cases that ONNX Runtime's CPU provider does not run, or whose expected outputs it misses, are left out.
``_expanded`` cases are ONNX's own decompositions of an operator: they hold the same computation spelled out.
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from hasten.backends.optimize import run_pipeline
from hasten.backends.target import parse_target
from hasten.errors import HastenError, UsageError
from hasten.passes import pipeline
from hasten.passes.onnx import io
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.onnx.site_check import SiteCheck
from hasten.passes.rule import Report

RULES = ("gelu", "geglu", "attention", "group-norm-act", "upsample-conv")
SLACK = 8
"""A rewritten graph may add in another order: its error may be this many times the case's own tolerance."""


@dataclass(frozen=True)
class Result:
    """One case: the rules that fired, why others nearly did, and what is wrong (empty where outputs are equal)."""

    name: str
    op: str
    hits: dict[str, int]
    reasons: tuple[str, ...]
    wrong: str = ""
    refused: str = ""

    @property
    def recognised(self) -> bool:
        return bool(self.hits)


def cases(only: str = "") -> Iterator[Any]:
    """ONNX's node cases whose name contains ``only``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    return (c for c in found if only in c.name and c.model is not None)


def session(model: onnx.ModelProto) -> ort.InferenceSession | None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return None


def outputs(model: onnx.ModelProto, inputs: list[Any]) -> list[Any] | None:
    """Results of ONNX Runtime; None where it has no kernel."""
    runner = session(model)
    if runner is None:
        return None
    feeds = {i.name: x for i, x in zip(runner.get_inputs(), inputs, strict=False)}
    try:
        return list(runner.run(None, feeds))
    except Exception:
        return None


def close(got: Any, wanted: Any, rtol: float, atol: float) -> bool:
    if isinstance(wanted, (list, tuple)):
        return isinstance(got, (list, tuple)) and all(close(g, w, rtol, atol) for g, w in zip(got, wanted, strict=True))
    if wanted is None or got is None:
        return wanted is got
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if wanted.dtype.kind not in "fc":
        return bool((got == wanted).all())
    # Where the case has NaN (a softmax over nothing) a rewritten graph may have a number.
    known = ~np.isnan(wanted)
    return bool(np.allclose(got[known], wanted[known], rtol=rtol, atol=atol))


def run_case(case: Any, target: str = "") -> Result | None:
    """Optimise one case and compare; None where ONNX Runtime itself does not pass it."""
    inputs, expected = case.data_sets[0]
    before = outputs(case.model, list(inputs))
    rtol, atol = case.rtol or 1e-3, case.atol or 1e-7
    if before is None or not all(close(b, e, rtol, atol) for b, e in zip(before, expected, strict=False)):
        return None
    op = case.model.graph.node[-1].op_type if "expanded" not in case.name else case.name.removeprefix("test_")
    try:
        graph = OnnxGraph(io.read(case.model).model)
    except UsageError as error:
        return Result(case.name, op, {}, (), refused=str(error))
    report = Report()
    try:
        check = SiteCheck()
        if target:
            parsed = parse_target(target)
            run_pipeline(graph, "onnx", parsed, report, passes=None, fuel=None, skip=(), verify=check, dump=None)
        else:
            steps = [(name, {}) for name in ("canonical", *RULES)]
            pipeline.run(graph, steps, pipeline.Context(verify=check), report)
    except HastenError as error:
        return Result(case.name, op, {}, (), wrong=f"{type(error).__name__}: {error}")
    hits = {r.name: r.hits for r in report.rules if r.hits and r.name in RULES}
    reasons = tuple(f"{r.name}: {m.reason}" for r in report.rules for m in (*r.misses, *r.reverted) if r.name in RULES)
    model = graph.to_model()
    after = outputs(model, list(inputs))
    if after is None:
        return Result(case.name, op, hits, reasons, wrong="ONNX Runtime does not run the result")
    wrong = ""
    for position, (a, b) in enumerate(zip(after, before, strict=True)):
        if not close(a, b, SLACK * rtol, SLACK * max(atol, 1e-6)):
            wrong = f"output {position} differs"
    return Result(case.name, op, hits, reasons, wrong)


def run(only: str = "", target: str = "", names: Iterable[str] | None = None) -> tuple[list[Result], int]:
    """Results of the cases that ONNX Runtime passes, and how many it does not."""
    results, skipped = [], 0
    for case in cases(only):
        if names is not None and case.name not in names:
            continue
        result = run_case(case, target)
        if result is None:
            skipped += 1
        else:
            results.append(result)
    return results, skipped


def family(name: str) -> str:
    """``test_attention_4d_gqa_expanded`` -> ``attention (expanded)``."""
    stem = name.removeprefix("test_").split("_")[0]
    return f"{stem} (expanded)" if "expanded" in name else stem


def table(results: list[Result], skipped: int) -> str:
    """Families with at least one recognised or nearly recognised case, then the totals and the reasons."""
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reasons: collections.Counter[str] = collections.Counter()
    for result in results:
        row = rows[family(result.name)]
        row["cases"] += 1
        row["recognised"] += result.recognised
        row["equal"] += not result.wrong
        row["refused"] += bool(result.refused)
        row["near"] += bool(result.reasons) and not result.recognised
        if not result.recognised:
            reasons.update({f"{family(result.name)}: {reason}" for reason in result.reasons})
    lines = [f"{'operator':34} {'cases':>6} {'recognised':>11} {'equal':>6} {'left alone':>11}"]
    for name, row in sorted(rows.items()):
        if row["recognised"] or row["near"] or row["cases"] != row["equal"]:
            left = row["cases"] - row["recognised"]
            lines.append(f"{name:34} {row['cases']:6} {row['recognised']:11} {row['equal']:6} {left:11}")
    total = len(results)
    equal, known = sum(not r.wrong for r in results), sum(r.recognised for r in results)
    lines.append(f"{'all':34} {total:6} {known:11} {equal:6} {total - known:11}")
    refused = sum(bool(r.refused) for r in results)
    lines.append(f"{skipped} more are not passed by ONNX Runtime itself; {refused} were refused (opset)")
    lines += [f"  {count:4} {reason}" for reason, count in reasons.most_common(40)]
    lines += [f"WRONG {r.name}: {r.wrong}" for r in results if r.wrong]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", default="", help="also run legalise for this target")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args(arguments)
    results, skipped = run(options.only, options.target)
    print(table(results, skipped))
    return int(any(r.wrong for r in results))


if __name__ == "__main__":
    sys.exit(main())
