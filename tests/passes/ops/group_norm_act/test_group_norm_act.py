import pytest
import torch
import torch.nn.functional as F

from hasten.errors import UsageError
from hasten.passes.ops import group_norm_act

OP = torch.ops.hasten.group_norm_act
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()


def traced(x, *arguments, dynamic=False):
    """The form that compilers see, run by eager torch: as exact as Inductor's, and quick to compile."""
    return torch.compile(OP, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=dynamic)(x, *arguments)


def parameters(channels, batch=1):
    return torch.randn(channels), torch.randn(channels), torch.randn(batch, channels), torch.randn(batch, channels)


def error(y, x, *arguments):
    expected = group_norm_act.reference(x, *arguments)
    assert y.shape == expected.shape
    return ((y - expected).abs() / (1 + expected.abs())).max().item()


@pytest.mark.parametrize("run", [OP, traced], ids=["eager", "traced"])
class TestNumbers:
    @pytest.mark.parametrize("act", ["none", "silu", "gelu", "gelu_tanh", "quick_gelu"])
    def test_every_activation(self, run, act):
        x, (weight, bias, scale, shift) = torch.randn(2, 12, 7, 5), parameters(12, 2)
        arguments = (weight, bias, scale, shift, 4, 1e-5, act)
        assert error(run(x, *arguments), x, *arguments) <= 1e-5

    @pytest.mark.parametrize(
        "shape",
        [(3, 12), (2, 12, 11), (1, 12, 1030), (2, 12, 8, 8), (1, 12, 3, 700), (2, 12, 3, 4, 5), (1, 12, 1, 1)],
        ids=str,
    )
    def test_every_rank_and_block_shape(self, run, shape):
        x, (weight, bias, _, _) = torch.randn(shape), parameters(12)
        arguments = (weight, bias, None, None, 3, 1e-6, "silu")
        assert error(run(x, *arguments), x, *arguments) <= 1e-5

    @pytest.mark.parametrize("groups", [1, 12])
    def test_one_group_and_one_channel_groups_without_parameters(self, run, groups):
        x = torch.randn(2, 12, 5, 5)
        arguments = (None, None, None, None, groups, 1e-3, "none")
        assert error(run(x, *arguments), x, *arguments) <= 1e-5

    @pytest.mark.parametrize(("mean", "sigma"), [(1e3, 1.0), (1e4, 1.0), (1e3, 0.1), (-1e4, 1.0)])
    def test_a_mean_far_above_the_deviation_costs_no_digits(self, run, mean, sigma):
        x, (weight, bias, _, _) = torch.randn(1, 8, 40, 40) * sigma + mean, parameters(8)
        arguments = (weight, bias, None, None, 2, 1e-5, "silu")
        ours = error(run(x, *arguments), x, *arguments)
        assert ours <= 2e-6
        assert ours * 4 < error(F.silu(torch.group_norm(x, 2, weight, bias)), x, *arguments)

    def test_an_outlier_first_costs_few_digits(self, run):
        x = torch.randn(1, 4, 64, 64)
        x[0, 0, 0, 0] = 1e4
        arguments = (None, None, None, None, 1, 1e-5, "none")
        assert error(run(x, *arguments), x, *arguments) <= 1e-5

    def test_a_constant_input_gives_the_bias(self, run):
        _, bias, _, _ = parameters(8)
        y = run(torch.full((1, 8, 4, 4), 3.7), None, bias, None, None, 2, 1e-5, "none")
        assert torch.equal(y, bias[None, :, None, None].expand(1, 8, 4, 4))

    @pytest.mark.parametrize(
        ("dtype", "mean", "bound"), [(torch.float16, 30000, 1e-3), (torch.bfloat16, 0, 8e-3)], ids=["half", "bfloat16"]
    )
    def test_half_precision_keeps_float32_statistics(self, run, dtype, mean, bound):
        x, (weight, bias, scale, shift) = (torch.randn(1, 8, 16, 16) * 8 + mean).to(dtype), parameters(8)
        arguments = (weight, bias, scale, shift, 2, 1e-5, "silu")
        y = run(x, *arguments)
        assert y.dtype == dtype
        assert error(y, x, *arguments) <= bound

    def test_half_parameters_with_float32_input(self, run):
        x, half = torch.randn(1, 8, 6, 6), [t.half() for t in parameters(8)]
        arguments = (*half, 2, 1e-5, "none")
        assert error(run(x, *arguments), x, *arguments) <= 1e-5

    def test_float64_is_computed_in_float64(self, run):
        x = torch.randn(1, 8, 6, 6, dtype=torch.float64) + 100
        arguments = (None, None, None, None, 2, 1e-5, "silu")
        assert error(run(x, *arguments), x, *arguments) <= 1e-12

    def test_nan_poisons_its_own_group_only(self, run):
        x = torch.randn(2, 8, 4, 4)
        x[0, 3, 2, 2], x[1, 0, 0, 0] = torch.nan, torch.inf
        y = run(x, None, None, None, None, 2, 1e-5, "silu").isnan()
        assert y.reshape(2, 2, -1).all(-1).tolist() == [[True, False], [True, False]]
        assert y.reshape(2, 2, -1).any(-1).tolist() == [[True, False], [True, False]]

    @pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0), (2, 8, 0)], ids=str)
    def test_empty_input_gives_empty_output(self, run, shape):
        assert run(torch.randn(shape), None, None, None, None, 2, 1e-5, "silu").shape == shape

    @pytest.mark.parametrize("layout", [*FORMATS, "sliced"])
    def test_layout_is_kept(self, run, layout):
        x = torch.randn(2, 8, 6, 16)
        x = x[..., ::2] if layout == "sliced" else x.contiguous(memory_format=FORMATS[layout])
        weight, bias, scale, shift = parameters(8, 2)
        arguments = (weight, bias, scale[:, :, None, None], shift[:, :, None, None], 2, 1e-5, "silu")
        y = run(x, *arguments)
        assert error(y, x, *arguments) <= 1e-5
        assert y.is_contiguous(memory_format=FORMATS.get(layout, torch.contiguous_format))

    def test_backward(self, run):
        def loss(*tensors):
            return run(*tensors, 2, 1e-5, "gelu_tanh")

        shapes = ((2, 4, 3, 2), (4,), (4,), (2, 4), (1, 4))
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(loss, tensors)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.norm = torch.nn.GroupNorm(4, 16)

    def forward(self, x, scale, shift):
        return OP(self.conv(x), self.norm.weight, self.norm.bias, scale, shift, 4, 1e-5, "silu")


