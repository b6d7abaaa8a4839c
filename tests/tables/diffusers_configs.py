"""The whole zoo: every tiny diffusers configuration through ``backend="hasten"``, compared with eager.

    python tests/tables/diffusers_configs.py [--engine eager|inductor] [--only NAME ...] [--json]

``tests/data/diffusers_tiny_configs.json`` holds what diffusers' own model tests instantiate (Apache-2.0,
huggingface/diffusers, tests/models): class, init dict, inputs. Parameters are drawn anew from a fixed seed, because a
fresh diffusers model has zeros where an error must show. With ``--engine eager`` the rewritten graphs run in eager;
``--engine inductor`` compiles them for real. Prints one row a configuration and a summary; exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from in_eager import clear, hits, relative_error, rewritten, tensors
from torch import fx, nn

DATA = Path(__file__).resolve().parent.parent / "data" / "diffusers_tiny_configs.json"
TOLERANCE = 1e-4
"""Norm of the difference over the norm of what eager computes, over all outputs, on each of two inputs."""

WANTED = ("scaled_dot_product_attention", "group_norm")
"""Operators of which none may be left: every one has a rule that takes it."""

CANNOT_CAPTURE: dict[str, str] = {
    "CogVideoXTransformer": "We found a fake tensor in the exported program constant's list",
    "ConsisIDTransformer": "We found a fake tensor in the exported program constant's list",
    "ConsistencyDecoderVAE": "two runs on the same inputs differ",
    "HiDreamTransformer": ".numpy() is not supported for tensor subclasses",
    "HunyuanVideo15Transformer": "Could not guard on data-dependent expression",
    "LTX2VideoDiffusionDecoderModel": "two runs on the same inputs differ",
    "Lumina2Transformer": "unhashable type: non-nested SymInt",
    "OmniGenTransformer": "Could not guard on data-dependent expression",
    "WanAnimate2Transformer": "Unsupported input type",
}
"""What `hasten.backends.capture` refuses, and how its reason begins. The rest is captured whole."""


@dataclass
class Row:
    """What one configuration did.

    ``hits``: rewrites by rule. ``left``: attentions and group norms that are still there. ``errors``: relative, for two
    inputs.
    """

    name: str
    kind: str
    graphs: int = 0
    plain_graphs: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    errors: tuple[float, ...] = ()
    verdict: str = "ok"
    reason: str = ""
    seconds: float = 0.0


def configs() -> dict[str, dict[str, Any]]:
    return json.loads(DATA.read_text())


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """The model in evaluation mode, weights of unit gain, norms' weights near one, biases near zero."""
    import diffusers

    model = getattr(diffusers, config["class"])(**config["init"]).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=rng)
        if parameter.ndim > 1:
            drawn = drawn / max(1, parameter[0].numel()) ** 0.5
        else:
            drawn = float(name.endswith("weight")) + 0.1 * drawn
        parameter.copy_(drawn)
    return model


