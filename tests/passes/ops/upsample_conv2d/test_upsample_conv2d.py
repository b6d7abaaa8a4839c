import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.ops import upsample_conv2d
from hasten.passes.ops.upsample_conv2d import phases
from hasten.passes.ops.upsample_conv2d.select import select

OP = torch.ops.hasten.upsample_conv2d


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def tensors(batch=2, channels=5, outputs=7, height=6, width=9, dtype=torch.float32):
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    return tuple(t.to(dtype) for t in (torch.randn(batch, channels, height, width), weight, torch.randn(outputs)))


def test_exact_in_float64():
    x, weight, bias = tensors(dtype=torch.float64)
    assert (phases.upsample_conv2d(x, weight, bias) - upsample_conv2d.reference(x, weight, bias)).abs().max() <= 1e-14


@pytest.mark.parametrize("implementation", ["phases", "direct"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 2), (3, 3)])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_odd_and_small_sizes(implementation, height, width, with_bias):
    x, weight, bias = tensors(height=height, width=width)
    bias = bias if with_bias else None
    y = upsample_conv2d.upsample_conv2d(x, weight, bias, implementation=implementation)
    expected = upsample_conv2d.reference(x, weight, bias)
    assert y.shape == expected.shape == (2, 7, 2 * height, 2 * width)
    assert (y - expected).abs().max() <= 2e-6


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float16, 2.0), (torch.bfloat16, 2.0)], ids=["half", "bfloat16"])
def test_half_precision_is_as_close_as_the_two_operators(dtype, slack):
    x, weight, bias = tensors(channels=64, dtype=dtype)
    expected = upsample_conv2d.reference(x, weight, bias)
    y = phases.upsample_conv2d(x, weight, bias)
    theirs = upsample_conv2d.direct(x, weight, bias)
    assert y.dtype == dtype

    def rms(z):
        return (z - expected).square().mean().sqrt()

    assert rms(y) <= slack * rms(theirs)


def test_taps_are_added_before_they_are_rounded():
    weight = torch.tensor([[1.0, 2.0**-11, 2.0**-11]]).expand(3, 3).half()[None, None]
    taps = phases.phase_weight(weight)
    assert taps.dtype == torch.float16
    assert taps[0, 0, 0].tolist() == [2.0**-11, 2.0**-10, 1.0, 1.0]
    total = phases.phase_weight(torch.full((1, 1, 3, 3), 1 + 2.0**-10).half())[0, 0, 1, 1]
    assert total.item() == 4 + 2.0**-8


def test_channels_last_is_kept():
    x, weight, bias = tensors(channels=8)
    y = phases.upsample_conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_empty_inputs_are_treated_as_torch_treats_them():
    _, weight, bias = tensors()
    assert OP(torch.ones(0, 5, 6, 9), weight, bias).shape == (0, 7, 12, 18)
    for run in (OP, upsample_conv2d.direct):
        with pytest.raises(RuntimeError):
            run(torch.ones(2, 5, 0, 9), weight, bias)


def test_backward():
    x, weight, bias = (t.requires_grad_() for t in tensors(1, 2, 2, 3, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda *t: upsample_conv2d.upsample_conv2d(*t, implementation="phases"), (x, weight, bias)
    )


def test_few_pixels_and_many_channels_are_left_to_the_two_operators():
    assert select("cpu", 1, 1280, 1280, 8, 8)[0] == "direct"
    assert select("cpu", 1, 320, 320, 16, 16)[0] == "direct"
    assert select("cpu", 2, 320, 320, 16, 16)[0] == "phases"
    assert select("cpu", 1, 64, 64, 8, 8)[0] == "phases"
    assert select("cpu", 1, 320, 4, 8, 8)[0] == "phases"
    assert select("cpu", None, 1280, 1280, None, None)[0] == "phases"


def test_the_operator_follows_the_selection():
    def convolutions(channels, size):
        class Module(torch.nn.Module):
            def forward(self, x, weight):
                return OP(x, weight, None)

        inputs = (torch.ones(1, channels, size, size), torch.ones(channels, channels, 3, 3))
        program = torch.export.export(Module(), inputs)
        calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert calls == ["hasten.upsample_conv2d.default"]
        nodes = program.run_decompositions().graph.nodes
        return [n.args[6] for n in nodes if str(n.target) == "aten.convolution.default"]

    assert convolutions(128, 4) == [False]
    assert convolutions(128, 17) == [True]  # transposed


@pytest.mark.parametrize(
    "last",
    [pytest.param(False, id="contiguous", marks=pytest.mark.slow), pytest.param(True, id="channels-last")],
)
def test_inductor_and_package_with_dynamic_sizes(last, tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 12, 3, padding=1)

        def forward(self, x):
            return OP(x, self.conv.weight, self.conv.bias)

    def image(*shape):
        return torch.randn(shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    module, dims = Module().eval(), {n: torch.export.Dim(f"d{n}", max=512) for n in (0, 2, 3)}
    program = torch.export.export(module, (image(2, 8, 6, 9),), dynamic_shapes=(dims,))
    other = image(3, 8, 11, 4)
    with torch.no_grad():
        expected = upsample_conv2d.reference(other, module.conv.weight, module.conv.bias)
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        assert (compiled(other) - expected).abs().max() <= 2e-6
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "up.pt2"))
        assert (torch._inductor.aoti_load_package(path)(other) - expected).abs().max() <= 2e-6


X, W = torch.ones(1, 4, 5, 5), torch.ones(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], W, None), "input (4, 5, 5), weight (6, 4, 3, 3); "
         "give (batch, channels, height, width), (outputs, channels, 3, 3)"),
        ((X, W[..., :1], None), "input (1, 4, 5, 5), weight (6, 4, 3, 1); the kernel must be 3x3"),
        ((X, W[:, :2], None), "input (1, 4, 5, 5), weight (6, 2, 3, 3); "
         "the weight must have as many input channels as the input"),
        ((X, W, torch.ones(4)), "input (1, 4, 5, 5), weight (6, 4, 3, 3); bias has shape (4,), not (6,)"),
    ],
    ids=["rank", "kernel", "channels", "bias"],
)  # fmt: skip
def test_wrong_arguments_get_one_sentence(arguments, message):
    with pytest.raises(UsageError) as caught:
        OP(*arguments)
    assert str(caught.value) == f"upsample_conv2d: {message}"


def test_unknown_implementation():
    with pytest.raises(UsageError) as caught:
        upsample_conv2d.upsample_conv2d(X, W, implementation="phase")
    assert str(caught.value) == "upsample_conv2d: unknown implementation 'phase'; use 'phases' or 'direct'"
