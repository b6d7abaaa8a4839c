"""Regions of FX graphs: the blocks that the architecture has, and a split that computes what the whole computes."""

import copy
import functools
import itertools

import pytest
import torch
from diffusers_configs import build, configs, inputs
from torch import fx, nn
from torch.utils import _pytree

from hasten.errors import UsageError
from hasten.models import registry
from hasten.passes import catalog, pipeline
from hasten.passes.fx.flow import FxFlow
from hasten.passes.fx.graph import FxGraph
from hasten.passes.fx.view import FxView
from hasten.passes.rule import Report
from hasten.passes.steps.catalog import parse
from hasten.passes.steps.region import find
from hasten.passes.steps.wish import Wish

TINY = {
    "flux": ("FluxTransformer", {"num_layers": 3, "num_single_layers": 4}, 7),
    "sd3": ("SD3Transformer", {"num_layers": 4}, 4),
    "sd3.5": ("SD3Transformer", {"num_layers": 6, "dual_attention_layers": (0, 1, 2)}, 6),
    "cogvideox": ("CogVideoX15Transformer", {"num_layers": 4}, 4),
    "wan": ("WanTransformer3D", {"num_layers": 4}, 4),
    "hunyuan-video": ("HunyuanVideoTransformer", {"num_layers": 3, "num_single_layers": 4}, 7),
    "ltx": ("LTXTransformer", {"num_layers": 4}, 4),
    "mochi": ("MochiTransformer", {"num_layers": 4}, 4),
    "auraflow": ("AuraFlowTransformer", {"num_mmdit_layers": 3, "num_single_dit_layers": 4}, 7),
    "qwen-image": ("QwenImageTransformerQuant", {"num_layers": 4}, 4),
    "latte": ("LatteTransformer", {"num_layers": 4}, 8),
    "pixart": ("PixArtTransformer2D", {"num_layers": 4}, 4),
    "dit": ("DiTTransformer2D", {"num_layers": 4}, 4),
    "sana": ("SanaTransformer", {"num_layers": 4}, 4),
}
"""Name -> configuration, what is changed of it, and how many blocks that makes."""
BUNDLED = {"scenes-dit": 6, "scenes-video": 12}
REGISTERED = {"dit-xl-2": 28, "pixart-alpha": 28, "latte": 56, "stable-audio-dit": 24, "flux-dev": 57}
DYNAMO = ("flux", "latte", "sd3", "wan", "scenes-dit", "scenes-video")


def model(name):
    """The module, and its inputs for a seed."""
    if name not in TINY:
        adapter = registry.get(name, reduced=not name.startswith("scenes"))
        return adapter.module(), lambda seed: adapter.example_inputs(seed=seed)
    config, changed, _ = TINY[name]
    config = configs()[config]
    config = {**config, "init": {**config["init"], **changed}}
    return build(config), lambda seed: inputs(config, seed)


def captured(name, how="export"):
    """A graph module, and its inputs in order for a seed; the same one every time."""
    return _captured(name, how)


@functools.cache
def _captured(name, how):
    module, draw = model(name)
    with torch.no_grad():
        if how == "export":
            program = torch.export.export(module, (), kwargs=draw(1), strict=False).module(check_guards=False)
            FxGraph(program)
            return program, lambda seed: _pytree.tree_leaves(draw(seed))
        kept = []

        def backend(graph, example):
            kept.append((graph, list(example)))
            return graph.forward

        torch._dynamo.reset()
        torch.compile(module, backend=backend, fullgraph=True)(**draw(1))
    ((graph, example),) = kept
    names = [n.target for n in graph.graph.find_nodes(op="placeholder")]

    def values(seed):
        given = draw(seed)
        return [next((t for k, t in given.items() if n == f"L_{k}_"), e) for n, e in zip(names, example, strict=True)]

    return graph, values


def flow(graph):
    return FxFlow(FxView(graph))


