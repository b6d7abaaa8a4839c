"""Step caches built into ONNX files: the same decisions and results as the cached PyTorch model's."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import hasten
from hasten.backends.capture import capture
from hasten.backends.onnx_signature import rename
from hasten.backends.program import flatten
from hasten.backends.region import find_cut_onnx
from hasten.errors import HastenError, UsageError
from hasten.passes.fx.to_onnx import onnx_from_graph
from hasten.passes.onnx.verify import verify_model
from hasten.passes.steps.catalog import parse

STEPS = 12
TEACACHE = "teacache:threshold=0.2,coefficients=1/0"
EASYCACHE = "easycache:threshold=0.3,warmup=2"
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs the extra tensorrt-rtx")
ONE, FOUR = "x:1x4x6x6,t:1", "x:4x4x6x6,t:4"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = self.modulation(emb)[:, None].chunk(3, -1)
        q, k, v = self.inward(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.outward(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Transformer(nn.Module):
    """Four blocks over the pixels of a (B, 4, height, width) image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inward, self.time, self.outward = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h, emb = self.inward(x.flatten(2).transpose(1, 2)), self.time(t[:, None]).sin()
        for block in self.blocks:
            h = block(h, emb)
        return self.outward(h).transpose(1, 2).unflatten(2, x.shape[2:])


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Transformer().eval().requires_grad_(requires_grad=False)


def examples(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(1)), torch.ones(batch)


@cache
def exported(opset: int = 20) -> bytes:
    """Somebody's ONNX file, with a symbolic batch."""
    batch = torch.export.Dim("batch", min=1, max=8)
    program = capture(transformer(), examples(), {}, ({0: batch}, {0: batch}))
    flat = flatten(program.module(check_guards=False), program)
    made = onnx_from_graph(flat.module, flat.example_inputs, opset, flat.dynamic_shapes)
    rename(made, [t.name for t in flat.inputs], ["sample"])
    return bytes(made.SerializeToString())


def somebodys(opset: int = 20) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(exported(opset))


def drive(engine: hasten.Engine, **options: Any) -> tuple[str, np.ndarray[Any, Any]]:
    """A denoising run's stand-in: decisions and results."""
    x, run, results = examples()[0].numpy(), engine.start(STEPS, **options), []
    for step in range(STEPS):
        time = np.full(4, 1 - step / STEPS, np.float32)
        (result,) = run(x=x * np.float32(1 - 0.06 * step), t=time).values()
        results.append(result)
    return run.mask, np.stack(results)


@pytest.mark.parametrize("text", [TEACACHE, EASYCACHE, "first-block:threshold=0.2"])
def test_an_onnx_file_is_cached_as_the_module_is(text: str, tmp_path: Any) -> None:
    engines = [
        hasten.build(somebodys(), target="onnxruntime:cpu", out=tmp_path / "onnx", cache=text),
        hasten.build(
            somebodys(), target="onnxruntime:cpu", out=tmp_path / "straight", cache=text, cache_form="straight"
        ),
        hasten.build(
            transformer(), target="onnxruntime:cpu", out=tmp_path / "module", cache=text, example_inputs=examples()
        ),
    ]
    found = [drive(engine) for engine in engines]
    masks = [mask for mask, _ in found]
    assert masks == [masks[0]] * 3
    assert 2 <= masks[0].count("1") < STEPS
    for _, results in found[:2]:
        np.testing.assert_allclose(results, found[2][1], atol=2e-4)
    states = [[(s["name"], s["dtype"], len(s["shape"]), s["start"]) for s in e.manifest.state] for e in engines]
    assert states[0] == states[2]
    assert engines[0].manifest.cache["form"] == "conditional"
    assert set(engines[1].manifest.cache["programs"]) == {"compute", "reuse", "decide"}
    assert any("step cache" in note for note in engines[0].manifest.report["notes"])


def test_masks_thresholds_and_other_batches(tmp_path: Any) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(somebodys(), path)
    engine = hasten.build(path, target="onnxruntime:cpu", out=tmp_path / "engine", cache=TEACACHE, region="1:3")
    assert engine.manifest.cache["region"].startswith("blocks 1 to 2 of 4")
    assert drive(engine, mask="101010101010")[0] == "101010101010"
    few, many = (drive(engine, threshold=t)[0].count("1") for t in (0.6, 0.05))
    assert few < many
    x, t = (given.numpy() for given in examples(3))
    (result,) = engine.start(2)(x=x, t=t).values()
    assert result.shape == (3, 4, 6, 6)


