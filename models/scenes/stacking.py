"""Growing a transformer in depth while it trains: new blocks go between the old ones and begin as the identity.

A shallow transformer trains in less time, and its blocks are a good start for a deep one's (progressive stacking, Gong
et al., ICML 2019). Each new block is a copy of the one before it whose branches end in zeros, so that the deep network
computes what the shallow one did (as in bert2BERT's and LEMON's function-preserving expansion, Chen et al., 2110.07143;
Wang et al., 2310.07999); queries, keys and hidden layers that differ from block to block keep its gradients from zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_BLOCK = re.compile(r"(?P<list>(?:\w+\.)*\w*blocks)\.(?P<index>\d+)\.(?P<rest>.+)")
_LAST_OF_A_BRANCH = re.compile(r"(attn\d\.to_out\.0|ff\.net\.2)\.(weight|bias)")


def depth(weights: Mapping[str, torch.Tensor]) -> int:
    """Count the blocks of the longest list of blocks in a state dict."""
    return max((int(found["index"]) + 1 for key in weights if (found := _BLOCK.fullmatch(key))), default=0)


def stacked(weights: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Return the state dict of the same network with ``layers`` blocks in each list, which computes the same.

    Raises ValueError unless ``layers`` is a multiple of the blocks there are.
    """
    times, rest = divmod(layers, max(depth(weights), 1))
    if rest or not times:
        raise ValueError(
            f"a network of {depth(weights)} blocks was to be stacked to {layers}: only a multiple of them can be"
        )
    grown = {}
    for key, value in weights.items():
        if (found := _BLOCK.fullmatch(key)) is None:
            grown[key] = value.clone()
            continue
        for copy in range(times):
            new = value.clone()
            if copy and _LAST_OF_A_BRANCH.fullmatch(found["rest"]):
                new.zero_()
            grown[f"{found['list']}.{int(found['index']) * times + copy}.{found['rest']}"] = new
    return grown
