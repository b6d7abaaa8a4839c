import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.ops import geglu

OP = torch.ops.hasten.geglu


def compiled(x, approximate, gate_first):
    torch._dynamo.reset()
    return torch.compile(OP, fullgraph=True)(x, approximate, gate_first)


@pytest.mark.parametrize("run", [OP, compiled], ids=["eager", "inductor"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("gate_first", [False, True], ids=["value first", "gate first"])
def test_agrees_with_the_reference(run, approximate, gate_first):
    x = torch.randn(2, 5, 14) * 3
    expected = geglu.reference(x, approximate, gate_first)
    assert (run(x, approximate, gate_first) - expected).abs().max() <= 1e-5
    assert (geglu.reference(x, approximate, not gate_first) - expected).abs().max() > 0.1


def test_tanh_and_erf_are_not_exchanged():
    x = torch.full((1, 2), 2.7)
    assert abs(OP(x, "none", False) - OP(x, "tanh", False)).item() > 1e-3


@pytest.mark.parametrize("run", [OP, compiled], ids=["eager", "inductor"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_gates(run, approximate):
    gate = torch.tensor([-0.0, 0.0, 1e-30, -65504.0, 65504.0, -1e38, 1e38, torch.nan])
    y = run(torch.cat((torch.ones(8), gate)), approximate, False)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 5e-31, 0.0, 65504.0, 0.0, 1e38, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("run", [OP, compiled], ids=["eager", "inductor"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=["half", "bfloat16"])
def test_half_precision_is_rounded_once(run, dtype, bound):
    x = torch.randn(4, 64).to(dtype)
    y, expected = run(x, "tanh", False), geglu.reference(x, "tanh")
    assert y.dtype == dtype
    assert ((y - expected).abs() / (1 + expected.abs())).max() <= bound


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_backward_of_the_traced_form(approximate):
    torch._dynamo.reset()
    traced = torch.compile(OP, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: traced(x, approximate, False), (x,))
    far = torch.tensor([[1.0, -500.0]], requires_grad=True)
    traced(far, approximate, False).sum().backward()
    assert far.grad.tolist() == [[0.0, 0.0]]


def test_export_keeps_one_node_and_packages(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x):
            return OP(x, "none", False)

    x = torch.randn(2, 6, 8)
    program = torch.export.export(
        Module(), (x,), dynamic_shapes=({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)
    )
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["hasten.geglu.default"]
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "geglu.pt2"))
    other = torch.randn(3, 5, 8)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(other), OP(other, "none", False))


@pytest.mark.parametrize(
    ("x", "approximate", "message"),
    [
        (
            torch.ones(2, 5),
            "none",
            "geglu: the last axis of an input of shape (2, 5) cannot be halved; give an even one",
        ),
        (
            torch.ones(2, 4),
            "tanhh",
            "geglu: unknown approximation 'tanhh'; use 'none' (erf) or 'tanh'. Did you mean 'tanh'?",
        ),
        (torch.ones(2, 4, dtype=torch.int32), "none", "geglu: the input is torch.int32; give a floating-point tensor"),
    ],
    ids=["odd", "approximation", "dtype"],
)
def test_wrong_arguments_get_one_sentence(x, approximate, message):
    with pytest.raises(UsageError) as caught:
        OP(x, approximate, False)
    assert str(caught.value) == message
