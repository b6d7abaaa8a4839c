"""Operations as torch counts them, and traffic by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hasten.passes.ops  # noqa: F401
from hasten.passes.cost import total
from hasten.passes.fx.flops import costs, weight_bytes
from hasten.passes.fx.graph import FxGraph


def graph_of(module, *inputs, **options):
    return FxGraph(torch.export.export(module.eval(), inputs, **options).module(check_guards=False))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x, a, b):
        y = self.up(self.conv(x)).flatten(2).transpose(1, 2)
        y = self.second(F.gelu(self.first(y)))
        return torch.baddbmm(y, y @ a, b), torch.addmm(b[0], a, b[0]), torch.einsum("bij,jk->bik", y, a)


def test_counts_what_torch_counts():
    inputs = torch.randn(2, 4, 8, 8), torch.randn(8, 8), torch.randn(2, 8, 8)
    module = Mixed()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    assert total(costs(graph_of(module, *inputs))).flops == counter.get_total_flops()


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Fused(nn.Module):
    def forward(self, q, k, v):
        return torch.ops.hasten.attention(q, k, v, None, 0.25, False)


@pytest.mark.parametrize("module", [Attention(), Fused()], ids=["sdpa", "hasten"])
def test_attention_is_two_products(module):
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 4)
    (found,) = costs(graph_of(module, q, k, v)).values()
    assert found.flops == 2 * 2 * 3 * 5 * 7 * (16 + 4)
    assert found.bytes == 4 * (q.numel() + k.numel() + v.numel() + 2 * 3 * 5 * 4)


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return torch.ops.hasten.upsample_conv2d(x, self.conv.weight, self.conv.bias)


def test_upsample_conv_is_the_convolution_of_the_large_map():
    found = costs(graph_of(Upsample(), torch.randn(1, 4, 5, 5)))["hasten.upsample_conv2d"]
    assert found.flops == 2 * 6 * 10 * 10 * 4 * 9


class Views(nn.Module):
    def forward(self, x, table, index):
        y = x.reshape(-1, 4).transpose(0, 1)[:, :2]
        return y.to(torch.float32), F.embedding(index, table), F.dropout(x, 0.5, False), y + 1


def test_views_are_free_and_tables_are_not_read_whole():
    found = costs(graph_of(Views(), torch.randn(8, 4), torch.randn(1000, 4), torch.tensor([1, 2])))
    assert {n: c.bytes for n, c in found.items() if c.bytes} == {
        "embedding": 2 * (2 * 4 * 4) + 2 * 8,
        "add": 2 * (4 * 2 * 4),
    }


def test_symbolic_sizes_count_as_the_example():
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = graph_of(nn.Linear(4, 6), torch.randn(5, 4), dynamic_shapes=({0: batch},))
    assert total(costs(graph)).flops == 2 * 5 * 4 * 6


def test_weights_shared_by_two_layers_count_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert weight_bytes(nn.Sequential(first, second)) == 4 * (16 + 4 + 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = F.interpolate(F.silu(self.norm(x)), scale_factor=2.0, mode="nearest")
        tokens = self.conv(y).flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


def test_a_rewrite_computes_as_much_and_moves_less():
    from hasten.backends.optimize import optimize

    program = torch.export.export(Block().eval(), (torch.randn(1, 8, 4, 4),))
    rewritten, report = optimize(program, expect={"group-norm-act": 1, "attention": 1, "upsample-conv": 1})
    before, after = (total(costs(FxGraph(g))) for g in (program.module(check_guards=False), rewritten))
    assert report["group-norm-act"].hits == 1
    assert after.flops == before.flops
    assert after.bytes < before.bytes
