"""What a loop's body and a branch return is memory of its own in every place, also where two places hold one value.

A caller of AOTInductor's C++ takes each result of a body or a branch over from the variable that holds it. Where two
results are copies of one value, Inductor (torch 2.13) drops both copies: it looks whether a copy is dropped beside
another result of the same memory, but at the results as they were before it dropped any. The second place then takes
over what the first one has taken, and the run ends in a segmentation fault. Step caches of two calls a row return such
copies, where both calls look at one signal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import fx

logger = logging.getLogger(__name__)


@contextmanager
def own_outputs() -> Iterator[None]:
    """Copy what a graph that Inductor compiles meanwhile returns twice."""
    from torch._inductor.fx_passes import post_grad

    if not hasattr(post_grad, "remove_noop_ops"):
        logger.warning(
            "torch %s has no post_grad.remove_noop_ops: loops and branches that return one value twice are left to it",
            torch.__version__,
        )
        yield
        return
    remove = post_grad.remove_noop_ops

    def remove_and_separate(graph: fx.Graph) -> None:
        remove(graph)
        separate(graph)

    with patch.object(post_grad, "remove_noop_ops", remove_and_separate):
        yield


def separate(graph: fx.Graph) -> None:
    """Let every tensor that ``graph`` returns have memory that none before it has; values must have fakes."""
    (output,) = graph.find_nodes(op="output")
    if not isinstance(output.args[0], (tuple, list)):
        return
    results, seen = list(output.args[0]), set[int]()
    for place, node in enumerate(results):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            continue
        memory = value.untyped_storage()._cdata
        if memory in seen:
            with graph.inserting_before(output):
                results[place] = graph.call_function(torch.ops.aten.clone.default, (node,))
            results[place].meta |= {**node.meta, "val": value.clone()}
        seen.add(memory)
    output.args = (type(output.args[0])(results),)
