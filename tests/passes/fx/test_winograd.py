"""The pass that chooses convolutions: what it takes up, what it leaves, and that the graph computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hasten
from hasten.backends import dynamo
from hasten.backends.choosing import Choosing
from hasten.errors import UsageError, VerificationError
from hasten.passes import pipeline
from hasten.passes.fx.graph import FxGraph
from hasten.passes.ops.native import build
from hasten.passes.rule import Report

ALL = "group-norm-act,upsample-conv,winograd-conv2d{form=winograd-f4}"
UP = "upsample-conv,winograd-conv2d{form=winograd-phases-f4}"


@pytest.fixture(autouse=True)
def _native():
    assert build.load() is None, "the C++ kernels are not to be had on this machine"
    torch._dynamo.reset()
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block of a UNet, with its time embedding."""

    def __init__(self, channels=32, outputs=64):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(channels, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, outputs, 1)
        self.time = nn.Linear(16, outputs)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def inputs():
    return torch.randn(2, 32, 12, 12), torch.randn(2, 16)


def one(convolution, x, passes=ALL, **more):
    with torch.no_grad():
        want = convolution(x)
        module, report = hasten.optimize(convolution, (x,), passes=passes, **more)
        got = module(x)
    assert torch.allclose(got, want, atol=2e-5 * want.abs().max()), (got - want).abs().max()
    assert not report.reverted
    return report["winograd-conv2d"]


def spelled(report):
    return [(s.variant, s.spelling) for s in report.sites]


def test_a_residual_block_is_two_convolutions_and_their_statistics():
    block, arguments = Block().eval(), inputs()
    with torch.no_grad():
        want = block(*arguments)
        module, report = hasten.optimize(block, arguments, passes=ALL)
        assert torch.allclose(module(*arguments), want, atol=1e-5)
    assert spelled(report["winograd-conv2d"]) == [("winograd-f4", "norm-conv-other")] * 2
    counts = report.ops_after
    assert counts["hasten.winograd_conv2d"] == counts["hasten.group_norm_affine"] == 2
    assert "silu" not in {k for k, v in counts.items() if v > 1}
    assert "hasten.group_norm_act" not in counts
    assert {c["implementation"] for c in report.choices} == {"winograd-f4"}
    assert any("spread a NaN" in note for note in report.notes)


def test_weights_that_the_graph_holds_are_transformed_once_and_not_kept_twice():
    block, arguments = Block().eval(), inputs()
    with torch.no_grad():
        module, _ = hasten.optimize(block, arguments, passes=ALL)
    made = {b.shape for _, b in module.named_buffers() if b.ndim == 6}
    assert made == {torch.ops.hasten.winograd_weight(c.weight, 4).shape for c in (block.conv1, block.conv2)}
    assert not any("conv1.weight" in name or "conv2.weight" in name for name, _ in module.named_parameters())


def test_a_second_run_finds_nothing():
    with torch.no_grad():
        module, _ = hasten.optimize(Block().eval(), inputs(), passes=ALL)
    context = pipeline.Context(target="inductor:cpu")
    again = pipeline.run(FxGraph(module), pipeline.parse(ALL), context, Report())
    assert again["winograd-conv2d"].hits == 0


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, 2])
def test_padding_modes(mode, padding):
    conv = nn.Conv2d(32, 32, 3, padding=padding, padding_mode=mode).eval()
    found = one(conv, torch.randn(1, 32, 9, 10))
    assert spelled(found) == [("winograd-f4", "conv" if mode == "zeros" else "pad-conv")]


def test_a_pad_before_the_convolution():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3)

        def forward(self, x):
            return self.conv(F.pad(x, (0, 1, 2, 1)))

    assert spelled(one(Padded().eval(), torch.randn(1, 32, 9, 10))) == [("winograd-f4", "pad-conv")]


def test_an_upsampled_map():
    up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 48, 3, padding=1), nn.SiLU()).eval()
    assert spelled(one(up, torch.randn(2, 32, 7, 9), UP)) == [("winograd-phases-f4", "upsample-conv-silu")]


