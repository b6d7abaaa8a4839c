"""``torch.compile(model, backend="hasten")``: the exact rules on Dynamo's graph, then Inductor.

Options are ours (`OPTIONS`) or Inductor's own; anything else is refused with the nearest valid key. ``mode`` means
what it means to Inductor. Graphs that need gradients go to Inductor untouched and are counted, as are graphs on which
a pass failed (``options={"strict": True}`` raises instead).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from hasten import __version__
from hasten.errors import HastenError, UsageError, nearest
from hasten.passes.rule import Report

logger = logging.getLogger(__name__)

OPTIONS = {
    "passes": "names of the passes to run, in order, instead of the default ones",
    "skip": "names of passes to leave out",
    "fuel": "stop after this many rewrites in each graph",
    "expect": "rule -> number of sites that the graph must have",
    "verify": "structure (default) or sites: compare every rewrite with what it replaces",
    "strict": "raise where a pass fails or a rewrite does not verify, instead of compiling the graph as it was",
    "tune": "off, cached (default) or on: whether implementations are chosen by measurement",
    "memory_budget": "bytes that transformed weights and the largest workspace may take",
    "max_error": "relative rms error that a layer may be expected to have",
    "strict_nan": "no implementation that spreads a NaN or an infinity further",
    "half": "implementations that round more in float16 too",
    "cache": "a step cache, such as teacache:threshold=0.25,model=flux; an approximation",
    "cache_form": "conditional (a branch in the graph) or straight (programs without one)",
    "cache_time": "descending (default) or ascending: how the timestep goes in a run",
    "region": "FIRST:LAST, the blocks that a reused step leaves out",
    "dump": "a folder for the graph after every pass, in a folder of its own for each graph",
}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

counters: Counter[str] = Counter()
"""``compiled``, ``training`` (graphs passed through), ``failed`` (a pass failed; the graph was compiled as it was)."""

reports: deque[Report] = deque(maxlen=64)
"""What was done to the most recent graphs, newest last."""


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite ``gm`` and compile it with Inductor; the backend behind ``torch.compile(model, backend="hasten")``.

    Raises `UsageError` for unknown options and modes, `ExpectationError` where ``expect`` is not met.
    """
    from torch._inductor.compile_fx import compile_fx

    from hasten.backends.onednn_linear import onednn_linear

    compiled: Callable[..., Any]
    ours, inductor = split_options(mode, options)
    if _trains(gm, example_inputs):
        compiled = compile_fx(gm, list(example_inputs), config_patches=inductor)
        counters["training"] += 1
        logger.info("a graph that needs gradients was passed to Inductor as it is (%d so far)", counters["training"])
        return compiled
    _rewrite(gm, ours)
    patches = {**inductor, "post_grad_custom_pre_pass": _Key(inductor.get("post_grad_custom_pre_pass"))}

    def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with onednn_linear():
            return compile_fx(module, inputs, config_patches=patches)

    try:
        if "cache" in ours:
            from hasten.backends.dynamo_cache import compile_cached

            compiled = compile_cached(gm, example_inputs, ours, reports[-1], compile_graph)
        else:
            compiled = compile_graph(gm, list(example_inputs))
    except Exception:  # Dynamo may be asking for the same graph again, with a number in it made symbolic
        reports.pop()
        raise
    counters["compiled"] += 1
    return compiled