def inputs(config: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    return {name: _draw(spec, rng) for name, spec in config["inputs"].items()}


def _draw(spec: dict[str, Any], rng: torch.Generator) -> Any:
    ((kind, content),) = ((k, v) for k, v in spec.items() if k != "below")
    if kind == "float":
        return torch.randn(content, generator=rng)
    if kind == "ones":
        return torch.ones(content)
    if kind == "time":  # below one: some models take the sine of a thousand times it, where the last digit matters
        return torch.rand(content, generator=rng)
    if kind == "index":
        return torch.randint(0, spec["below"], content, generator=rng)
    if kind == "mask":  # the last quarter of the last axis is hidden
        mask = torch.ones(content, dtype=torch.bool)
        mask[..., content[-1] - content[-1] // 4 :] = False
        return mask
    if kind == "list":
        return [_draw(item, rng) for item in content]
    if kind == "kv_cache":
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

        return WanAnimate2KVCache(content)
    return _literal(content)


def _literal(content: Any) -> Any:
    if isinstance(content, dict) and "tensor" in content:
        return torch.tensor(content["tensor"])
    if isinstance(content, dict) and "range" in content:
        return torch.arange(*content["range"])
    if isinstance(content, dict) and "tuples" in content:
        return [tuple(item) for item in content["tuples"]]
    if isinstance(content, dict):  # JSON has no integer keys
        return {int(k) if k.isdigit() else k: v for k, v in content.items()}
    return content


def run(model: Any, config: dict[str, Any], seed: int) -> list[torch.Tensor]:
    """Outputs on the inputs of ``seed``; a model that samples draws from the same seed each time."""
    torch.manual_seed(seed)
    return tensors(model(**inputs(config, seed)))


def measure(name: str, config: dict[str, Any], engine: str = "eager") -> Row:
    """One row of the table."""
    from hasten.backends import dynamo

    row, started = Row(name, config["class"]), time.perf_counter()
    try:
        model = build(config)
        with torch.no_grad():
            want = [run(model, config, seed) for seed in (1, 2)]
    except Exception as error:
        row.verdict, row.reason = "cannot run", f"{type(error).__name__}: {_first_line(error)}"
        return row
    if not all(bool(t.isfinite().all()) for w in want for t in w):
        row.verdict, row.reason = "cannot run", "eager's output is not finite"
        return row
    if relative_error(*want) < 1e-3:
        row.verdict, row.reason = "cannot run", "eager's output does not depend on the inputs"
        return row
    plain = 0

    def counting(graph: fx.GraphModule, example_inputs: Any) -> Any:
        nonlocal plain
        plain += 1
        return fx.Interpreter(graph).run

    try:
        with torch.no_grad():
            torch._dynamo.reset()
            run(torch.compile(model, backend=counting), config, 1)
            row.plain_graphs = plain
            clear()
            compiled = torch.compile(model, backend=rewritten if engine == "eager" else "hasten")
            got = [run(compiled, config, 1)]
            row.graphs = dynamo.counters["compiled"] + dynamo.counters["training"]
            got.append(run(compiled, config, 2))
    except Exception as error:
        row.verdict, row.reason = "raised", f"{type(error).__name__}: {_first_line(error)}"
        if engine == "inductor" and plain_inductor(model, config) == row.reason:
            row.verdict = "as Inductor"
        return row
    row.failed = dynamo.counters["failed"]
    row.hits = hits()
    row.left = left()
    row.errors = tuple(relative_error(w, g) for w, g in zip(want, got, strict=True))
    row.seconds = time.perf_counter() - started
    if not all(error <= TOLERANCE for error in row.errors):
        row.verdict, row.reason = "wrong", f"error {max(row.errors):.3g}, {TOLERANCE:g} is allowed"
        theirs = plain_inductor(model, config) if engine == "inductor" else None
        if isinstance(theirs, list) and all(
            relative_error(t, g) <= TOLERANCE for t, g in zip(theirs, got, strict=True)
        ):
            row.verdict = "as Inductor"
    elif row.graphs != row.plain_graphs:
        row.verdict, row.reason = "more graphs", f"{row.graphs} graphs, {row.plain_graphs} without hasten"
    elif row.left:
        row.verdict, row.reason = "left", ", ".join(f"{n} {op}" for op, n in row.left.items())
    elif row.failed:
        row.verdict, row.reason = "pass failed", "; ".join(n for r in dynamo.reports for n in r.notes)
    return row


def plain_inductor(model: Any, config: dict[str, Any]) -> list[list[torch.Tensor]] | str:
    """What ``torch.compile`` alone makes of it, or its error: a defect that is not ours is told apart."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            compiled = torch.compile(model)
            return [run(compiled, config, seed) for seed in (1, 2)]
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"


def left() -> dict[str, int]:
    """How many attentions and group norms the reports still count."""
    from hasten.backends import dynamo

    counts = {op: sum(r.ops_after.get(op, 0) for r in dynamo.reports) for op in WANTED}
    return {op: count for op, count in counts.items() if count}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]


def line(row: Row) -> str:
    hits = " ".join(f"{k}={v}" for k, v in row.hits.items() if v) or "-"
    error = f"{max(row.errors):.1e}" if row.errors else "-"
    return (
        f"{row.name:36} {row.kind:42} {row.graphs:3}/{row.plain_graphs:<3} {error:>8} {row.seconds:5.1f}s "
        f"{row.verdict:12} {hits}{'  ' + row.reason if row.reason else ''}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="configurations whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for name, config in configs().items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        rows.append(measure(name, config, arguments.engine))
        print(line(rows[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    verdicts = {v: sum(r.verdict == v for r in rows) for v in sorted({r.verdict for r in rows})}
    hits: dict[str, int] = {}
    for row in rows:
        for rule, count in row.hits.items():
            hits[rule] = hits.get(rule, 0) + count
    summary = f"{len(rows)} configurations: " + ", ".join(f"{n} {v}" for v, n in verdicts.items())
    print(summary + "; rewrites: " + ", ".join(f"{k} {v}" for k, v in hits.items()), file=sys.stderr)
    if arguments.json:
        json.dump([asdict(r) for r in rows], sys.stdout, indent=1)
    return 1 if any(r.verdict not in ("ok", "cannot run", "as Inductor") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
