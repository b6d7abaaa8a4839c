"""``--shapes`` for named models, and the random inputs of a size."""

import pytest
import torch

from hasten.backends.shapes import parse_profiles
from hasten.errors import UsageError
from hasten.models.registry import get
from hasten.tools.runner import open_runner, random_inputs
from hasten.tools.sizes import sized
from hasten.tools.source import resolve


def shapes_of(adapter):
    return {n: tuple(t.shape) for n, t in adapter.example_inputs().items()}


def test_a_fixed_size_holds_for_every_input_that_shares_it():
    adapter, dynamic = sized(get("sd15-unet-reduced"), parse_profiles("sample:3x4x32x16"))
    assert dynamic is None
    assert shapes_of(adapter) == {"sample": (3, 4, 32, 16), "timestep": (3,), "encoder_hidden_states": (3, 77, 64)}


def test_a_range_becomes_a_dynamic_shape():
    text = ("sample:1x4x16x16", "sample:2x4x16x32", "sample:8x4x16x64")
    adapter, dynamic = sized(get("sd15-unet-reduced"), parse_profiles(text))
    assert shapes_of(adapter)["sample"] == (2, 4, 16, 32)
    assert dynamic["sample"].keys() == {0, 3}
    batch, width = dynamic["sample"][0], dynamic["sample"][3]
    assert (batch.__name__, batch.min, batch.max) == ("batch", 1, 8)
    assert (width.root.__name__, width.fn(1), width.root.min, width.root.max) == ("width_by_8", 8, 2, 8)
    assert dynamic["timestep"].keys() == {0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "smaple:1x4x16x16",
            "shapes: sd15-unet-reduced has no input 'smaple'; inputs: sample, timestep, encoder_hidden_states. "
            "Did you mean 'sample'?",
        ),
        (
            "sample:1x4x16",
            "shapes: input 'sample' of sd15-unet-reduced has 4 dimensions (2, 4, 16, 16), 3 given",
        ),
        (
            "sample:1x5x16x16",
            "shapes: input 'sample' of sd15-unet-reduced, dimension 1 is fixed to 4, 5 given",
        ),
        ("sample:1x4x16x17", "shapes: width of sd15-unet-reduced must be a multiple of 8; 17 given"),
        ("sample:1x4x16x16,timestep:2", "shapes: size 'batch' is 1 in one input and 2 in 'timestep'"),
    ],
)
def test_sizes_that_the_model_cannot_have(text, message):
    with pytest.raises(UsageError) as caught:
        sized(get("sd15-unet-reduced"), parse_profiles(text))
    assert str(caught.value) == message


def test_a_range_of_a_multiple_has_multiples_at_its_ends():
    text = ("sample:1x4x16x12", "sample:1x4x16x16", "sample:1x4x16x64")
    with pytest.raises(UsageError) as caught:
        sized(get("sd15-unet-reduced"), parse_profiles(text))
    assert str(caught.value) == "shapes: width of sd15-unet-reduced must be a multiple of 8; 12 to 64 given"


def test_random_inputs_are_a_named_models_own_examples_at_another_batch():
    pytest.importorskip("diffusers")
    runner = open_runner(resolve("scenes-dit"))
    made = random_inputs(runner, 1, {"hidden_states": (5, 3, 32, 32)})
    expected = get("scenes-dit").example_inputs(5, 1)
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
