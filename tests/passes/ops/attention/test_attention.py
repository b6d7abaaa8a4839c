import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.ops import attention
from hasten.passes.ops.attention import pfsm
from hasten.passes.ops.attention.select import RULES

OP = torch.ops.hasten.attention
IMPLEMENTATIONS = sorted(attention.IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def qkv(heads=4, n=9, m=13, d=8, dv=None, shared=None, dtype=torch.float32):
    kv = shared or heads
    return (
        torch.randn(2, heads, n, d).to(dtype),
        torch.randn(2, kv, m, d).to(dtype),
        torch.randn(2, kv, m, dv or d).to(dtype),
    )


def by_definition(q, k, v, mask, scale, causal):
    """Head by head, row by row, in float64."""
    y = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    repeats = q.shape[1] // k.shape[1]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = scale * (k[b, h // repeats].double() @ q[b, h, i].double())
                keep = torch.ones(k.shape[2], dtype=torch.bool)
                if mask is not None and mask.dtype == torch.bool:
                    keep &= mask[b, h, i]
                elif mask is not None:
                    scores = scores + mask[b, h, i]
                    keep &= mask[b, h, i] > -torch.inf
                if causal:
                    keep &= torch.arange(k.shape[2]) <= i
                if keep.any():
                    y[b, h, i] = torch.softmax(scores[keep], 0) @ v[b, h // repeats][keep].double()
    return y


MASKS = {
    "no mask": None,
    "bool over keys": torch.rand(2, 1, 1, 13, generator=torch.Generator().manual_seed(1)) > 0.4,
    "bool with an empty row": (torch.arange(9) != 4)[None, None, :, None].expand(1, 4, 9, 13),
    "float per head": torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(2)),
    "float matrix": torch.randn(9, 13, generator=torch.Generator().manual_seed(3)),
    "float with -inf rows": torch.zeros(1, 1, 9, 1).index_fill(2, torch.tensor([0, 3]), -torch.inf).expand(1, 1, 9, 13),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_every_mask_agrees_with_the_definition(implementation, mask, causal):
    q, k, v = qkv(shared=2)
    y = attention.attention(q, k, v, MASKS[mask], 0.3, causal, implementation=implementation)
    assert (y - by_definition(q, k, v, MASKS[mask], 0.3, causal)).abs().max() <= 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("d", "dv"), [(7, 7), (40, 40), (8, 3), (8, 40)])
@pytest.mark.parametrize("n", [1, 65])
def test_every_width_and_length(implementation, d, dv, n):
    q, k, v = qkv(n=n, m=n + 3, d=d, dv=dv)
    y = attention.attention(q, k, v, implementation=implementation)
    assert y.shape == (2, 4, n, dv)
    assert (y - attention.reference(q, k, v)).abs().max() <= 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_zero_and_negative_scales(implementation):
    q, k, v = qkv()
    for scale in (100.0, 0.0, -1.0):
        y = attention.attention(q, k, v, None, scale, implementation=implementation)
        assert (y - attention.reference(q, k, v, None, scale)).abs().max() <= 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_keys_give_zero(implementation):
    q, k, v = qkv(m=0)
    assert torch.equal(attention.attention(q, k, v, implementation=implementation), torch.zeros_like(q))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=["half", "bfloat16"])
def test_half_precision_with_float32_mask(implementation, dtype, bound):
    q, k, v = qkv(n=33, m=40, dtype=dtype)
    mask = torch.randn(33, 40)
    y, expected = (
        attention.attention(q, k, v, mask, implementation=implementation),
        attention.reference(q, k, v, mask),
    )
    assert y.dtype == dtype
    assert (y - expected).square().mean().sqrt() / expected.square().mean().sqrt() <= bound


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_with_strided_width(implementation):
    q, k, v = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in qkv())
    y = attention.attention(q, k, v, implementation=implementation)
    assert (y - attention.reference(q, k, v)).abs().max() <= 2e-6


@pytest.mark.parametrize("implementation", ["pfsm", "math"])
def test_backward(implementation):
    mask = (torch.arange(3) != 1)[None, None, :, None].expand(1, 1, 3, 4)
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 3))
    ]

    def run(q, k, v):
        return attention.attention(q, k, v, mask, implementation=implementation)

    assert torch.autograd.gradcheck(run, tensors)


def test_pfsm_tiles_heads_by_the_size_of_the_scores(monkeypatch):
    assert [pfsm.heads_at_once(n, n, 16) for n in (1024, 2048, 4096)] == [16, 4, 1]
    assert pfsm.heads_at_once(2048, 1024, 16) == 8
    q, k, v = qkv(heads=6, shared=3)
    whole = pfsm.attention(q, k, v, MASKS["no mask"], 0.3, True)
    products = []
    weighted = pfsm._weighted
    monkeypatch.setattr(pfsm, "HEAD_TILES", ((1, 2),))
    monkeypatch.setattr(pfsm, "_weighted", lambda s, v: products.append(tuple(s.shape)) or weighted(s, v))
    assert (pfsm.attention(q, k, v, None, 0.3, True) - whole).abs().max() <= 1e-6
    assert products == [(2, 2 * 9, 13)] * 3


