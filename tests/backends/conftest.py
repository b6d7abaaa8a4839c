"""A small net with everything that the backends must carry, and one compiled engine of it for all tests."""

import logging

import pytest
import torch
import torch.nn.functional as F
from dynamo_block import Block
from in_eager import clear
from torch import nn

from hasten.backends.build import build


class Tiny(nn.Module):
    """conv, GroupNorm, SiLU, conv, attention: (B, 4, S, S) and (B,) -> (B, S*S, 64) and (B, 64, S, S).

    64 channels in 32 groups and heads 32 wide: the smallest sizes that TensorRT-RTX fuses as it does real ones.
    """

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 64, 3, padding=1)
        self.norm = nn.GroupNorm(32, 64)
        self.conv_out = nn.Conv2d(64, 64, 3, padding=1)
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)

    def forward(self, sample, timestep, scale=2.0, return_dict=True):
        hidden = self.conv_in(sample) + timestep[:, None, None, None]
        hidden = self.conv_out(F.silu(self.norm(hidden)))
        tokens = hidden.flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result = (self.out(attended) * scale, hidden)
        return {"sample": result[0], "hidden": result[1]} if return_dict else result


@pytest.fixture(scope="session")
def tiny():
    torch.manual_seed(0)
    return Tiny().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def examples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.rand(2, generator=generator)


@pytest.fixture(scope="session")
def dynamic_shapes():
    batch = torch.export.Dim("batch", min=1, max=8)
    size = torch.export.Dim("size", min=8, max=32)
    return {"sample": {0: batch, 2: size}, "timestep": {0: batch}}


@pytest.fixture(scope="session")
def aoti_engine(tiny, examples, dynamic_shapes, tmp_path_factory):
    """Compiled once for the whole session: it takes ten seconds and more."""
    out = tmp_path_factory.mktemp("engines") / "tiny"
    return build(tiny, target="aoti:cpu", out=out, example_inputs=examples, dynamic_shapes=dynamic_shapes)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval().requires_grad_(False)


@pytest.fixture
def cleared_dynamo():
    clear()


@pytest.fixture(scope="module")
def quiet_dynamo():
    """Dynamo traces at level DEBUG, which pytest would gather for every failing test."""
    logger = logging.getLogger("torch.__trace")
    propagates, logger.propagate = logger.propagate, False
    yield
    logger.propagate = propagates
