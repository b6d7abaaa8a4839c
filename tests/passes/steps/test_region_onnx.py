"""Regions of ONNX graphs: the same search, checked by running the parts on their own."""

import functools
import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers_configs import build, configs, inputs
from onnx import TensorProto, helper

from hasten.models import registry
from hasten.passes.onnx.flow import OnnxFlow
from hasten.passes.onnx.graph import OnnxGraph
from hasten.passes.steps.region import find
from hasten.passes.steps.wish import Wish

BLOCKS = {"scenes-dit": 6, "scenes-video": 12, "flux": 5, "sd3": 4}
CASES = [
    ("scenes-dit", 20),
    ("scenes-video", 23),
    pytest.param("scenes-dit", 23, marks=pytest.mark.slow),
    pytest.param("scenes-video", 20, marks=pytest.mark.slow),
    pytest.param("flux", 20, marks=pytest.mark.slow),
    pytest.param("flux", 23, marks=pytest.mark.slow),
    pytest.param("sd3", 23, marks=pytest.mark.slow),
]


def model(name):
    if name.startswith("scenes"):
        adapter = registry.get(name)
        return adapter.module(), lambda seed: adapter.example_inputs(seed=seed)
    config = configs()[{"flux": "FluxTransformer", "sd3": "SD3Transformer"}[name]]
    changed = {"num_layers": 2, "num_single_layers": 3} if name == "flux" else {"num_layers": 4}
    config = {**config, "init": {**config["init"], **changed}}
    module = build(config)

    class Tensor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, **named):
            return self.inner(**named, return_dict=False)[0]

    return Tensor().eval(), lambda seed: {k: v for k, v in inputs(config, seed).items() if torch.is_tensor(v)}


@functools.cache
def exported(name, opset):
    """The model as `OnnxGraph` writes it, and its inputs for a seed."""
    module, draw = model(name)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (), kwargs=draw(1), strict=False)
        proto = torch.onnx.export(program, (), kwargs=draw(1), dynamo=True, opset_version=opset, verbose=False)
    graph = OnnxGraph(proto.model_proto)
    return graph, graph.to_model(), draw


def run(proto, wanted, feed):
    """``wanted`` values, computed from those in ``feed`` and what is above."""
    feed = {k: np.asarray(v) for k, v in feed.items()}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    makers = {o: n for n in graph.node for o in n.output}
    needed, stack = set(), [w for w in wanted if w not in feed]
    while stack:
        value = stack.pop()
        if value in makers and id(makers[value]) not in needed:
            needed.add(id(makers[value]))
            stack += [i for i in makers[value].input if i and i not in feed]
    kept = [n for n in graph.node if id(n) in needed]
    read = {i for n in kept for i in n.input}
    given = {k: v for k, v in feed.items() if k in read}
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(kept)
    graph.input.extend(helper.make_tensor_value_info(k, _type(v), v.shape) for k, v in given.items())
    graph.output.extend(helper.make_empty_tensor_value_info(w) for w in wanted if w not in feed)
    names = [w for w in wanted if w not in feed]
    results = {}
    if names:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results = dict(zip(names, session.run(names, given), strict=True))
    return {w: results[w] if w in results else feed[w] for w in wanted}, {o for n in kept for o in n.output}


def _type(value):
    return helper.np_dtype_to_tensor_dtype(value.dtype)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def check_split(name, opset, region):
    _, proto, draw = exported(name, opset)
    names = [i.name for i in proto.graph.input]
    outputs = [o.name for o in proto.graph.output]
    feeds = [dict(zip(names, draw(seed).values(), strict=True)) for seed in (1, 2)]
    ends = list(dict.fromkeys([*outputs, *region.before, *region.after, *region.extra, *region.live_in]))
    (first, _), (second, _) = (run(proto, ends, feed) for feed in feeds)
    kept = {v: second[v] for v in (*region.after, *region.extra)}
    head, ran = run(proto, outputs, {**feeds[1], **kept})
    assert not ran & set(region.inside)
    close(head[outputs[0]], second[outputs[0]])
    again, ran = run(proto, list(region.after), {v: second[v] for v in region.live_in})
    assert set(region.inside) >= ran
    for value in region.after:
        close(again[value], second[value])
    if region.no_residual is None:
        pairs = zip(region.before, region.after, strict=True)
        reused = {a: second[b] + first[a] - first[b] for b, a in pairs} | {v: first[v] for v in region.extra}
        skipped, _ = run(proto, outputs, {**feeds[1], **reused})
        assert np.abs(skipped[outputs[0]] - second[outputs[0]]).max() > 1e-4


@pytest.mark.parametrize(("name", "opset"), CASES)
def test_the_stack_and_the_tail(name, opset):
    data = OnnxFlow(exported(name, opset)[0])
    region = find(data, "stack")
    number = BLOCKS[name]
    assert region, region.reason
    assert region.blocks == (0, number, number)
    assert region.share > 0.9
    assert region.no_residual is None
    assert region.extra == ()
    check_split(name, opset, region)
    tail = find(data, Wish("tail", head=1, foot=1, signal="probe", tap="attention-residual"))
    assert tail, tail.reason
    assert tail.blocks == (1, number - 1, number)
    assert tail.share < region.share
    check_split(name, opset, tail)