def split_options(mode: str | None, options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options and Inductor's, checked; ``mode`` becomes Inductor options."""
    if mode is not None and mode not in MODES:
        raise UsageError(f"mode {mode!r} is none of {', '.join(MODES)}.{nearest(mode, MODES)}")
    inductor = dict(torch._inductor.list_mode_options(mode)) if mode not in (None, "default") else {}
    ours: dict[str, Any] = {}
    valid = torch._inductor.list_options()
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name in OPTIONS:
            ours[name] = _checked(name, value)
        elif name in valid:
            inductor[name] = value
        else:
            raise UsageError(
                f"options: no option {key!r}; ours are {', '.join(OPTIONS)}, and Inductor's are taken as well."
                f"{nearest(name, [*OPTIONS, *valid])}"
            )
    return ours, inductor


def _checked(name: str, value: Any) -> Any:
    """An option of ours in the form that the pipeline takes, or `UsageError`."""
    if name == "fuel" and not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        raise UsageError(f"options: fuel is {value!r}; give a number of rewrites from 0 up")
    if name == "expect" and not isinstance(value, Mapping):
        raise UsageError(f"options: expect is {value!r}; give a dict such as {{'attention': 16}}")
    if name in ("passes", "skip"):
        listed = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        if not listed and not isinstance(value, str):
            raise UsageError(f"options: {name} is {value!r}; give names, as a list or with commas between them")
        return ",".join(value) if listed else value
    return value


def _trains(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    tensors = (i for i in (*example_inputs, *gm.parameters()) if isinstance(i, torch.Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _rewrite(gm: fx.GraphModule, options: dict[str, Any]) -> None:
    from hasten.backends.choosing import from_options
    from hasten.backends.optimize import VERIFY, run_pipeline
    from hasten.backends.target import parse_target
    from hasten.passes.fx.graph import FxGraph
    from hasten.passes.fx.site_check import SiteCheck

    verify = options.get("verify", "structure")
    if verify not in VERIFY[:2]:
        raise UsageError(f"verify: {verify!r} is none of {', '.join(VERIFY[:2])}")
    choosing = from_options(options)
    device = _device(gm)
    report = Report(source="torch.compile", ir="fx", target=f"inductor:{device}")
    before = [(inner, _copy(inner.graph)) for inner in gm.modules() if isinstance(inner, fx.GraphModule)]
    try:
        run_pipeline(
            FxGraph(gm),
            "fx",
            parse_target(report.target),
            report,
            passes=options.get("passes"),
            fuel=options.get("fuel"),
            skip=[name for name in options.get("skip", "").split(",") if name],
            verify=SiteCheck() if verify == "sites" else None,
            dump=_unused(options["dump"]) if "dump" in options else None,
            limits=choosing.limits(),
            chooser=choosing.chooser(),
        )
    except UsageError:
        raise
    except Exception as error:
        if options.get("strict"):
            raise
        counters["failed"] += 1
        logger.warning("a pass failed and the graph is compiled as it was: %s", error)
        for inner, graph in before:
            inner.graph = graph
        report.notes.append(f"not rewritten: {error}")
    reports.append(report)
    if options.get("strict") and report.reverted:
        rule, site = report.reverted[0]
        raise HastenError(f"{rule} at {site.where} does not verify: {site.reason}")
    report.expect(options.get("expect") or {})


def _unused(folder: str | Path) -> Path:
    """``graph-0``, ``graph-1``, … in ``folder``: a model may have several graphs, and be compiled again."""
    return next(path for number in itertools.count() if not (path := Path(folder) / f"graph-{number}").exists())


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy that AOTAutograd takes: it looks for what Dynamo wrote on the inputs."""
    copied = copy.deepcopy(graph)
    for new, old in zip(copied.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder"), strict=True):
        if (source := getattr(old, "_dynamo_source", None)) is not None:
            new._dynamo_source = source
    return copied


def _device(gm: fx.GraphModule) -> str:
    """Where the graph computes: on a GPU if any value is there, since times and masks often stay on the CPU."""
    values = (node.meta.get("val", node.meta.get("example_value")) for node in gm.graph.nodes)
    kinds = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return "cuda" if "cuda" in kinds else "cpu"


@cache
def fingerprint() -> bytes:
    """A hash of our version and of every source file that can change what a rewritten graph computes."""
    digest = hashlib.sha256(__version__.encode())
    root = Path(__file__).resolve().parent.parent
    for folder in ("passes", "backends"):
        for file in sorted(p for kind in ("*.py", "*.cpp", "*.h") for p in (root / folder).rglob(kind)):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.digest()


class _Key(CustomGraphPass):
    """Changes nothing; its ``uuid`` makes Inductor's caches miss when our files change.

    Calls the user's pass, if any.
    """

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def __call__(self, graph: fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        inner = self.inner.uuid() if isinstance(self.inner, CustomGraphPass) else None
        if self.inner is not None and inner is None:
            return None  # the user's pass cannot be told from another: no caching
        return (fingerprint(), inner)