class Run(fx.Interpreter):
    """Runs the nodes that are needed, and no others; values of ``given`` are taken instead of computed."""

    def __init__(self, module, arguments, given=()):
        super().__init__(module, garbage_collect_values=False)
        self.given = dict(given)
        self.arguments = dict(zip(module.graph.find_nodes(op="placeholder"), arguments, strict=True))
        self.ran = set()

    def value(self, node):
        for step in self._order(node):
            self.env[step] = self._one(step)
        return self.env[node]

    def _order(self, node):
        stack, wanted = [node], set()
        while stack:
            current = stack.pop()
            if current not in wanted and current not in self.env:
                wanted.add(current)
                stack.extend([] if current in self.given else self.before(current))
        return [n for n in self.module.graph.nodes if n in wanted]

    def before(self, node):
        return [*node.all_input_nodes, *writers(self.module).get(node, ())]

    def _one(self, node):
        if node in self.given:
            return self.given[node]
        if node.op == "placeholder":
            return self.arguments[node]
        self.ran.add(node)
        return self.run_node(node)

    def outputs(self):
        (end,) = self.module.graph.find_nodes(op="output")
        return [self.value(n) for n in end.all_input_nodes]


@functools.cache
def writers(module):
    """Node -> what writes to the memory that it reads, before it: read off the schemas, one view at a time."""
    found, last, root = {}, {}, {}
    for node in module.graph.nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        schema = getattr(node.target, "_schema", None)
        alias = schema is not None and any(r.alias_info is not None for r in schema.returns)
        alias = alias or node.op == "call_method" or getattr(node.target, "__name__", "") in ("getitem", "setitem")
        root[node] = root.get(first, first) if alias and first is not None else node
        found[node] = [last[root[n]] for n in node.all_input_nodes if root.get(n) in last]
        if (schema is not None and schema.is_mutable) or getattr(node.target, "__name__", "") == "setitem":
            last[root[first]] = node
    return found


def check_split(name, region, how="export"):
    """Before, region and after are complete on their own, and put together they are the whole."""
    graph, values = captured(name, how)
    ends = [*region.before, *region.after, *region.extra]
    with torch.no_grad():
        whole = [Run(graph, values(seed)) for seed in (1, 2)]
        wanted = [run.outputs() for run in whole]
        first, second = ({v: run.value(v).clone() for v in ends} for run in whole)
        kept = {v: second[v] for v in (*region.after, *region.extra)}
        head = Run(graph, values(2), kept)
        for got, want in zip(head.outputs(), wanted[1], strict=True):
            assert torch.equal(got, want)
        assert not head.ran & set(region.inside)
        looked_at = [v for v in (region.signal.value, region.signal.base) if v is not None] if region.signal else []
        for value in (*region.before, *looked_at):
            head.value(value)
        assert not head.ran & set(region.inside)
        live = {v: whole[1].value(v) for v in region.live_in}
        inside = Run(graph, [None] * len(values(2)), live)
        parameters = {n: v for n, v in head.arguments.items() if n not in flow(graph).inputs().values()}
        inside.arguments = parameters
        for value in region.after:
            assert torch.equal(inside.value(value), second[value])
        assert {n for n in inside.ran if n.op != "get_attr"} <= set(region.inside)
        if region.no_residual is not None:
            return
        reused = {a: second[b] + (first[a] - first[b]) for b, a in zip(region.before, region.after, strict=True)}
        reused |= {v: first[v] for v in region.extra}
        skipped, full = Run(graph, values(2), reused), Run(graph, values(2))
        (end,) = graph.graph.find_nodes(op="output")
        full.given = reused
        order = [n for n in graph.graph.nodes if n.op != "output"]
        for node in order:
            full.env[node] = full._one(node)
        for got, want, uncached in zip(
            skipped.outputs(), [full.env[n] for n in end.all_input_nodes], wanted[1], strict=True
        ):
            assert torch.equal(got, want)
            assert not torch.equal(got, uncached)


def blocks_of(name):
    return TINY[name][2] if name in TINY else {**BUNDLED, **REGISTERED}[name]


