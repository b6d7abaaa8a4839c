"""How alike pictures are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def psnr(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]; None where they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(4 / error) if error else None


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity (Wang et al., 2004) of pictures in [-1, 1], 7x7 uniform windows, mean over all."""
    from torch.nn import functional as F

    x, y = (t.double().flatten(0, -4) for t in (a, b))
    k = 7
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def mean(t: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(t, k, stride=1)

    mx, my = mean(x), mean(y)
    unbiased = k * k / (k * k - 1)
    vx, vy, cov = (unbiased * (mean(p) - q) for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
    value = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(value.mean())