@pytest.mark.parametrize(("name", "opset"), CASES[:2])
def test_taps_and_modules(name, opset):
    data = OnnxFlow(exported(name, opset)[0])
    region = find(data, Wish("stack", signal="time-embedding"))
    assert region.signal.inputs == {"timestep"}
    modulated = find(data, Wish("stack", signal="modulated", tap="attention-residual"))
    assert "hidden_states" in modulated.signal.inputs
    assert modulated.kinds[modulated.signal.value].shape == modulated.kinds[modulated.before[0]].shape
    modules = find(data, "modules")
    assert len(modules.after) == {"scenes-dit": 12, "scenes-video": 30}[name]
    check_split(name, opset, modules)


def test_a_unet_of_two_levels():
    """Convolutions down, up, and a concatenation; the middle is what a level leaves out."""
    rng = np.random.default_rng(0)

    def weight(name, *shape):
        tensor = helper.make_tensor(name, TensorProto.FLOAT, shape, rng.standard_normal(shape).astype("f4").ravel())
        weights.append(tensor)
        return name

    weights = []
    nodes = [
        helper.make_node("Conv", ["x", weight("w0", 4, 4, 3, 3)], ["in"], pads=[1] * 4),
        helper.make_node("Add", ["in", "t"], ["skip"]),
        helper.make_node("Conv", ["skip", weight("w1", 8, 4, 3, 3)], ["down"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["down"], ["active"]),
        helper.make_node("ConvTranspose", ["active", weight("w2", 8, 4, 2, 2)], ["up"], strides=[2, 2]),
        helper.make_node("Concat", ["up", "skip"], ["both"], axis=1),
        helper.make_node("Conv", ["both", weight("w3", 4, 8, 1, 1)], ["y"]),
    ]
    sizes = {"x": [1, 4, 8, 8], "t": [1]}
    graph = helper.make_graph(
        nodes,
        "unet",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sizes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data = OnnxFlow(OnnxGraph(proto))
    region = find(data, "deep")
    assert (region.before, region.after, region.inside) == (("skip",), ("up",), ("down", "active", "up"))
    assert region.live_in == ("skip",)
    assert find(data, "stack").reason == (
        "no residual stream with repeated blocks was found; ask for the whole model (output), or for what is under a "
        "skip connection (deep)"
    )


def branching(reads):
    """Two residual blocks; an If after them whose branch reads ``reads`` from outside itself."""
    rng = np.random.default_rng(0)
    weights = [
        helper.make_tensor(n, TensorProto.FLOAT, (8, 8), rng.standard_normal((8, 8)).astype("f4").ravel())
        for n in ("w0", "w1", "w2")
    ]
    value = helper.make_tensor_value_info

    def branch(name, operator, operand):
        return helper.make_graph(
            [helper.make_node(operator, [operand], [f"{name}_y"])],
            name,
            [],
            [value(f"{name}_y", TensorProto.FLOAT, None)],
        )

    nodes = [helper.make_node("Add", ["x", "t"], ["s0"])]
    for i in range(2):
        nodes += [
            helper.make_node("Tanh", [f"s{i}"], [f"a{i}"]),
            helper.make_node("MatMul", [f"a{i}", f"w{i}"], [f"f{i}"]),
            helper.make_node("Add", [f"s{i}", f"f{i}"], [f"s{i + 1}"]),
        ]
    nodes += [
        helper.make_node(
            "If", ["flag"], ["side"], then_branch=branch("a", "Sin", reads), else_branch=branch("b", "Cos", reads)
        ),
        helper.make_node("MatMul", ["s2", "w2"], ["out"]),
        helper.make_node("Add", ["out", "side"], ["y"]),
    ]
    shapes = {"x": [4, 8], "t": [8]}
    given = [value(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(
        nodes, "g", [*given, value("flag", TensorProto.BOOL, [])], [value("y", TensorProto.FLOAT, [4, 8])], weights
    )
    return OnnxFlow(OnnxGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)))


def test_what_a_branch_reads_is_read_outside():
    assert find(branching("s0"), "stack").extra == ()
    region = find(branching("f0"), "stack")
    assert region.blocks == (0, 2, 2)
    assert region.extra == ("f0",)


def test_random_numbers_and_a_mask_between():
    nodes = [helper.make_node("Add", ["x", "t"], ["s0"])]
    for i in range(3):
        nodes += [
            helper.make_node("MatMul", [f"s{i}", "w"], [f"f{i}"]),
            helper.make_node("RandomNormalLike", [f"f{i}"], [f"n{i}"]),
            helper.make_node("Mul", [f"f{i}", f"n{i}"], [f"g{i}"]),
            helper.make_node("Add", [f"s{i}", f"g{i}"], [f"s{i + 1}"]),
        ]
    value = helper.make_tensor_value_info
    weight = helper.make_tensor("w", TensorProto.FLOAT, (8, 8), np.ones(64, "f4"))
    graph = helper.make_graph(
        [*nodes, helper.make_node("Relu", ["s3"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [4, 8]), value("t", TensorProto.FLOAT, [8])],
        [value("y", TensorProto.FLOAT, [4, 8])],
        [weight],
    )
    data = OnnxFlow(OnnxGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)))
    assert find(data, "stack").reason.endswith("draws random numbers inside the region")
