"""``torch.compile(model, backend="hasten")``: the entry point, its options, and what becomes of each kind of graph.

Inductor compiles for real where the test is about Inductor; elsewhere the rewritten graph runs in eager (`in_eager`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dynamo_block import BLOCK_HITS, Block, X, draw, spelled_gelu
from in_eager import clear, hits, relative_error, rewritten, traced
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from hasten.backends import dynamo
from hasten.errors import ExpectationError, HastenError, UsageError
from hasten.passes.rules import gelu as gelu_rule

pytestmark = pytest.mark.usefixtures("cleared_dynamo", "quiet_dynamo")


def refusal(function, kind: type[Exception], *args, options=None, mode=None) -> str:
    """The message of the error that compiling ends with; Dynamo wraps it and keeps it."""
    compiled = torch.compile(function, backend="hasten", options=options, mode=mode)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(*args)
    assert type(caught.value.inner_exception) is kind
    assert str(caught.value.inner_exception) in str(caught.value)
    return str(caught.value.inner_exception)


# The entry point


def test_is_listed_and_works_without_an_import() -> None:
    script = (
        "import torch, sys; assert 'hasten' in torch._dynamo.list_backends(), torch._dynamo.list_backends()\n"
        "assert not any(m.startswith('hasten') for m in sys.modules)\n"
        "norm = torch.nn.GroupNorm(2, 4).requires_grad_(False)\n"
        "f = lambda x: torch.nn.functional.silu(norm(x))\n"
        "x = torch.randn(1, 4, 3, 3)\n"
        "torch.testing.assert_close(torch.compile(f, backend='hasten')(x), f(x))\n"
        "from hasten.backends.dynamo import reports\n"
        "print(reports[0]['group-norm-act'].count('silu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["1"], done.stderr


def test_inductor_compiles_what_was_rewritten(block: nn.Module) -> None:
    with torch.no_grad():
        got = torch.compile(block, backend="hasten", fullgraph=True)(X)
        assert relative_error([block(X)], [got]) < 1e-5
    assert hits() == BLOCK_HITS
    assert dict(dynamo.counters) == {"compiled": 1}


# Options

OURS = (
    "passes, skip, fuel, expect, verify, strict, tune, memory_budget, max_error, strict_nan, half, cache, cache_form, "
    "cache_time, region, dump"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fule": 3},
            f"options: no option 'fule'; ours are {OURS}, and Inductor's are taken as well. Did you mean 'fuel'?",
        ),
        (
            {"max_autotune_gem": True},
            f"options: no option 'max_autotune_gem'; ours are {OURS}, and Inductor's are taken as well. "
            "Did you mean 'max_autotune_gemm'?",
        ),
        ({"passes": "atention"}, None),
        ({"fuel": -1}, "options: fuel is -1; give a number of rewrites from 0 up"),
        ({"fuel": "3"}, "options: fuel is '3'; give a number of rewrites from 0 up"),
        ({"fuel": True}, "options: fuel is True; give a number of rewrites from 0 up"),
        ({"expect": "gelu=1"}, "options: expect is 'gelu=1'; give a dict such as {'attention': 16}"),
        ({"passes": 3}, "options: passes is 3; give names, as a list or with commas between them"),
        ({"skip": [3]}, "options: skip is [3]; give names, as a list or with commas between them"),
        ({"verify": "model"}, "verify: 'model' is none of structure, sites"),
        ({"verify": "site"}, "verify: 'site' is none of structure, sites"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_refuses_an_option(options: dict, message: str | None) -> None:
    found = refusal(F.gelu, UsageError, X, options=options)
    if message is None:
        assert found.startswith("passes: no pass named 'atention'; passes: ")
        assert found.endswith(" Did you mean 'attention'?")
    else:
        assert found == message


def test_refuses_a_name_in_skip() -> None:
    found = refusal(F.gelu, UsageError, X, options={"skip": "gegul"})
    assert found.startswith("skip: no pass named 'gegul'; passes: ")
    assert found.endswith(" Did you mean 'geglu'?")


def test_refuses_a_mode() -> None:
    assert refusal(F.gelu, UsageError, X, mode="max-autotun") == (
        "mode 'max-autotun' is none of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs. "
        "Did you mean 'max-autotune'?"
    )


def test_modes_and_inductor_options_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    seen = []

    def compile_fx(graph, example_inputs, *, config_patches):
        seen.append(config_patches)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    with torch.no_grad():
        for mode in dynamo.MODES:
            torch.compile(F.gelu, backend="hasten", mode=mode)(X)
            torch._dynamo.reset()
        torch.compile(F.gelu, backend="hasten", options={"max-autotune": True, "triton.cudagraphs": True, "fuel": 1})(X)
    for patches, mode in zip(seen, dynamo.MODES, strict=False):
        wanted = torch._inductor.list_mode_options(mode) if mode != "default" else {}
        assert wanted.items() <= patches.items()
        assert set(patches) == {*wanted, "post_grad_custom_pre_pass"}
    assert set(seen[-1]) == {"max_autotune", "triton.cudagraphs", "post_grad_custom_pre_pass"}
    assert len(seen) == len(dynamo.MODES) + 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"passes": "gelu"}, {}),
        ({"passes": "geglu,attention"}, {"geglu": 1, "attention": 1}),
        ({"passes": ["group-norm-act"]}, {"group-norm-act": 1}),
        ({"skip": "attention"}, {"geglu": 1, "group-norm-act": 1}),
        ({"skip": ("attention", "geglu")}, {"group-norm-act": 1}),
        ({"fuel": 0}, {}),
        ({"fuel": 2}, {"geglu": 1, "attention": 1}),
        ({"verify": "sites"}, BLOCK_HITS),
    ],
    ids=str,
)
def test_our_options(block: nn.Module, options: dict, wanted: dict[str, int]) -> None:
    with torch.no_grad():
        got = torch.compile(block, backend=rewritten, options=options)(X)
        assert relative_error([block(X)], [got]) < 1e-5
    assert hits() == wanted


def test_dump_writes_the_graph_after_every_pass(block: nn.Module, tmp_path) -> None:
    with torch.no_grad():
        torch.compile(block, backend=rewritten, options={"dump": tmp_path / "graphs"})(X)
    folder = tmp_path / "graphs" / "graph-0"
    assert sorted(f.name for f in folder.iterdir())[:4] == [
        "00-input.txt",
        "01-gelu.txt",
        "02-geglu.txt",
        "03-attention.txt",
    ]
    assert "hasten.geglu" in (folder / "02-geglu.txt").read_text()
    assert "hasten.geglu" not in (folder / "01-gelu.txt").read_text()


def test_dump_keeps_the_graphs_apart(tmp_path) -> None:
    def function(x):
        x = F.gelu(x)
        torch._dynamo.graph_break()
        return F.silu(x)

    with torch.no_grad():
        torch.compile(function, backend=rewritten, options={"dump": str(tmp_path)})(X)
    inputs = [(tmp_path / f"graph-{n}" / "00-input.txt").read_text() for n in range(2)]
    assert ["gelu" in text for text in inputs] == [True, False]
    assert ["silu" in text for text in inputs] == [False, True]


def test_expect(block: nn.Module) -> None:
    with torch.no_grad():
        met = {"attention": 1, "group-norm-act.silu": 1, "upsample-conv": 0}
        torch.compile(block, backend=rewritten, options={"expect": met})(X)
    found = refusal(block, ExpectationError, X, options={"expect": {"attention": 2, "group-norm-act.gelu": 1}})
    assert found == "attention: 2 expected, 1 found; group-norm-act.gelu: 1 expected, 0 found"


def test_expect_names_the_nearest_misses() -> None:
    def two_readers(q, k, v):
        p = (q @ k.transpose(-2, -1)).softmax(-1)
        return p @ v, p

    args = [draw(2, 5, 8, seed=s) for s in range(3)]
    assert refusal(two_readers, ExpectationError, *args, options={"expect": {"attention": 1}}) == (
        "attention: 1 expected, 0 found (nearest misses: matmul_1: p (softmax) has a user outside the pattern)"
    )


def test_expect_of_a_rule_that_does_not_exist() -> None:
    found = refusal(F.gelu, UsageError, X, options={"expect": {"atention": 1}})
    assert found.startswith("expect: no rule named 'atention' ran; rules: ")
    assert found.endswith(" Did you mean 'attention'?")


# A pass that fails, a rewrite that is wrong


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """The gelu rule raises after it has changed one site of the graph."""
    calls = []

    def replace(view, found, root):
        calls.append(root)
        if len(calls) > 1:
            raise RuntimeError("the second site is too much")
        return view.emit("gelu", [found["x"]], {"approximate": "none"}, at=root)

    monkeypatch.setattr(gelu_rule, "GELU", _replaced(gelu_rule.GELU, replace=replace))
    return calls


def _replaced(rule, **parts):
    import dataclasses

    return dataclasses.replace(rule, **parts)


def test_a_failing_pass_leaves_the_graph_as_it_was(failing: list, caplog: pytest.LogCaptureFixture) -> None:
    graphs = []

    def keeping(graph, example_inputs, **kwargs):
        graphs.append(str(graph.graph))
        run = rewritten(graph, example_inputs, **kwargs)
        graphs.append(str(graph.graph))
        return run

    def twice(x):
        return spelled_gelu(spelled_gelu(x) + 1)

    with torch.no_grad():
        assert torch.equal(torch.compile(twice, backend=keeping)(X), twice(X))
    assert len(failing) == 2
    assert graphs[0] == graphs[1]
    assert dynamo.counters["failed"] == 1
    assert dynamo.reports[0].notes == ["not rewritten: the second site is too much"]
    assert "a pass failed and the graph is compiled as it was: the second site is too much" in caplog.text


def test_a_failing_pass_leaves_branches_as_they_were(failing: list) -> None:
    def function(x, flag):
        return torch.cond(flag, spelled_gelu, lambda x: spelled_gelu(x) * 2, (x,))

    with torch.no_grad():
        for flag in (torch.tensor(True), torch.tensor(False)):
            assert torch.equal(torch.compile(function, backend=traced)(X, flag), function(X, flag))
    assert len(failing) == 2
    assert dynamo.counters["failed"] == 1


def test_strict_raises_where_a_pass_fails(failing: list) -> None:
    def twice(x):
        return spelled_gelu(spelled_gelu(x) + 1)

    assert refusal(twice, RuntimeError, X, options={"strict": True}) == "the second site is too much"


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gelu rule takes one formula for the other."""

    def replace(view, found, root):
        return view.emit("gelu", [found["x"]], {"approximate": "tanh"}, at=root)

    monkeypatch.setattr(gelu_rule, "GELU", _replaced(gelu_rule.GELU, replace=replace))