@pytest.fixture
def block():
    return Block().eval(), (torch.randn(2, 4, 12, 10), torch.randn(2, 16), torch.randn(2, 16))


def _exported(block, inputs):
    batch = torch.export.Dim("batch", max=64)
    shapes = ({0: batch, 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}, {0: batch}, {0: batch})
    return torch.export.export(block, inputs, dynamic_shapes=shapes, strict=False)


def test_export_keeps_one_node_and_decomposes_to_aten(block):
    program = _exported(*block)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in calls if not name.startswith("aten.sym_size")] == [
        "aten.conv2d.default",
        "hasten.group_norm_act.default",
    ]
    decomposed = program.run_decompositions()
    assert not [node for node in decomposed.graph.nodes if str(node.target).startswith("hasten")]
    other = (torch.randn(3, 4, 7, 9), torch.randn(3, 16), torch.randn(3, 16))
    torch.testing.assert_close(decomposed.module()(*other), block[0](*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor(block, dynamic):
    module, inputs = block
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for x in (inputs[0], torch.randn(2, 4, 9, 20)):
            torch.testing.assert_close(compiled(x, *inputs[1:]), module(x, *inputs[1:]), rtol=1e-5, atol=1e-5)


def test_aot_inductor_package(block, tmp_path):
    module, inputs = block
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            _exported(module, inputs), package_path=str(tmp_path / "block.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        other = (torch.randn(3, 4, 7, 9), torch.randn(3, 16), torch.randn(3, 16))
        torch.testing.assert_close(run(*other), module(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "sliu"}, "group_norm_act: unknown activation 'sliu'; "
         "use one of none, silu, gelu, gelu_tanh, quick_gelu. Did you mean 'silu'?"),
        ({"groups": 3}, "group_norm_act: 8 channels cannot be split into 3 groups; give a divisor"),
        ({"groups": 0}, "group_norm_act: 8 channels cannot be split into 0 groups; give a divisor"),
        ({"x": torch.ones(8)}, "group_norm_act: the input has shape (8,); give (batch, channels, ...)"),
        ({"x": torch.ones(2, 8, 4, dtype=torch.int64)},
         "group_norm_act: the input is torch.int64; give a floating-point tensor"),
        ({"weight": torch.ones(4)}, "group_norm_act: weight has shape (4,); the channels ask for (8,)"),
        ({"scale": torch.ones(3, 8)},
         "group_norm_act: scale of shape (3, 8) does not fit an input of shape (2, 8, 4, 4); "
         "give (2, 8) or (2, 8, 1, 1)"),
        ({"shift": torch.ones(2, 8, 4, 4)},
         "group_norm_act: shift of shape (2, 8, 4, 4) does not fit an input of shape (2, 8, 4, 4); "
         "give (2, 8) or (2, 8, 1, 1)"),
    ],
    ids=["act", "groups", "no groups", "rank", "dtype", "weight", "scale", "shift"],
)  # fmt: skip
def test_wrong_arguments_get_one_sentence(change, message):
    arguments = {"x": torch.ones(2, 8, 4, 4), "weight": None, "bias": None, "scale": None, "shift": None, "groups": 2}
    with pytest.raises(UsageError) as caught:
        OP(**{**arguments, "eps": 1e-5, "act": "none", **change})
    assert str(caught.value) == message


@pytest.mark.parametrize("groups", [1, 2])
def test_small_video_maps_are_compiled_right(groups):
    """Inductor 2.13 gets the block sums of a 2x2x2 map wrong, so such maps take another form."""
    x, weight, bias = torch.randn(4, 8, 2, 2, 2), torch.randn(8), torch.randn(8)

    def function(x, weight, bias):
        return torch.ops.hasten.group_norm_act(x, weight, bias, None, None, groups, 1e-6, "silu")

    with torch.no_grad():
        got = torch.compile(function, dynamic=False)(x, weight, bias)
    want = torch.nn.functional.silu(torch.group_norm(x, groups, weight, bias, 1e-6))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
