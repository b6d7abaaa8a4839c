"""What surrounds a pattern may forbid a rewrite: in-place calls, autocast regions, layouts, types, broadcasting.

Each case says which rules fire; the result, and what the call leaves in its inputs, must be eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from in_eager import BACKENDS, clear, hits, relative_error, tensors
from torch import Tensor


@dataclass(frozen=True)
class Case:
    function: Callable[..., object]
    inputs: tuple[Tensor, ...]
    hits: dict[str, int]
    tolerance: float


CASES: dict[str, Case] = {}


def case(*inputs: Tensor, tolerance: float = 1e-5, **fired: int) -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        CASES[function.__name__] = Case(function, inputs, {k.replace("_", "-"): v for k, v in fired.items()}, tolerance)
        return function

    return add


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, B = draw(2, 8, 6, 6), draw(8, seed=1), draw(8, seed=2)
KERNEL = draw(8, 8, 3, 3, seed=3)
Q, K, V = draw(2, 2, 5, 8, seed=4), draw(2, 2, 7, 8, seed=5), draw(2, 2, 7, 8, seed=6)
GATED = draw(2, 3, 8, seed=7)


def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x, 4, w, b)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


# In-place calls between the parts of a pattern


@case(X, W, B, group_norm_act=1)
def silu_in_place(x, w, b):
    return F.silu(norm(x, w, b), inplace=True)


@case(X, W, B, group_norm_act=1)
def silu_in_place_and_its_input_read(x, w, b):
    y = norm(x, w, b)
    return F.silu(y, inplace=True) + y


@case(X, W, B, group_norm_act=1)
def silu_in_place_by_position(x, w, b):
    y = norm(x, w, b)
    F.silu(y, True)
    return F.gelu(y)


@case(X, W, B, group_norm_act=1)
def add_between_norm_and_activation(x, w, b):
    y = norm(x, w, b)
    y.add_(1)
    return F.silu(y)


@case(X, W, B, group_norm_act=1)
def out_between_norm_and_activation(x, w, b):
    y = norm(x, w, b)
    torch.mul(y, 2, out=y)
    return F.silu(y)


@case(X, W, B, group_norm_act=1)
def assignment_between_norm_and_activation(x, w, b):
    y = norm(x, w, b)
    y[:, 0] = 0
    return F.silu(y)


@case(X, W, B, group_norm_act=1)
def input_changed_between_norm_and_activation(x, w, b):
    y = norm(x, w, b)
    x.add_(1)
    return F.silu(y) + x


@case(X, W, B, group_norm_act=1)
def input_changed_through_a_view(x, w, b):
    flat = x.view(2, -1)
    y = norm(x, w, b)
    flat.mul_(2)
    return F.silu(y)


@case(X, W, B, group_norm_act=1)
def weight_changed_between_norm_and_activation(x, w, b):
    y = norm(x, w, b)
    w.mul_(3)
    return F.silu(y)


@case(X, W, B, group_norm_act=1)
def result_changed_afterwards(x, w, b):
    y = norm(x, w, b)
    z = F.silu(y)
    z += 1
    return z, y


@case(X, W, B, group_norm_act=1)
def half_of_the_result_activated(x, w, b):
    y = norm(x, w, b)
    y[:, :4] = F.silu(y[:, :4])
    return y


@case(X, W, B, group_norm_act=1, fold_conv=1)
def input_changed_before_the_item_is_taken(x, w, b):
    parts = torch.native_group_norm(x, w, b, 2, 8, 36, 4, 1e-5)
    x.add_(1)
    return F.silu(parts[0] * 1)


@case(X)
def operand_of_gelu_changed(x):
    half = x * 0.5
    one = torch.erf(x * 2**-0.5) + 1
    x.add_(1)
    return half * one


@case(GATED)
def halves_changed_between_gelu_and_product(x):
    value, gate = x.chunk(2, -1)
    gate = F.gelu(gate)
    x.add_(1)
    return value * gate


@case(GATED)
def product_in_place(x):
    value, gate = x.chunk(2, -1)
    value.mul_(F.gelu(gate))
    return value


@case(X, KERNEL)
def map_changed_after_upsampling(x, kernel):
    y = F.interpolate(x, scale_factor=2.0, mode="nearest")
    x.zero_()
    return F.conv2d(y, kernel, padding=1)


@case(X, KERNEL)
def upsampled_map_changed(x, kernel):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest").relu_(), kernel, padding=1)


@case(Q, K, V)
def scores_scaled_in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores *= 0.3
    return scores.softmax(-1) @ v


@case(Q, K, V)
def scores_masked_in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores.masked_fill_(torch.ones(5, 7, dtype=torch.bool).triu(2), float("-inf"))
    return scores.softmax(-1) @ v


@case(Q, K, V)
def query_changed_after_the_first_product(q, k, v):
    scores = q @ k.transpose(-2, -1)
    q.zero_()
    return scores.softmax(-1) @ v


@case(Q, K, V)
def query_changed_behind_a_copy(q, k, v):
    copied = q.clone()
    q.zero_()
    return attend(copied, k, v)


@case(Q, K, V)
def query_changed_behind_a_scale(q, k, v):
    scaled = q * 0.3
    q.zero_()
    return attend(scaled, k, v)


@case(Q, K, V)
def values_changed_behind_a_copy(q, k, v):
    copied = v.clone()
    v.zero_()
    return attend(q, k, copied)


@case(Q.repeat(1, 2, 1, 1), K, V)
def keys_changed_behind_a_repetition(q, k, v):
    k2, v2 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    k.zero_()
    return attend(q, k2, v2)


@case(Q, K, V)
def keys_changed_behind_merged_heads(q, k, v):
    copied = k.reshape(4, 7, 8).clone()
    k.mul_(2)
    return attend(q.reshape(4, 5, 8), copied, v.reshape(4, 7, 8)).reshape(q.shape)


@case(X, W, B, group_norm_act=1)
def vmap_is_left_in_time(x, w, b):
    """Nothing reads the calls that enter and leave a vmap."""
    return torch.vmap(lambda row: row * 2)(F.silu(norm(x, w, b)))


# Values that look constant and are written to


@case(Q, K, V, attention=1)
def mask_assigned(q, k, v):
    mask = torch.zeros(5, 7)
    mask[:, 3:] = float("-inf")
    return (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v


@case(Q, K, V, attention=1)
def mask_filled(q, k, v):
    mask = torch.zeros(5, 7)
    mask.masked_fill_(torch.ones(5, 7, dtype=torch.bool).triu(1), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@case(Q, K, V, attention=1)
def mask_changed_through_a_view(q, k, v):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask.view(-1)[3:9] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@case(Q, K, V, attention=1)
def mask_or_in_place(q, k, v):
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask |= torch.ones(5, 7, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@case(Q, K, V, attention=1)
def addend_of_baddbmm_filled(q, k, v):
    addend = torch.empty(4, 5, 7).fill_(2.0)
    addend[:, :, 0] = 0
    scores = torch.baddbmm(addend, q.reshape(4, 5, 8), k.reshape(4, 7, 8).transpose(1, 2), beta=1, alpha=0.3)
    return scores.softmax(-1) @ v.reshape(4, 7, 8)


@case(X)
def factor_of_gelu_changed(x):
    half = torch.tensor(0.5)
    half.mul_(2)
    return x * half * (1 + torch.erf(x * 2**-0.5))


@case(X, W, B, group_norm_act=1)
def one_of_silu_changed(x, w, b):
    one = torch.ones(())
    one.add_(1)
    y = norm(x, w, b)
    return y / (one + torch.exp(-y))


# Autocast regions

BF16 = 2e-2


@case(Q, K, V, tolerance=BF16, attention=1)
def attention_in_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return attend(q, k, v)


@case(Q, K, V, tolerance=BF16)
def autocast_ends_inside_attention(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v.to(scores.dtype)


@case(Q, K, V, tolerance=BF16)
def autocast_begins_inside_attention(q, k, v):
    scores = q @ k.transpose(-2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        return scores.softmax(-1) @ v


@case(X, KERNEL, W, B, tolerance=BF16, group_norm_act=2, upsample_conv=1)
def convolutions_in_autocast(x, kernel, w, b):
    with torch.autocast("cpu", torch.bfloat16):
        y = F.silu(norm(F.conv2d(x, kernel, padding=1), w, b))
        up = F.conv2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), kernel, padding=1)
        return F.silu(norm(up, w, b))


@case(GATED, draw(16, 8), tolerance=BF16, geglu=1)
def autocast_switched_off_inside(x, weight):
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight)
        with torch.autocast("cpu", enabled=False):
            value, gate = y.float().chunk(2, -1)
            return value * F.gelu(gate)


# Types: nothing is computed in fewer bits than it was


@case(Q.bfloat16(), K, V, attention=1)
def narrow_query_wide_keys(q, k, v):
    return attend(q.float(), k, v)


@case(Q.bfloat16(), K.bfloat16(), V.bfloat16(), attention=1)
def everything_widened_first(q, k, v):
    return attend(q.float(), k.float(), v.float())


@case(Q.bfloat16(), K.bfloat16(), V, tolerance=BF16, attention=1)
def wide_values(q, k, v):
    """Eager rounds the scores, which the fused operator does not."""
    return (q @ k.transpose(-2, -1)).float().softmax(-1) @ v


# Layouts: what reads a result may depend on how it lies in memory


@case(X.transpose(2, 3), W, B, group_norm_act=1)
def view_of_a_norm_of_a_transposed_map(x, w, b):
    return F.silu(norm(x, w, b)).view(2, 8, 36)


@case(draw(2, 36, 8).transpose(1, 2), W, B, group_norm_act=1)
def view_of_a_norm_of_tokens(x, w, b):
    return F.silu(norm(x, w, b)).view(2, -1)


@case(X.to(memory_format=torch.channels_last), W, B, group_norm_act=1)
def view_of_a_norm_in_channels_last(x, w, b):
    return F.silu(norm(x, w, b)).permute(0, 2, 3, 1).view(2, 36, 8)


@case(Q, K, V, attention=1)
def view_of_attention(q, k, v):
    return attend(q, k, v).view(4, 5, 8)


@case(Q, K, V, attention=1)
def written_view_of_attention(q, k, v):
    result = attend(q, k, v)
    result.view(4, 5, 8)[0] = 1
    return result


@case(X, KERNEL, upsample_conv=1)
def view_of_upsampling(x, kernel):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), kernel, padding=1).view(2, 8, 144)


# Broadcasting: products and factors may enlarge what the fused operator takes as it is


@case(Q[:1], K, V)
def one_query_for_the_batch(q, k, v):
    return attend(q, k, v)


@case(Q, K[:1], V[:1])
def one_key_for_the_batch(q, k, v):
    return attend(q, k, v)


@case(Q, K, V[:1])
def one_value_for_the_batch(q, k, v):
    return attend(q, k, v)


@case(Q[:, :1], K, V)
def one_query_head(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@case(Q, K[:, :1], V[:, :1], attention=1)
def one_key_head(q, k, v):
    return attend(q, k, v)


@case(Q[None], K[None], V[None])
def five_axes(q, k, v):
    return attend(q, k, v)


@case(X[:1], draw(2, 8, 1, 1), draw(2, 8, 1, 1, seed=1), group_norm_act=1)
def scale_that_enlarges_the_batch(x, scale, shift):
    return F.silu(F.group_norm(x, 4) * (1 + scale) + shift)


@case(X, draw(2, 8, 6, 1), draw(2, 8, 1, 1, seed=1), group_norm_act=1)
def scale_that_varies_over_the_map(x, scale, shift):
    return F.silu(F.group_norm(x, 4) * (1 + scale) + shift)


@case(X, draw(8, 1, 1), draw(1, 8, 1, 1, seed=1), group_norm_act=1)
def scale_of_the_whole_batch(x, scale, shift):
    return F.silu(F.group_norm(x, 4) * (1 + scale) + shift)


@case(X[:0], group_norm_act=1)
def nothing_to_normalise(x):
    return F.silu(F.group_norm(x, 4))


@case(Q, K[:, :, :0], V[:, :, :0], attention=1)
def nothing_to_attend_to(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_nothing_is_left_of_an_activation_in_place() -> None:
    from hasten.backends import dynamo

    made = CASES["silu_in_place"]
    clear()
    with torch.no_grad():
        torch.compile(made.function, backend=BACKENDS["rewritten"])(*made.inputs)
    assert dynamo.reports[0].ops_after == {"hasten.group_norm_act": 1}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_is_equal_to_eager(name: str, backend: str) -> None:
    made = CASES[name]
    clear()
    ours, theirs = (tuple(t.clone(memory_format=torch.preserve_format) for t in made.inputs) for _ in range(2))
    with torch.no_grad():
        want = tensors(made.function(*theirs))
        got = tensors(torch.compile(made.function, backend=BACKENDS[backend], fullgraph=True)(*ours))
    assert relative_error(want, got) <= made.tolerance
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert hits() == made.hits


def test_a_float32_norm_of_a_half_precision_map_is_computed_in_float32() -> None:
    """Autocast on a GPU runs group_norm in float32: the graph says so only in the result's type."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hasten.passes.fx.view import FxView
    from hasten.passes.rule import apply
    from hasten.passes.rules.group_norm_act import GROUP_NORM_ACT

    graph, mode = torch.fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    normed = graph.call_function(torch.nn.functional.group_norm, (x, 4))
    graph.output(graph.call_function(torch.nn.functional.silu, (normed,)))
    for node, dtype in zip(graph.nodes, (torch.bfloat16, torch.float32, torch.float32), strict=False):
        node.meta["example_value"] = mode.from_tensor(X.to(dtype))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert apply(GROUP_NORM_ACT, FxView(module)).hits == 1
    module.recompile()
    narrow = X.bfloat16()
    got = module(narrow)
    assert got.dtype == torch.float32
    assert relative_error([F.silu(F.group_norm(narrow.float(), 4))], [got]) < 1e-6