QUICK = ("flux", "sd3", "cogvideox", "wan", "latte", "dit", "scenes-dit")
CASES = [
    *[(n, "export") for n in QUICK],
    *[pytest.param(n, "export", marks=pytest.mark.slow) for n in (*TINY, *REGISTERED, *BUNDLED) if n not in QUICK],
    *[pytest.param(n, "dynamo", marks=[] if n in ("flux", "scenes-video") else pytest.mark.slow) for n in DYNAMO],
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_stack(name, how):
    region = find(flow(captured(name, how)[0]), "stack")
    number = blocks_of(name)
    assert region, region.reason
    assert region.blocks == (0, number, number)
    assert region.share > 0.85
    assert region.no_residual is None
    assert region.extra == ()
    check_split(name, region, how)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_tail_after_a_probe(name, how):
    region = find(flow(captured(name, how)[0]), Wish("tail", head=1, foot=1, signal="probe"))
    number = blocks_of(name)
    assert region, region.reason
    assert region.blocks == (1, number - 1, number)
    whole = find(flow(captured(name, how)[0]), "stack")
    assert 0.2 < region.share < whole.share
    assert region.signal.base is not None
    assert region.kinds[region.signal.value].shape == region.kinds[region.signal.base].shape
    check_split(name, region, how)


def near(region, value):
    """The name of a parameter that is read where ``value`` is made, or right above."""
    names = []
    for node in [value, *value.all_input_nodes]:
        names += [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return names


def test_what_decisions_look_at():
    graph, _ = captured("latte")
    region = find(flow(graph), Wish("stack", signal="modulated", tap="attention-residual"))
    users = {str(n.target) for u in region.signal.value.users for n in u.all_input_nodes if n.op == "get_attr"}
    assert {"transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn1.to_v.weight"} <= users
    assert region.signal.inputs == {"hidden_states", "timestep"}
    assert not region.foldable
    stack = region.tap.value.meta["nn_module_stack"]
    assert "temporal_transformer_blocks.1" in [path.split("self_")[-1] for path, _ in stack.values()][-1]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("flux", "time_text_embed.timestep_embedder.linear_2.weight"),
        ("cogvideox", "time_embedding.linear_2.weight"),
        ("wan", "condition_embedder.time_embedder.linear_2.weight"),
        ("latte", "adaln_single.emb.timestep_embedder.linear_2.weight"),
        ("dit", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.weight"),
    ],
)
def test_the_embedding_of_the_timestep_depends_on_nothing_else(name, parameter):
    region = find(flow(captured(name)[0]), Wish("stack", signal="time-embedding"))
    assert region.signal.inputs == {"timestep"}
    assert region.foldable
    assert parameter in near(region, region.signal.value)
    check_split(name, region)


def test_streams_that_are_read_after_the_region():
    pairs = {name: len(find(flow(captured(name)[0]), "stack").after) for name in ("flux", "sd3", "wan")}
    assert pairs == {"flux": 1, "sd3": 1, "wan": 1}
    middle = find(flow(captured("flux")[0]), "stack", "1:5")
    assert [middle.kinds[v].shape for v in middle.after] == [(1, 16, 32), (1, 48, 32)]
    check_split("flux", middle)


def test_blocks_by_number():
    graph, _ = captured("scenes-dit")
    assert find(flow(graph), "stack", "1:-1").blocks == (1, 5, 6)
    assert find(flow(graph), "stack", ":3").blocks == (0, 3, 6)
    for text, message in (
        ("3:3", "region '3:3' holds no block, or one that is not there; the graph has 0 to 5"),
        ("2:9", "region '2:9' holds no block, or one that is not there; the graph has 0 to 5"),
        ("two", "region 'two' is not FIRST:LAST; give two numbers of blocks, such as 1:6"),
        ("1:2:3", "region '1:2:3' is not FIRST:LAST; give two numbers of blocks, such as 1:6"),
    ):
        with pytest.raises(UsageError, match=message):
            find(flow(graph), "stack", text)
    with pytest.raises(UsageError, match="granularity 'stak' is none of stack, tail, modules, deep, output"):
        find(flow(graph), "stak")


def test_the_order_of_elements_is_told_where_shapes_agree():
    """As many frames as tokens: a video's layout for spatial and for temporal blocks has one shape."""
    config = configs()["LatteTransformer"]
    side = config["init"]["sample_size"] // config["init"]["patch_size"]
    config = {**config, "init": {**config["init"], "num_layers": 2, "video_length": side * side}}
    shape = list(config["inputs"]["hidden_states"]["float"])
    shape[2] = side * side
    drawn = {**config["inputs"], "hidden_states": {"float": shape}}
    config["inputs"] = drawn
    with torch.no_grad():
        program = torch.export.export(build(config), (), kwargs=inputs(config, 1), strict=False)
    region = find(flow(program.module(check_guards=False)), "stack")
    last = [n for n in region.inside if n.target is torch.ops.aten.add.Tensor][-1]
    assert region.kinds[region.after[0]].shape == tuple(last.meta["val"].shape)
    assert region.after[0] is not last


@pytest.mark.parametrize("level", [1, 2, 4])
def test_what_is_under_a_skip_connection(level):
    graph, _ = captured("scenes-unet")
    region = find(flow(graph), Wish("deep", level=level))
    assert region.no_residual is not None
    assert any(u.target is torch.ops.aten.cat.default for u in region.after[0].users)
    check_split("scenes-unet", region)
    if level > 1:
        assert set(region.inside) < set(find(flow(graph), Wish("deep", level=level - 1)).inside)


def test_levels_that_are_not_there():
    with pytest.raises(UsageError, match=r"level: 99 was asked for; the graph has skip connections 1 \(outermost\) to"):
        find(flow(captured("scenes-unet")[0]), Wish("deep", level=99))
    assert "no skip connection was found" in find(flow(captured("scenes-dit")[0]), "deep").reason


@pytest.mark.parametrize("name", ["scenes-dit", "latte", "flux", "sd3"])
def test_modules(name):
    graph, _ = captured(name)
    region = find(flow(graph), "modules")
    assert region.share > 0.7
    check_split(name, region)
    layers = {"scenes-dit": 12, "latte": 20, "flux": 16, "sd3": 14}
    assert len(region.after) == layers[name]
    gates = {torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor}
    assert all(any(u.target in gates for u in moved_on(v)) for v in region.after)


def moved_on(value):
    """Users, through moves."""
    for user in value.users:
        if user.target in (torch.ops.aten.dropout.default, torch.ops.aten.div.Tensor, torch.ops.aten.to.dtype):
            yield from moved_on(user)
        else:
            yield user


def test_some_modules():
    graph, _ = captured("flux")
    assert len(find(flow(graph), Wish("modules", modules=("attn-ff",))).after) == 4
    assert len(find(flow(graph), Wish("modules", modules=("attn", "side-attn", "attn-ff-6"))).after) == 7
    with pytest.raises(UsageError, match=r"modules: 'atn' is none of this graph's; there are attn, ff, side-attn"):
        find(flow(graph), Wish("modules", modules=("atn",)))


def test_the_whole_model():
    graph, _ = captured("scenes-dit")
    region = find(flow(graph), "output")
    assert region.share == 1
    assert [region.names[v] for v in (*region.before, region.signal.value)] == ["hidden_states", "hidden_states"]
    check_split("scenes-dit", region)
    learned = find(flow(captured("dit")[0]), "output")
    assert learned.no_residual == "the input has shape (4, 4, 8, 8), the output (4, 8, 8, 8)"


def test_state_and_description():
    graph, _ = captured("scenes-dit")
    policy = parse("teacache:threshold=0.1,coefficients=1/0")
    region = find(flow(graph), policy)
    tokens = 2 * 64 * 160 * 4
    scalars = sum(region.slot_bytes(s) for s in policy.slots().values() if not s.like)
    assert 0 < scalars < 64
    assert region.state_bytes(policy) == 2 * tokens + scalars
    lines = region.describe(policy)
    assert lines[0].startswith("blocks 0 to 5 of 6: 99.0% of the operations, ")
    assert lines[1] == "stream to -> add_42, float32 (2, 64, 160)"
    assert lines[2].endswith("(2, 64, 160), from class_labels, hidden_states, timestep")
    assert lines[3] == "state of teacache: 0.164 MB"


@pytest.mark.parametrize("name", ["scenes-dit", "scenes-video"])
def test_symbolic_sizes(name):
    adapter = registry.get(name)
    shapes = adapter.dynamic_shapes("batch")
    program = torch.export.export(
        adapter.module(), (), kwargs=adapter.example_inputs(), dynamic_shapes=shapes, strict=False
    )
    region = find(flow(program.module(check_guards=False)), "stack")
    fixed = find(flow(captured(name)[0]), "stack")
    assert region.blocks == fixed.blocks
    assert region.no_residual is None
    assert region.flops == fixed.flops
    assert [isinstance(d, str) for d in region.kinds[region.after[0]].shape] == [True, False, False]
    assert region.signal.inputs == fixed.signal.inputs


@pytest.mark.parametrize(("name", "blocks"), [("scenes-dit", 6), ("flux", 7)])
def test_after_the_rules(name, blocks):
    graph = copy.deepcopy(captured(name)[0])
    report = pipeline.run(FxGraph(graph), pipeline.parse(",".join(catalog.default("fx"))), pipeline.Context(), Report())
    assert sum(rule.hits for rule in report.rules) >= blocks
    plain, region = find(flow(captured(name)[0]), "stack"), find(flow(graph), "stack")
    assert region.blocks == (0, blocks, blocks)
    assert region.flops == plain.flops
    assert [n.name for n in (*region.before, *region.after)] == [n.name for n in (*plain.before, *plain.after)]


class Blocks(nn.Module):
    """Residual blocks with a timestep; ``spoil`` adds what a cache may not leave out."""

    def __init__(self, number=4, spoil=None, width=8):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(number)])
        self.head, self.spoil = nn.Linear(width, 64 * width if spoil == "head" else width), spoil

    def forward(self, x, t):
        x = x + t[:, None]
        kept = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            change = layer(torch.tanh(x))
            if self.spoil == "random" and i == 1:
                change = change + torch.randn_like(change)
            if self.spoil == "write" and i == 1:
                before = torch.sin(kept)
                kept.add_(change)
                change, kept = kept, before
            x = x + change
            if self.spoil == "read" and i == 1:
                kept = torch.sin(x)
        return self.head(x) * torch.cos(kept).mean()


