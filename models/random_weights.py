"""Random weights from a fixed seed, such that every output depends on every input.

diffusers leaves some layers at zero (the gates of adaLN-zero, some output projections), and a model that starts from
them computes nothing. Here every parameter is drawn anew, from a generator seeded by its name: neither the order of
construction nor the version of a package changes a value.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrite all parameters in place; returns the model.

    Matrices and kernels have unit gain (normal with variance 1 / fan-in), norms scale by about 1, biases are small.
    """
    with torch.no_grad():
        for path, owner in model.named_modules():
            norm = "Norm" in type(owner).__name__
            for name, parameter in owner.named_parameters(recurse=False):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{path}.{name}:{seed}".encode()))
                parameter.normal_(generator=generator)
                if parameter.ndim >= 2:
                    parameter.mul_(parameter[0].numel() ** -0.5)
                elif name == "bias":
                    parameter.mul_(0.05)
                elif norm:
                    parameter.mul_(0.1).add_(1)
    return model