@pytest.mark.usefixtures("wrong")
def test_a_wrong_rewrite_is_taken_back_if_sites_are_verified() -> None:
    with torch.no_grad():
        got = torch.compile(spelled_gelu, backend=rewritten, options={"verify": "sites"})(100 * X)
    assert torch.equal(got, spelled_gelu(100 * X))
    ((rule, site),) = dynamo.reports[0].reverted
    assert rule == "gelu"
    assert site.reason.startswith("the result differs by ")
    assert hits() == {}


@pytest.mark.usefixtures("wrong")
def test_strict_raises_where_a_rewrite_is_wrong() -> None:
    found = refusal(spelled_gelu, HastenError, X, options={"verify": "sites", "strict": True})
    assert found.startswith("gelu at mul_1 does not verify: the result differs by ")


def test_a_result_of_another_type_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(view, found, root):
        return view.emit("cast", [found["x"]], {"to": "float64"}, at=root)

    monkeypatch.setattr(gelu_rule, "GELU", _replaced(gelu_rule.GELU, replace=replace))
    with torch.no_grad():
        got = torch.compile(spelled_gelu, backend=rewritten)(X)
    assert torch.equal(got, spelled_gelu(X))
    ((_, site),) = dynamo.reports[0].reverted
    assert site.reason == "the replacement is float64, it was float32"