def spoiled(*arguments, **options):
    module = Blocks(*arguments, **options).eval()
    program = torch.export.export(module, (torch.randn(2, 8), torch.rand(2)), strict=False)
    return flow(program.module(check_guards=False))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spoil": "random"}, "randn_like draws random numbers inside the region"),
        ({"spoil": "write"}, "add_ writes in place to zeros_like, which is not the region's own"),
        ({"spoil": "head"}, "the region has 5.9% of the operations, less than the 10% that make a cache pay"),
        ({"number": 1}, "no residual stream with repeated blocks was found; ask for the whole model (output)"),
    ],
)
def test_refusals(options, reason):
    refused = find(spoiled(**options), "stack")
    assert not refused
    assert refused.reason == reason


def test_a_value_inside_that_is_read_outside_is_kept_too():
    region = find(spoiled(spoil="read"), "stack")
    assert [region.names[v] for v in region.extra] == [region.names[region.extra[0]]]
    assert region.extra[0].target is torch.ops.aten.add.Tensor
    assert region.blocks == (0, 4, 4)


def test_memory_of_its_own_may_be_written_to():
    """Wan's rotary embedding fills an empty tensor: the attention depends on it through memory alone."""
    graph, _ = captured("wan")
    region = find(flow(graph), "stack")
    writes = [n for n in region.inside if n.target is torch.ops.aten.copy_.default]
    assert writes
    assert all(not n.users for n in writes)


