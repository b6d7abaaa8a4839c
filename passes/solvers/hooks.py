"""What may happen to the predicted x0 inside the loop: clipping and thresholding.

These are not linear, so no table holds them; `sample` takes one as its ``hook``. Arrays stay in their own namespace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hasten.errors import UsageError

Hook = Callable[[Any], Any]
"""x0 -> x0, an array of the latents' shape (B, ...)."""


def clip(limit: float = 1.0) -> Hook:
    """Keep x0 within ``-limit .. limit`` (diffusers: ``clip_sample``, ``clip_sample_range``)."""
    if not limit > 0:
        raise UsageError(f"clip: the limit is {limit:g}; it must be positive")
    return lambda x0: x0.clip(-limit, limit)


def threshold(ratio: float = 0.995, largest: float = 1.0) -> Hook:
    """Keep each sample within its own quantile, and scale it to 1 (Saharia et al., 2205.11487, dynamic thresholding).

    ``s`` is the ``ratio`` quantile of a sample's absolute values, at least 1 and at most ``largest``; x0 is kept within
    ``-s .. s`` and divided by s (diffusers: ``dynamic_thresholding_ratio``, ``sample_max_value``).
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"threshold: the ratio is {ratio:g}; a quantile goes from 0 to 1")
    if not largest >= 1 or math.isnan(largest):
        raise UsageError(f"threshold: the largest value is {largest:g}; it is at least 1")

    def hook(x0: Any) -> Any:
        size = abs(x0).reshape(len(x0), -1)
        # torch.Tensor has quantile as a method; numpy as a function.
        s = size.quantile(ratio, 1) if hasattr(size, "quantile") else np.quantile(size, ratio, axis=1)
        s = s.clip(1, largest).reshape(-1, *(1,) * (x0.ndim - 1))
        # clip takes two tensors or two arrays alike
        return x0.clip(-s, s) / s

    return hook
