"""Target names and the support table."""

from itertools import product

import pytest

from hasten.backends.target import ARCHITECTURES, DEVICES, DTYPES, OPS, SUPPORT, parse_target, supports
from hasten.errors import UsageError

EVERY_TARGET = (
    *(f"{b}:{d}" for b, devices in DEVICES.items() for d in devices),
    *(f"{b}:{a}" for b, names in ARCHITECTURES.items() for a in names),
    "tensorrt-rtx:sm89,sm120",
    "torch-tensorrt",
)


@pytest.mark.parametrize("text", EVERY_TARGET)
def test_every_target_reads_back_as_it_was_written(text):
    assert str(parse_target(text)) == text
    assert parse_target(parse_target(text)) == parse_target(text)


def test_parts_of_a_target():
    target = parse_target("tensorrt-rtx:sm89,sm120")
    assert (target.backend, target.device, target.architectures) == ("tensorrt-rtx", "cuda", ("sm89", "sm120"))
    assert [parse_target(t).opset for t in ("onnxruntime:cpu", "tensorrt:sm90", "tensorrt-rtx:sm89", "aoti:cpu")] == [
        23,
        22,
        22,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tensorrtx:sm89",
            "target 'tensorrtx:sm89': there is no backend 'tensorrtx'; backends: inductor, aoti, onnxruntime, "
            "tensorrt, tensorrt-rtx, torch-tensorrt. Did you mean 'tensorrt'?",
        ),
        (
            "",
            "target '': there is no backend ''; backends: inductor, aoti, onnxruntime, tensorrt, "
            "tensorrt-rtx, torch-tensorrt.",
        ),
        (
            "aoti:cdua",
            "target 'aoti:cdua': no device 'cdua'; aoti takes aoti:cpu or aoti:cuda. Did you mean 'cuda'?",
        ),
        ("inductor", "target 'inductor': no device given; inductor takes inductor:cpu or inductor:cuda."),
        (
            "tensorrt-rtx:sm88",
            "target 'tensorrt-rtx:sm88': tensorrt-rtx has no architecture 'sm88'; it takes sm75, sm80, sm86, sm89, "
            "sm120, sm121. Did you mean 'sm89'?",
        ),
        (
            "tensorrt-rtx:sm90",
            "target 'tensorrt-rtx:sm90': tensorrt-rtx has no architecture 'sm90'; it takes sm75, sm80, sm86, sm89, "
            "sm120, sm121. (tensorrt:sm90 is a target)",
        ),
        (
            "tensorrt-rtx",
            "target 'tensorrt-rtx': no GPU architecture given; tensorrt-rtx takes sm75, sm80, sm86, sm89, sm120, sm121",
        ),
        ("tensorrt-rtx:sm89,sm89", "target 'tensorrt-rtx:sm89,sm89': an architecture is named twice"),
        (
            "tensorrt:sm89,sm90",
            "target 'tensorrt:sm89,sm90': a TensorRT engine is for one architecture; build one engine for each",
        ),
        (
            "torch-tensorrt:cuda",
            "target 'torch-tensorrt:cuda': torch-tensorrt builds for the GPU at hand and takes nothing after it",
        ),
    ],
)
def test_message_for_what_is_no_target(text, message):
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_the_table_answers_every_question():
    answers = {
        supports(op, dtype, target, in_control_flow=inside)
        for op, dtype, target, inside in product(OPS, DTYPES, EVERY_TARGET, (False, True))
    }
    assert answers == {row.reason for row in SUPPORT}


def test_attention_cannot_stand_in_control_flow_for_tensorrt_only():
    refused = {t for t in EVERY_TARGET if supports("Attention", "float16", t, in_control_flow=True)}
    assert refused == {t for t in EVERY_TARGET if t.startswith("tensorrt")} | {"torch-tensorrt"}
    assert supports("Attention", "float16", "tensorrt-rtx:sm89", in_control_flow=True) == (
        "TensorRT's attention layer cannot stand inside If, Loop or Scan; spell it out as MatMul, Softmax, MatMul, "
        "which is fused into the same kernel"
    )
    assert supports("Attention", "float32", "tensorrt-rtx:sm89") is None


@pytest.mark.parametrize(
    ("op", "dtype", "target", "reason"),
    [
        ("GroupNormAct", "bfloat16", "tensorrt-rtx:sm75", "sm75 has no bfloat16 arithmetic; use float16"),
        ("GroupNormAct", "bfloat16", "tensorrt-rtx:sm89,sm75", "sm75 has no bfloat16 arithmetic; use float16"),
        ("GroupNormAct", "bfloat16", "tensorrt-rtx:sm89", None),
        (
            "com.microsoft.QuickGelu",
            "float16",
            "tensorrt-rtx:sm89",
            "TensorRT's ONNX parser has no importer for it ('Plugin not found'); use standard operators",
        ),
        ("com.microsoft.QuickGelu", "float16", "onnxruntime:cpu", None),
        ("com.microsoft.GroupNorm", "float32", "onnxruntime:cpu", "ONNX Runtime has a kernel for it on CUDA only"),
        ("com.microsoft.GroupNorm", "float32", "onnxruntime:cuda", None),
        (
            "Gelu",
            "bfloat16",
            "onnxruntime:cpu",
            "ONNX Runtime has no bfloat16 kernels on a CPU; use float32 or float16",
        ),
        ("com.microsoft.Gelu", "float32", "aoti:cpu", "a torch graph has no ONNX Runtime contrib operators"),
    ],
)
def test_facts(op, dtype, target, reason):
    assert supports(op, dtype, target) == reason


def test_message_names_the_unknown_operator_and_dtype():
    with pytest.raises(UsageError) as caught:
        supports("Atention", "float32", "aoti:cpu")
    assert str(caught.value) == "the support table has no operator 'Atention'. Did you mean 'Attention'?"
    with pytest.raises(UsageError) as caught:
        supports("Attention", "float64", "aoti:cpu")
    assert str(caught.value) == "the support table has no dtype 'float64'. Did you mean 'float16'?"
