from dataclasses import replace

import pytest

from hasten.backends.choosing import Choosing, from_options
from hasten.errors import UsageError
from hasten.passes.choice import DIRECT, Candidate, Choice, Layer, Limits, fastest_predicted, within_budget
from hasten.passes.ops.winograd_conv2d import select

LAYER = Layer("conv2d", 2, 320, 320, 64, 64, threads=2)


def names(layer, **limits):
    found, why = select.candidates(layer, Limits(**limits))
    return [c.name for c in found], why


def chosen(name, saved, weight_bytes, workspace=0):
    candidate = Candidate(name, 1.0 - saved, weight_bytes, workspace)
    return Choice(LAYER, candidate, "", 1.0)


def test_a_layer_of_stable_diffusion_takes_four_by_four_tiles():
    found, _ = select.candidates(LAYER, Limits())
    choice = fastest_predicted(LAYER, found)
    assert choice.name == "winograd-f4"
    assert choice.direct_seconds / choice.candidate.predicted_seconds > 2.5
    assert str(LAYER) == "conv2d 320-320@64x64, batch 2, float32, cpu, 2 threads"
    assert choice.as_dict()["weight_bytes"] == 36 * 320 * 320 * 4


@pytest.mark.parametrize("sizes", [(1, 64, 64, 8, 8), (2, 4, 320, 64, 64), (2, 320, 4, 64, 64), (1, 128, 128, 2, 2)])
def test_small_and_narrow_layers_keep_the_library(sizes):
    layer = Layer("conv2d", *sizes, threads=2)
    found, _ = select.candidates(layer, Limits())
    assert fastest_predicted(layer, found).name == DIRECT


def test_what_forbids_a_form():
    assert names(LAYER)[0] == ["direct", "winograd-f2", "winograd-f4"]
    assert names(LAYER, max_error=1e-5)[0] == ["direct", "winograd-f2", "winograd-f4", "winograd-f6"]
    assert names(LAYER, max_error=3e-7)[0] == ["direct", "winograd-f2"]
    few, why = names(LAYER, max_error=1e-9)
    assert few == ["direct"]
    assert why == "winograd-f6 is expected to be 2.7e-06 off, 1.0e-09 is allowed"
    few, why = names(LAYER, strict_nan=True)
    assert (few, why) == (
        ["direct"],
        "a NaN or an infinity would spread over its whole tile, and strict-nan was asked for",
    )
    half = Layer("conv2d", 2, 320, 320, 64, 64, dtype="float16")
    assert names(half)[1] == "float16 loses digits in the transforms; it is used when asked for (half)"
    assert names(half, half=True, max_error=2e-3) == (
        ["direct"],
        "the C++ kernels compute in float32: on a CPU float16 keeps the library's convolution",
    )
    on_gpu = replace(half, device="cuda")
    assert names(on_gpu, half=True)[0] == ["direct"]  # the default bound on the error is for float32
    assert names(on_gpu, half=True, max_error=2e-3)[0] == ["direct", "winograd-f2", "winograd-f4"]
    brain = Layer("conv2d", 2, 320, 320, 64, 64, dtype="bfloat16")
    assert names(brain, half=True, max_error=1.0) == (
        ["direct"],
        "bfloat16 would lose more than a percent of every output",
    )
    few, why = names(Layer("conv2d", 1, 3, 64, 64, 64))
    assert why == "3 channels are too few to pay for the transforms"


def test_a_gpu_layer_is_not_chosen_by_the_model_of_a_processor():
    layer = Layer("conv2d", 2, 320, 320, 64, 64, device="cuda")
    found, _ = select.candidates(layer, Limits())
    assert fastest_predicted(layer, found).name == DIRECT


def test_memory_goes_where_it_saves_most_time_for_a_byte():
    choices = [chosen("winograd-f4", 0.5, 100), chosen("winograd-f4", 0.4, 10), chosen("winograd-f4", 0.1, 50)]
    assert [c.name for c in within_budget(choices, None)] == ["winograd-f4"] * 3
    assert [c.name for c in within_budget(choices, 160)] == ["winograd-f4"] * 3
    kept = within_budget(choices, 120)
    assert [c.name for c in kept] == ["winograd-f4", "winograd-f4", "direct"]
    assert kept[2].reason == "winograd-f4 needs 50 bytes of weights, which the memory budget of 120 does not leave"
    assert [c.name for c in within_budget(choices, 0)] == ["direct"] * 3


def test_workspaces_are_shared_and_weights_are_not():
    choices = [chosen("winograd-f4", 0.5, 10, workspace=80) for _ in range(2)]
    assert [c.name for c in within_budget(choices, 100)] == ["winograd-f4"] * 2
    kept = within_budget(choices, 99)
    assert [c.name for c in kept] == ["winograd-f4", "direct"]
    assert kept[1].reason == (
        "winograd-f4 needs 10 bytes of weights and a workspace of 80 bytes, which the memory budget of 99 does "
        "not leave"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "always"}, "tune: 'always' is none of off, cached, on."),
        ({"memory_budget": -1}, "memory_budget: -1 is not a number of bytes from 0 up"),
        ({"memory_budget": 1.5}, "memory_budget: 1.5 is not a number of bytes from 0 up"),
        ({"max_error": 0}, "max_error: 0 is not a relative error above 0, such as 1e-5"),
        ({"max_error": float("nan")}, "max_error: nan is not a relative error above 0, such as 1e-5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError) as caught:
        Choosing(**options)
    assert str(caught.value).startswith(message)


def test_options_among_others():
    assert from_options({"passes": "gelu", "tune": "off", "strict_nan": True}) == Choosing(tune="off", strict_nan=True)
