"""Unit noise from a seed and a counter, by integer arithmetic that every runtime does alike.

Element i of call n is a block cipher's output for the number i under a key made of seed and n, so that nothing is
carried from call to call, and noise may be made again from anywhere in a run. The cipher is MiMC (Albrecht et al.,
2016/492 of the IACR's archive): ``x <- (x + key + constant)^5 modulo p``, over p = 2^31 - 1, whose rounds need ``+``,
``*`` and ``%`` of 64-bit integers only; TensorRT has neither exclusive or nor shifts, which Philox and Threefry are
made of. This is noise for pictures, not cryptography: rounds are few.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PRIME = (1 << 31) - 1
"""x -> x^5 is a permutation modulo it, for 5 does not divide p - 1; products of two residues stay below 2^63."""
ROUNDS = 6
_CONSTANTS = tuple(int(math.modf(math.sqrt(n))[0] * PRIME) for n in (2, 3, 5, 7, 11, 13))
"""Nothing up the sleeve: fractional parts of square roots."""


def normal(seed: Tensor, counter: Tensor, like: Tensor) -> Tensor:
    """Draw unit normal noise of ``like``'s shape, float32; ``seed`` and ``counter`` are () int64, seed at least 0.

    Two uniform numbers make one normal number (Box & Muller, 1958).
    """
    key = _permuted(seed % PRIME, seed // PRIME % PRIME)
    key = _permuted(counter, key)
    count = like.numel()
    index = torch.arange(2 * count, dtype=torch.int64, device=like.device)
    uniform = (_permuted(index, key).to(torch.float32) + 0.5) * (1 / PRIME)
    radius, angle = uniform[:count], uniform[count:]
    # rounding to float32 may reach 1, whose logarithm is 0: still a number
    drawn = (-2 * radius.log()).clamp(min=0).sqrt() * (2 * math.pi * angle).cos()
    return drawn.reshape(like.shape)


def _permuted(x: Tensor, key: Tensor) -> Tensor:
    for constant in _CONSTANTS[:ROUNDS]:
        base = (x + key + constant) % PRIME
        # `square` reads its operand once: as a product, Inductor would write all that is before it twice, every round
        fourth = (base.square() % PRIME).square() % PRIME
        x = fourth * base % PRIME
    return (x + key) % PRIME