# Training


def test_graphs_that_need_gradients_are_passed_through() -> None:
    torch.manual_seed(0)
    model, twin = Block(), Block()
    twin.load_state_dict(model.state_dict())
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.compile(model, backend="hasten")(x).square().sum().backward()
    twin(y).square().sum().backward()
    assert dict(dynamo.counters) == {"training": 1}
    assert not dynamo.reports
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_parameters_that_require_gradients_are_enough_to_pass_a_graph_through() -> None:
    model = Block().eval()
    torch.compile(model, backend=rewritten)(X)
    assert dict(dynamo.counters) == {"training": 1}
    clear()
    with torch.no_grad():
        torch.compile(model, backend=rewritten)(X)
    assert dict(dynamo.counters) == {"compiled": 1}
    clear()
    torch.compile(model.requires_grad_(False), backend=rewritten)(X)
    assert dict(dynamo.counters) == {"compiled": 1}
    assert hits() == BLOCK_HITS


def test_training_then_inference_of_one_model(block: nn.Module) -> None:
    compiled = torch.compile(block.requires_grad_(True), backend=traced)
    compiled(X).sum().backward()
    assert block.conv.weight.grad is not None
    with torch.inference_mode():
        got = compiled(X)
    assert relative_error([block(X)], [got]) < 1e-5
    assert dict(dynamo.counters) == {"training": 1, "compiled": 1}