class Shared(nn.Module):
    """One norm for two convolutions; one weight for two maps."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        y = F.silu(self.norm(x))
        return self.conv(y) * self.conv(y + 1)


def test_what_somebody_else_reads_is_not_taken_up():
    assert spelled(one(Shared().eval(), torch.randn(2, 32, 8, 8))) == [("winograd-f4", "conv")] * 2


def test_what_is_added_must_have_the_shape_of_the_result():
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)
            self.row = nn.Buffer(torch.randn(1, 32, 1, 8))

        def forward(self, x):
            return self.conv(x) + self.row

    assert spelled(one(Row().eval(), torch.randn(2, 32, 8, 8))) == [("winograd-f4", "conv")]


@pytest.mark.parametrize(
    ("convolution", "reason"),
    [
        (nn.Conv2d(32, 32, 3, stride=2), "the convolution's stride is (2, 2), not (1, 1)"),
        (nn.Conv2d(32, 32, 3, groups=2), "the convolution's groups is 2, not 1"),
        (nn.Conv2d(32, 32, 3, dilation=2), "the convolution's dilation is (2, 2), not (1, 1)"),
        (nn.Conv2d(32, 32, 1), "the kernel is not 3x3"),
        (nn.Conv2d(32, 32, 5), "the kernel is not 3x3"),
    ],
    ids=["stride", "groups", "dilation", "1x1", "5x5"],
)
def test_other_convolutions_are_left_alone(convolution, reason):
    assert one(convolution.eval(), torch.randn(1, 32, 9, 9)).hits == 0


FLOAT32_ONLY = "the C++ kernels compute in float32: on a CPU float16 keeps the library's convolution"


@pytest.mark.parametrize(
    ("dtype", "half", "reason"),
    [
        (torch.float16, False, "float16 loses digits in the transforms; it is used when asked for (half)"),
        (torch.float16, True, FLOAT32_ONLY),
        (torch.bfloat16, True, "bfloat16 would lose more than a percent of every output"),
    ],
)
def test_half_precision_keeps_the_library_s_convolution_on_a_cpu(dtype, half, reason):
    conv, x = nn.Conv2d(64, 64, 3, padding=1).eval().to(dtype), torch.randn(1, 64, 8, 8).to(dtype)
    with torch.no_grad():
        module, report = hasten.optimize(conv, (x,), passes=ALL, choosing=Choosing(half=half))
        assert torch.equal(module(x), conv(x))
    assert report["winograd-conv2d"].hits == 0
    assert [c["reason"] for c in report.choices] == [reason]


class HalfNorm(nn.Module):
    """A norm in float32 with a scale and shift in ``dtype``, before a convolution."""

    def __init__(self, dtype):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.scale, self.shift = (nn.Buffer(torch.randn(1, 32).to(dtype)) for _ in range(2))

    def forward(self, x):
        return self.conv(torch.ops.hasten.group_norm_act(x, None, None, self.scale, self.shift, 4, 1e-5, "silu"))


@pytest.mark.parametrize(("dtype", "spelling"), [(torch.float16, "conv"), (torch.float32, "norm-conv")])
def test_operands_of_a_norm_that_are_not_float32_stay_with_it(dtype, spelling):
    passes, x = f"{ALL},native-group-norm", torch.randn(1, 32, 64, 64)
    assert spelled(one(HalfNorm(dtype).eval(), x, passes)) == [("winograd-f4", spelling)]


def test_choices_are_those_that_were_carried_out():
    two = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)).eval()
    with torch.no_grad():
        _, report = hasten.optimize(two, (torch.randn(1, 32, 8, 8),), passes=ALL, fuel=1)
    assert report["winograd-conv2d"].hits == 1
    assert sorted(c["implementation"] for c in report.choices) == ["direct", "winograd-f4"]
    assert next(n for n in report.notes if "spread a NaN" in n).startswith("1 convolutions spread")
    (miss,) = report["winograd-conv2d"].misses
    assert miss.reason == "it was not reached, or its replacement was taken back"


def test_a_choice_that_the_guard_refuses_is_a_miss_with_its_reason(monkeypatch):
    monkeypatch.setattr("hasten.passes.rules.winograd_conv2d.obstacle", lambda view, found, root: "so it is")
    with torch.no_grad():
        _, report = hasten.optimize(nn.Conv2d(32, 32, 3).eval(), (torch.randn(1, 32, 8, 8),), passes=ALL)
    assert [(c["implementation"], c["reason"]) for c in report.choices] == [("direct", "so it is")]
    assert [m.reason for m in report["winograd-conv2d"].misses] == ["so it is"]
    assert not any("spread a NaN" in note for note in report.notes)


def test_gradients_through_an_optimised_module_are_refused():
    conv, x = nn.Conv2d(32, 32, 3, padding=1).eval(), torch.randn(1, 32, 8, 8)
    module, _ = hasten.optimize(conv, (x,), passes=ALL)
    loss = module(x.requires_grad_()).sum()
    with pytest.raises(UsageError, match="hasten::winograd_conv2d has no backward pass: optimised modules are for"):
        loss.backward()


@pytest.mark.parametrize("where", ["model", "float32"])
def test_a_bound_on_the_error_is_not_met_by_nan(where):
    class Bad(nn.Module):
        def forward(self, x):
            return x * 2, (x - x) / (x - x) if where == "model" else x * 1e38 * 1e38 * 1e-38

    with torch.no_grad(), pytest.raises(VerificationError) as caught:
        hasten.optimize(Bad().eval(), (torch.ones(2),), choosing=Choosing(max_error=1e-3))
    assert str(caught.value).startswith(
        "max_error: in float64 the model itself gives NaN or infinity on the example inputs"
        if where == "model"
        else "max_error 0.001: with the library's own convolutions the model gives NaN or infinity where its float64"
    )


def large():
    """A layer for which the roofline model chooses tiles."""
    return nn.Conv2d(64, 64, 3, padding=1).eval(), torch.randn(1, 64, 32, 32)


def test_the_model_of_the_machine_chooses_where_nothing_was_measured():
    conv, x = large()
    with torch.no_grad():
        _, report = hasten.optimize(conv, (x,))
    (choice,) = report.choices
    assert choice["implementation"] == "winograd-f4"
    assert choice["reason"] == "fastest by the roofline model"
    assert choice["predicted_seconds"] < choice["predicted_direct_seconds"]
    assert choice["weight_bytes"] == 36 * 64 * 64 * 4


def test_limits():
    conv, x = large()
    with torch.no_grad():
        for choosing, reason in (
            (
                Choosing(strict_nan=True),
                "a NaN or an infinity would spread over its whole tile, and strict-nan was asked for",
            ),
            (
                Choosing(memory_budget=1000),
                "winograd-f4 needs 589824 bytes of weights, which the memory budget of 1000 does not leave",
            ),
        ):
            _, report = hasten.optimize(conv, (x,), choosing=choosing)
            assert [(c["implementation"], c["reason"]) for c in report.choices] == [("direct", reason)]


def test_the_whole_models_error_is_measured_and_bounded():
    conv, x = large()
    with torch.no_grad():
        _, report = hasten.optimize(conv, (x,), choosing=Choosing(max_error=1e-4))
        assert report.choices[0]["implementation"] == "winograd-f4"
        assert 1e-7 < report.error < 1e-6
        _, report = hasten.optimize(conv, (x,), choosing=Choosing(max_error=3.5e-7))
        assert report.choices[0]["implementation"] in ("winograd-f2", "direct")
        assert report.error <= 3.5e-7
        with pytest.raises(VerificationError) as caught:
            hasten.optimize(conv, (x,), choosing=Choosing(max_error=1e-12))
    assert str(caught.value).startswith(
        "max_error 1e-12 is below what any implementation gives: with the library's own"
    )
    assert caught.value.exit_code == 5


def test_without_the_kernels_nothing_changes(monkeypatch):
    conv, x = large()
    monkeypatch.setattr("hasten.passes.ops.native.build.load", lambda: "there is no compiler")
    with torch.no_grad():
        module, report = hasten.optimize(conv, (x,))
        assert torch.equal(module(x), conv(x))
    assert report["winograd-conv2d"].hits == 0
    assert report.notes == [
        "winograd-conv2d: convolutions keep the library's implementation, since there is no compiler"
    ]


def test_options_of_the_pass():
    conv, x = large()
    with pytest.raises(
        UsageError, match=r"passes: winograd-conv2d has no form 'winograd-f3'; forms: direct, winograd-f2"
    ):
        hasten.optimize(conv, (x,), passes="winograd-conv2d{form=winograd-f3}")
    with pytest.raises(UsageError, match=r"passes: winograd-conv2d has no option 'tile'; options: form, fuse"):
        hasten.optimize(conv, (x,), passes="winograd-conv2d{tile=4}")


def test_targets_that_are_exported_keep_their_convolutions():
    conv, x = large()
    for target in ("onnxruntime:cpu", "tensorrt-rtx:sm89", "inductor:cuda"):
        _, report = hasten.optimize(conv, (x,), target=target)
        assert report["winograd-conv2d"].hits == 0


def test_torch_compile_follows_changed_weights():
    block, arguments = Block().eval(), inputs()
    compiled = torch.compile(block, backend="hasten", options={"passes": ALL}, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(*arguments), block(*arguments), atol=2e-5)
            for parameter in block.parameters():
                parameter.mul_(1.5)
    assert dynamo.reports[-1]["winograd-conv2d"].hits == 2


def test_torch_compile_with_dynamic_sizes():
    conv, _ = large()
    compiled = torch.compile(conv, backend="hasten", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for size in (32, 40, 33):
            x = torch.randn(1, 64, size, size + 3)
            assert torch.allclose(compiled(x), conv(x), atol=2e-5)
    assert dynamo.reports[-1]["winograd-conv2d"].hits == 1


def test_export_of_a_cond_branch():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, flag, x):
            return torch.cond(flag, lambda x: self.conv(x), lambda x: x.clone(), (x,))

    model, x = Branch().eval(), torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        module, report = hasten.optimize(model, (torch.tensor(True), x))
        assert report["winograd-conv2d"].hits == 1
        for flag in (torch.tensor(True), torch.tensor(False)):
            assert torch.allclose(module(flag, x), model(flag, x), atol=2e-5)


def test_torch_compile_with_frozen_weights():
    """Where Dynamo leaves the weights in the graph they are transformed while it is compiled."""
    block, arguments = Block().eval(), inputs()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(block, backend="hasten", options={"passes": ALL}, fullgraph=True)
        assert torch.allclose(compiled(*arguments), block(*arguments), atol=2e-5)
    assert dynamo.reports[-1]["winograd-conv2d"].hits == 2