def test_no_denoiser():
    decoder = registry.get("sd15-vae-decoder", reduced=True)
    program = torch.export.export(decoder.module(), (), kwargs=decoder.example_inputs(), strict=False)
    assert find(flow(program.module(check_guards=False)), "stack").reason == (
        "the graph reads latent alone; what denoises reads a timestep as well"
    )
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, x, t):
            return self.inner(x + t[:, None])

    program = torch.export.export(Mlp(), (torch.randn(2, 8), torch.rand(2)), strict=False)
    refused = find(flow(program.module(check_guards=False)), "stack")
    assert refused.reason == "no residual stream with repeated blocks was found; ask for the whole model (output)"


def test_a_unet_is_sent_to_its_skip_connections():
    assert find(flow(captured("scenes-unet")[0]), "stack").reason == (
        "skip connections lead out of the blocks; ask for the whole model (output), or for what is under a skip "
        "connection (deep)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("sd15-unet", 0.9), ("sdxl-unet", 0.95)])
def test_the_unets_of_stable_diffusion(name, share):
    graph, _ = captured(name)
    region = find(flow(graph), "deep")
    assert region.share > share
    check_split(name, region)
    assert "deep" in find(flow(graph), "stack").reason
    inner = [find(flow(graph), Wish("deep", level=k)) for k in range(1, 6)]
    assert all(a.share > b.share for a, b in itertools.pairwise(inner))