def test_a_state_whose_size_is_a_product_of_the_inputs_sizes(tmp_path: Any) -> None:
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    program = capture(transformer(), examples(), {}, ({2: height, 3: width}, None))
    flat = flatten(program.module(check_guards=False), program)
    model = onnx_from_graph(flat.module, flat.example_inputs, 20, flat.dynamic_shapes)
    rename(model, [t.name for t in flat.inputs], ["sample"])
    engine = hasten.build(model, target="onnxruntime:cpu", out=tmp_path / "e", cache=TEACACHE)
    _, tokens, _ = next(s["shape"] for s in engine.manifest.state if s["name"] == "cache_residual")
    assert "*" in tokens
    x = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(np.float32)
    run, t = engine.start(3, mask="101"), np.ones(4, np.float32)
    first, second, third = (run(x=x + np.float32(step), t=t)["sample"] for step in range(3))
    assert first.shape == (4, 4, 3, 5)
    with torch.no_grad():
        wanted = transformer()(torch.from_numpy(x + np.float32(2)), torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(third, wanted, atol=2e-4)
    assert np.abs(second - first).max() > 1e-3


def test_a_schedule_known_before_the_run_makes_no_branch(tmp_path: Any) -> None:
    engine = hasten.build(somebodys(), target="onnxruntime:cpu", out=tmp_path / "e", cache="mask:101001000111")
    assert set(engine.manifest.cache["programs"]) == {"compute", "reuse"}
    mask, results = drive(engine)
    assert mask == "101001000111"
    plain = hasten.build(somebodys(), target="onnxruntime:cpu", out=tmp_path / "plain")
    x, t = (given.numpy() for given in examples())
    wanted = plain(x=x, t=t)["sample"]
    np.testing.assert_allclose(results[0], wanted, atol=2e-4)
    sizes = {
        name: (engine.path / p["artifact"]).stat().st_size for name, p in engine.manifest.cache["programs"].items()
    }
    assert sizes["reuse"] < sizes["compute"] / 2, "the region's weights are not in the program that leaves it out"


@needs_rtx
@pytest.mark.parametrize(
    ("opset", "shapes"), [(22, FOUR), (23, (ONE, FOUR, FOUR))], ids=["fixed-22", "dynamic-attention-operator-23"]
)
def test_a_tensorrt_plan_jumps_over_the_region(opset: int, shapes: Any, tmp_path: Any) -> None:
    engine = hasten.build(
        somebodys(opset), target="tensorrt-rtx:sm89", out=tmp_path / "e", cache=TEACACHE, shapes=shapes
    )
    audit = engine.manifest.cache["programs"]["step"]["audit"]
    assert audit["counts"]["cjmp"] == 1
    assert audit["stream_capturable"] is False
    batch = "batch" if opset == 23 else 4
    (residual,) = (s for s in engine.manifest.state if s["name"] == "cache_residual")
    assert [type(d) for d in residual["shape"]] == [type(batch), int, int]
    assert residual["bytes"] == 4 * 36 * 32 * 4


@needs_rtx
def test_straight_plans_can_be_captured(tmp_path: Any) -> None:
    engine = hasten.build(
        somebodys(), target="tensorrt-rtx:sm89", out=tmp_path / "e", cache=TEACACHE, shapes=FOUR, cache_form="straight"
    )
    audits = {name: p["audit"] for name, p in engine.manifest.cache["programs"].items()}
    assert {name: a["counts"]["cjmp"] for name, a in audits.items()} == {"compute": 0, "reuse": 0, "decide": 0}
    assert all(a["stream_capturable"] for a in audits.values())


def test_an_old_opset_is_refused(tmp_path: Any) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2,8] x) => (float[2,8] y) { a = Tanh (x) y = Neg (a) }
        """
    )
    with pytest.raises(UsageError) as caught:
        hasten.build(model, target="onnxruntime:cpu", out=tmp_path / "e", cache=EASYCACHE)
    assert str(caught.value) == (
        "a step cache is written at opset 18 or newer, and the model has opset 17; export it again at opset 18 or newer"
    )
    assert not (tmp_path / "e").exists()


def in_a_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """All of a model's nodes in one local function, as some exporters write modules."""
    graph, opset = model.graph, helper.make_opsetid("", 20)
    given = [v.name for v in graph.input]
    held = [t.name for t in graph.initializer]
    results = [v.name for v in graph.output]
    infos = [v for v in graph.value_info if v.name not in held]
    function = helper.make_function(
        "local", "Model", [*given, *held], results, list(graph.node), [opset], value_info=infos
    )
    call = helper.make_node("Model", [*given, *held], results, domain="local")
    graph.ClearField("node")
    graph.ClearField("value_info")
    graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def test_a_region_inside_a_local_function(tmp_path: Any) -> None:
    model = in_a_function(somebodys())
    found = find_cut_onnx(model, parse(TEACACHE))
    verify_model(model)
    assert not model.functions
    assert found.cut.signal in {name for node in model.graph.node for name in node.output}
    engine = hasten.build(in_a_function(somebodys()), target="onnxruntime:cpu", out=tmp_path / "f", cache=TEACACHE)
    plain = hasten.build(somebodys(), target="onnxruntime:cpu", out=tmp_path / "p", cache=TEACACHE)
    (mask, results), (wanted, expected) = drive(engine), drive(plain)
    assert mask == wanted
    np.testing.assert_allclose(results, expected, atol=2e-4)


def test_a_graph_without_blocks_is_refused_with_the_reason(tmp_path: Any) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2,8] x) => (float[2,8] y) { a = Tanh (x) y = Neg (a) }
        """
    )
    with pytest.raises(HastenError, match=r"^teacache finds nothing to skip in this graph: "):
        hasten.build(model, target="onnxruntime:cpu", out=tmp_path / "e", cache=TEACACHE)