# The cache key


def test_fingerprint_follows_the_sources(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    root = Path(dynamo.__file__).resolve().parent.parent
    for folder in ("passes", "backends"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    here = dynamo.fingerprint.__wrapped__()
    monkeypatch.setattr(dynamo, "__file__", str(tmp_path / "backends" / "dynamo.py"))
    assert dynamo.fingerprint.__wrapped__() == here
    rule = tmp_path / "passes" / "rules" / "gelu.py"
    rule.write_text(rule.read_text() + "\n")
    changed = dynamo.fingerprint.__wrapped__()
    assert changed != here
    rule.rename(rule.with_name("gelu2.py"))
    assert dynamo.fingerprint.__wrapped__() not in (here, changed)


def inductor_key(uuid_of: object) -> str:
    """The key under which Inductor would cache one graph."""
    from torch._inductor.codecache import compiled_fx_graph_hash

    graph = fx.symbolic_trace(lambda x: x + 1)
    with torch._inductor.config.patch(post_grad_custom_pre_pass=uuid_of):
        return compiled_fx_graph_hash(graph, [X], {}, [])[0]


def test_our_sources_are_part_of_inductors_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = inductor_key(dynamo._Key())
    assert inductor_key(dynamo._Key()) == before
    assert inductor_key(None) != before
    monkeypatch.setattr(dynamo, "fingerprint", lambda: b"another version")
    assert inductor_key(dynamo._Key()) != before


def test_a_pass_of_the_users_runs_and_is_part_of_the_key() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Theirs(CustomGraphPass):
        def __init__(self, uuid: object) -> None:
            self.key, self.graphs = uuid, []

        def __call__(self, graph: fx.Graph) -> None:
            self.graphs.append(graph)

        def uuid(self) -> object:
            return self.key

    theirs = Theirs("one")
    graph = fx.Graph()
    dynamo._Key(theirs)(graph)
    assert theirs.graphs == [graph]
    assert dynamo._Key(theirs).uuid() == (dynamo.fingerprint(), "one")
    assert inductor_key(dynamo._Key(Theirs("one"))) != inductor_key(dynamo._Key(Theirs("two")))
    assert dynamo._Key(Theirs(None)).uuid() is None
    assert dynamo._Key(lambda graph: None).uuid() is None


# Reports


def test_reports_say_what_was_done(block: nn.Module) -> None:
    with torch.no_grad():
        torch.compile(block, backend=rewritten)(X)
    (report,) = dynamo.reports
    found = report.as_dict()
    assert (found["source"], found["ir"], found["target"]) == ("torch.compile", "fx", "inductor:cpu")
    names = ("gelu", "geglu", "attention", "group-norm-act", "fold-conv", "upsample-conv", "winograd-conv2d")
    assert [r["name"] for r in found["rules"]][: len(names)] == list(names)
    (site,) = report["attention"].sites
    assert site.where == "scaled_dot_product_attention"
    assert (site.variant, site.spelling) == ("plain", "operator")
    assert report["group-norm-act"].sites[0].variant == "silu"
    assert found["ops_before"]["scaled_dot_product_attention"] == 1
    assert "scaled_dot_product_attention" not in found["ops_after"]
    assert found["ops_after"]["hasten.flash_attention"] == found["ops_after"]["hasten.geglu"] == 1
    assert found["notes"] == []
    assert found["seconds"].keys() >= {"gelu", "geglu", "attention", "group-norm-act"}


def test_reports_of_the_newest_graphs_are_kept() -> None:
    assert dynamo.reports.maxlen == 64
    for size in range(3):
        torch._dynamo.reset()
        torch.compile(F.gelu, backend=rewritten)(draw(1, 2 + size))
    assert len(dynamo.reports) == 3
