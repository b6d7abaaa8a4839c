"""Picard sampling over processes: each evaluates its share of the window, and all take the same decisions.

Every process of a `torch.distributed` group runs the same loop on the same latents; only the network's calls are
shared out. So there is no coordinator, and a sweep costs one exchange of predictions, of the window's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hasten.errors import HastenError, UsageError
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.picard_loop import Picard
from hasten.passes.solvers.table import SolverTable

Network = Callable[..., torch.Tensor]


def picard_processes(
    denoise: Network | Sequence[Network],
    table: SolverTable,
    x: torch.Tensor,
    *,
    window: int,
    tolerance: float,
    noise: Sequence[torch.Tensor] | None = None,
    conditions: Sequence[torch.Tensor] = (),
    timeout: float = 300.0,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Picard:
    """Do what `picard` does in every process of ``group`` (default: all), each with ``window / processes`` rows a call.

    Every process calls this alike and has the whole result. ``x`` and ``noise`` of the first process count, so seeds
    may differ; ``options`` go to `picard`. ``conditions`` (B, ...), one for each of x's samples, go to the network
    behind its other inputs, as many of them as a call has samples. Predictions travel in x's type, or float32 where
    that is narrower. ``timeout``: seconds to wait for the others in each sweep, the network's own differences included.
    `HastenError` where a process is lost or late, `UsageError` where there is no group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError(
            "Picard over processes needs a process group and there is none here; start with torchrun, and call "
            "torch.distributed.init_process_group('gloo') first"
        )
    if not 0 < timeout < math.inf:
        raise UsageError(f"Picard over processes: the timeout is {timeout:g} s; it is positive and finite")
    if not isinstance(x, torch.Tensor):
        raise UsageError(f"Picard over processes: x is a {type(x).__name__}; it must be a torch.Tensor")
    networks = [denoise] if callable(denoise) else list(denoise)
    first = dist.get_global_rank(group, 0) if group is not None else 0
    x, *kicks = (array.detach().clone().contiguous() for array in (x, *(noise if noise is not None else ())))
    for array in (x, *kicks):
        wait(dist.broadcast(array, first, group=group, async_op=True), timeout, group)
    return picard(
        [_shared(network, len(x), conditions, timeout, group) for network in networks],
        table,
        x,
        window=window,
        tolerance=tolerance,
        noise=None if noise is None else kicks,
        **options,
    )


def _shared(
    network: Network,
    samples: int,
    conditions: Sequence[torch.Tensor],
    timeout: float,
    group: dist.ProcessGroup | None,
) -> Network:
    """Evaluate this process's part of a batch of rows of ``samples`` each, and gather everyone's."""
    processes, mine = dist.get_world_size(group), dist.get_rank(group)

    def shared(*given: torch.Tensor) -> torch.Tensor:
        y = given[0]
        share = -(-len(y) // processes)  # the last processes may have less to do, or nothing
        rows = [torch.cat([c] * (len(y) // samples)) for c in conditions]
        part = [array[mine * share : (mine + 1) * share] for array in (*given, *rows)]
        wide = torch.promote_types(y.dtype, torch.float32)
        sent = torch.zeros((share, *y.shape[1:]), dtype=wide, device=y.device)
        if len(part[0]):
            answer = network(*part)
            if answer.shape != part[0].shape:
                raise UsageError(
                    f"picard: the network was given {tuple(part[0].shape)} and answered {tuple(answer.shape)}; it must "
                    "take any batch and answer in its shape"
                )
            sent[: len(answer)] = answer
        got = [torch.empty_like(sent) for _ in range(processes)]
        wait(dist.all_gather(got, sent, group=group, async_op=True), timeout, group)
        return torch.cat(got)[: len(y)]

    return shared


def wait(work: Any, timeout: float, group: dist.ProcessGroup | None) -> None:
    """Wait for an exchange of a Picard run; `HastenError` where another process is lost or late."""
    try:
        work.wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        here = f"Picard over {dist.get_world_size(group)} processes: process {dist.get_rank(group)}"
        if "timed out" in str(error).lower():
            raise HastenError(
                f"{here} had no answer from another within {timeout:g} s; one is lost or slow: start them all again, "
                "or raise timeout="
            ) from error
        raise HastenError(
            f"{here} lost the connection to another; that one's own output says why: start them all again"
        ) from error