class Module(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return OP(q, k, v, mask, 0.25, False)


@pytest.mark.parametrize(
    "dv",
    [
        pytest.param(16, id="flash"),
        pytest.param(8, id="padded", marks=pytest.mark.slow),
        pytest.param(64, id="pfsm", marks=pytest.mark.slow),
    ],
)
def test_export_keeps_one_node_and_inductor_runs_it(dv, tmp_path):
    q, k, v = qkv(d=16, dv=dv, shared=2)
    inputs, tokens = (q, k, v, torch.rand(2, 1, 1, 13) > 0.2), torch.export.Dim("tokens", max=4096)
    shapes = ({2: tokens}, None, None, None)
    program = torch.export.export(Module(), inputs, dynamic_shapes=shapes)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["hasten.attention.default"]
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "a.pt2"))
        run = torch._inductor.aoti_load_package(path)
        other = (torch.randn(2, 4, 21, 16), *inputs[1:])
        expected = attention.reference(*other, 0.25)
        assert (run(*other) - expected).abs().max() <= 2e-6
        compiled = torch.compile(Module(), fullgraph=True, dynamic=True)
        assert (compiled(*other) - expected).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("rule", "case", "expected"),
    [
        ("default", ("cpu", torch.float32, 4096, 77, 40, 40, True, 8), "sdpa"),
        ("default", ("cpu", torch.float32, None, None, 64, 32, False, 8), "sdpa"),
        ("default", ("cpu", torch.float32, 64, 64, 16, 64, False, 8), "pfsm"),
        ("default", ("cuda", torch.float16, 4096, 4096, 40, 40, False, 8), "sdpa"),
        ("default", ("cuda", torch.float16, 16384, 16384, 40, 40, True, 8), "sdpa"),
        ("default", ("cuda", torch.float16, 16384, 16384, 36, 36, True, 8), "pfsm"),
        ("default", ("cuda", torch.float16, 64, 64, 36, 36, True, 8), "sdpa"),
        ("default", ("mps", torch.float16, 64, 64, 36, 36, True, 8), "sdpa"),
        ("ml-drift", ("cuda", torch.float16, 4096, 4096, 40, 40, False, 8), "sdpa"),
        ("ml-drift", ("cuda", torch.float16, 1024, 1024, 80, 80, False, 8), "pfsm"),
        ("ml-drift", ("cuda", torch.float16, 4096, 77, 40, 40, False, 8), "pfsm"),
        ("ml-drift", ("cuda", torch.float16, 4096, 4096, 40, 40, True, 8), "pfsm"),
        ("ml-drift", ("cuda", torch.float16, 256, 256, 40, 40, False, 8), "pfsm"),
        ("ml-drift", ("cuda", torch.float16, None, 4096, 40, 40, False, 8), "pfsm"),
        ("ml-drift", ("cpu", torch.float32, 4096, 4096, 40, 40, False, 8), "pfsm"),
    ],
)
def test_selection(rule, case, expected):
    implementation, reason = attention.select(rule, *case)
    assert implementation == expected
    assert reason in [row.reason for row in RULES[rule] if row.implementation == expected]


def test_of_stable_diffusions_attentions_ml_drift_fuses_the_five_largest():
    layers = [((4096, 40), 5), ((1024, 80), 5), ((256, 160), 5), ((64, 160), 1)]
    cases = [(n, m, d) for (n, d), count in layers for m in (n, 77) for _ in range(count)]
    chosen = [attention.select("ml-drift", "cuda", "float16", n, m, d, d, False, 8)[0] for n, m, d in cases]
    assert (len(chosen), chosen.count("sdpa"), chosen.count("pfsm")) == (32, 5, 27)


def test_the_rule_is_a_keyword_of_the_python_function(monkeypatch):
    called = []
    monkeypatch.setattr(
        attention, "IMPLEMENTATIONS", {name: lambda *_, name=name: called.append(name) for name in IMPLEMENTATIONS}
    )
    q, k, v = qkv()
    attention.attention(q, k, v)
    attention.attention(q, k, v, rule="ml-drift")
    attention.attention(q, k, v, rule="ml-drift", implementation="math")
    assert called == ["sdpa", "pfsm", "math"]


Q, K = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q[0], K, K), {}, "q (4, 3, 8), k (1, 2, 5, 8), v (1, 2, 5, 8); give (batch, heads, tokens, width) each"),
        ((Q, K.repeat(2, 1, 1, 1), K), {}, "q (1, 4, 3, 8), k (2, 2, 5, 8), v (1, 2, 5, 8); "
         "the batch sizes must be equal"),
        ((Q, K[..., :4], K), {}, "q (1, 4, 3, 8), k (1, 2, 5, 4), v (1, 2, 5, 8); "
         "q and k must have the same width"),
        ((Q, K, K[:, :, :4]), {}, "q (1, 4, 3, 8), k (1, 2, 5, 8), v (1, 2, 4, 8); "
         "k and v must have the same heads and tokens"),
        ((Q[:, :3], K, K), {}, "q (1, 3, 3, 8), k (1, 2, 5, 8), v (1, 2, 5, 8); the heads of k must divide those of q"),
        ((Q, K, K, torch.ones(3, 4)), {}, "a mask of shape (3, 4) cannot be broadcast to the scores (1, 4, 3, 5)"),
        ((Q, K, K, torch.ones(3, 5).long()), {}, "the mask is torch.int64; "
         "give a bool (True = may attend) or floating (added) one"),
        ((Q, K, K), {"implementation": "spda"}, "unknown implementation 'spda'; use one of sdpa, pfsm, math. "
         "Did you mean 'sdpa'?"),
        ((Q, K, K), {"rule": "ml_drift"}, "unknown selection rule 'ml_drift'; use one of default, ml-drift. "
         "Did you mean 'ml-drift'?"),
    ],
    ids=["rank", "batch", "width", "tokens", "heads", "mask", "mask dtype", "implementation", "rule"],
)  # fmt: skip
def test_wrong_arguments_get_one_sentence(arguments, options, message):
    with pytest.raises(UsageError) as caught:
        attention.attention(*arguments, **options)
    assert str(caught.value) == f"attention: {message}"
