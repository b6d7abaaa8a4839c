"""The registry: names, counts, inputs, random weights, and what is refused."""

import subprocess
import sys

import pytest
import torch

from hasten.errors import UsageError
from hasten.models.census import census
from hasten.models.registry import BUNDLED, get, names

pytest.importorskip("diffusers")

FULL = [n for n in names() if not n.endswith("-reduced")]
REDUCED = [n for n in names() if n.endswith("-reduced")]

# Published or counted from the checkpoints of the original models.
PARAMETERS = {
    "sd15-unet": 859_520_964,
    "sd15-vae-decoder": 49_490_199,
    "sdxl-unet": 2_567_463_684,
    "pixart-alpha": 611_349_152,
    "stable-audio-dit": 1_056_939_136,
    "flux-dev": 11_901_408_320,
}
# Counted elsewhere, by hooks on real-size runs of the three convolutional models.
COUNTS = {
    "sd15-unet": {"group-norm-act": 61, "group-norm-act.silu": 45, "attention": 32, "geglu": 16, "upsample-conv": 3},
    "sd15-vae-decoder": {"group-norm-act": 30, "group-norm-act.silu": 29, "attention": 1, "upsample-conv": 3},
    "sdxl-unet": {"group-norm-act": 46, "group-norm-act.silu": 35, "attention": 140, "geglu": 70, "upsample-conv": 2},
    "flux-dev": {"attention": 19 + 38},
    "latte": {"attention": 28 * 3},
    "pixart-alpha": {"attention": 28 * 2},
    "dit-xl-2": {"attention": 28},
    "stable-audio-dit": {"attention": 24 * 2},
}


def test_every_architecture_has_a_reduced_form():
    assert {n.removesuffix("-reduced") for n in REDUCED} == set(FULL) - set(BUNDLED)


@pytest.mark.parametrize("name", COUNTS)
def test_expected_counts(name):
    assert get(name).expected == COUNTS[name]
    assert get(name, reduced=True).expected == COUNTS[name]


@pytest.mark.parametrize("name", names())
def test_the_module_calls_what_is_expected_of_it(name):
    adapter = get(name)
    assert census(adapter.skeleton(), adapter.inputs) == adapter.expected


@pytest.mark.parametrize("name", ["sd15-unet-reduced", "scenes-unet", "pixart-alpha-reduced"])
def test_the_classic_spelling_has_the_same_sites(name):
    adapter = get(name, processor="classic")
    assert census(adapter.skeleton(), adapter.inputs) == adapter.expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert get(name).parameters == PARAMETERS[name]


def test_a_reduced_form_is_small_and_counted_without_building_it():
    adapter = get("sd15-unet", reduced=True)
    assert adapter.name == "sd15-unet-reduced"
    assert adapter.parameters < 10_000_000
    assert adapter.parameters == sum(p.numel() for p in adapter.module().parameters())


@pytest.mark.parametrize("name", REDUCED)
def test_the_output_depends_on_every_input_that_is_data(name):
    adapter = get(name)
    module, inputs, others = adapter.module(), adapter.example_inputs(batch=1), adapter.example_inputs(batch=1, seed=1)
    output = module(**inputs)
    assert isinstance(output, torch.Tensor)
    assert output.dtype == torch.float32
    assert torch.isfinite(output).all()
    for key, value in inputs.items():
        if key in ("img_ids", "txt_ids"):
            assert torch.equal(value, others[key])
            continue
        changed = module(**{**inputs, key: others[key]})
        assert (changed - output).norm() / output.norm() > 0.02, key


@pytest.mark.parametrize("name", names())
def test_another_seed_changes_every_value_that_is_data(name):
    adapter = get(name)
    if name in ("flux-dev", "latte", "sdxl-unet", "sd15-unet", "pixart-alpha", "stable-audio-dit", "dit-xl-2"):
        adapter = get(name, reduced=True)  # the same draws, in less memory
    one, two, again = adapter.example_inputs(), adapter.example_inputs(seed=1), adapter.example_inputs()
    for key, value in one.items():
        assert torch.equal(value, again[key])
        assert value.shape == two[key].shape
        assert (key in ("img_ids", "txt_ids")) == torch.equal(value, two[key])


def test_inputs_come_in_the_order_of_the_forward_and_in_the_batch_asked_for():
    import inspect

    for name in (*REDUCED, *BUNDLED):
        adapter = get(name)
        forward = inspect.signature(type(adapter.skeleton()).forward).parameters
        inputs = adapter.example_inputs(batch=3)
        assert list(inputs) == list(forward)[1:]
        for key, axes in adapter.dynamic_dims.items():
            assert all(inputs[key].shape[axis] == 3 for axis, size in axes.items() if size == "batch")


def test_a_type_applies_to_data_but_not_to_times():
    inputs = get("sdxl-unet-reduced").example_inputs(dtype=torch.bfloat16)
    assert {k: v.dtype for k, v in inputs.items()} == {
        "sample": torch.bfloat16,
        "timestep": torch.float32,
        "encoder_hidden_states": torch.bfloat16,
        "text_embeds": torch.bfloat16,
        "time_ids": torch.float32,
    }
    assert get("dit-xl-2-reduced").example_inputs(dtype=torch.float16)["class_labels"].dtype == torch.int64
    assert get("pixart-alpha-reduced").example_inputs()["encoder_attention_mask"].dtype == torch.bool


@pytest.mark.parametrize("name", ["sdxl-unet-reduced", "flux-dev-reduced", "stable-audio-dit-reduced"])
def test_a_half_precision_model_takes_half_precision_inputs(name):
    adapter = get(name)
    output = adapter.module().bfloat16()(**adapter.example_inputs(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert torch.isfinite(output).all()


def test_random_weights_are_the_same_every_time_and_for_both_spellings():
    adapter = get("sd15-vae-decoder-reduced")
    inputs = adapter.example_inputs()
    first, second = adapter.module(), adapter.module()
    assert first is not second
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(p.requires_grad for p in first.parameters())
    classic = get("sd15-vae-decoder-reduced", processor="classic").module()
    torch.testing.assert_close(classic(**inputs), first(**inputs), rtol=1e-4, atol=1e-4)


def test_weights_in_another_type_are_the_same_ones_rounded():
    adapter = get("sd15-unet-reduced")
    wanted, found = adapter.module().bfloat16().state_dict(), adapter.module(torch.bfloat16).state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in wanted.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_export_with_dynamic_sizes_holds_for_other_sizes():
    adapter = get("sd15-vae-decoder-reduced")
    module = adapter.module()
    program = torch.export.export(
        module, (), adapter.example_inputs(batch=2), dynamic_shapes=adapter.dynamic_shapes(), strict=False
    )
    latent = torch.randn(3, 4, 5, 7)
    torch.testing.assert_close(program.module()(latent=latent), module(latent=latent))


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_every_architecture_exports_with_dynamic_sizes(name):
    adapter = get(name)
    module = adapter.module()
    program = torch.export.export(
        module, (), adapter.example_inputs(batch=2), dynamic_shapes=adapter.dynamic_shapes(), strict=False
    )
    inputs = adapter.example_inputs(batch=3, seed=1)
    for key, axes in adapter.dynamic_dims.items():
        for axis, size in axes.items():
            if size not in ("batch", "height", "width"):
                inputs[key] = inputs[key].narrow(axis, 0, inputs[key].shape[axis] - 1).contiguous()
    torch.testing.assert_close(program.module()(**inputs), module(**inputs))


def test_dynamic_shapes_know_multiples_and_names():
    adapter = get("sd15-unet-reduced")
    shapes = adapter.dynamic_shapes("height")
    assert list(shapes) == ["sample", "timestep", "encoder_hidden_states"]
    assert shapes["timestep"] is None
    assert {axis: dim.__name__ for axis, dim in shapes["sample"].items()} == {2: "8*height_by_8"}
    assert adapter.multiples == {"height": 8, "width": 8}
    with pytest.raises(UsageError) as caught:
        adapter.dynamic_shapes("depth")
    assert str(caught.value) == ("sd15-unet-reduced has no dynamic size 'depth'; there are batch, height, text, width")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: get("sd15-unett"),
            "unknown model 'sd15-unett'; `hasten models` lists the names. Did you mean 'sd15-unet'?",
        ),
        (lambda: get("scenes-unet", reduced=True), "scenes-unet is small already; there is no reduced form of it"),
        (lambda: get("scenes-dit-reduced"), "scenes-dit is small already; there is no reduced form of it"),
        (
            lambda: get("sd15-unet", processor="sdp"),
            "unknown attention processor 'sdp'; there are sdpa, classic. Did you mean 'sdpa'?",
        ),
        (
            lambda: get("flux-dev-reduced", processor="classic"),
            "flux-dev-reduced has an attention processor of its own; processor='classic' does not apply to it",
        ),
        (
            lambda: get("sd15-unet-reduced", weights="."),
            "sd15-unet-reduced: weights come with their own sizes; ask for sd15-unet without reduced",
        ),
        (
            lambda: get("sd15-unet", variant="fp16"),
            "sd15-unet: variant='fp16' chooses among the files of weights=; name a directory",
        ),
        (
            lambda: get("scenes-unet", variant="fp16"),
            "scenes-unet: variant='fp16' chooses among the files of weights=; name a directory",
        ),
        (
            lambda: get("scenes-dit", weights="my/dit"),
            "scenes-dit has bundled weights and takes no others; name the directory my/dit itself as the source",
        ),
        (
            lambda: get("sd15-unet-reduced").example_inputs(batch=0),
            "sd15-unet-reduced: example inputs of batch 0 were asked for; give at least 1",
        ),
    ],
)
def test_message_says_what_is_wrong(call, message):
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == message


def test_names_import_neither_torch_nor_diffusers():
    code = (
        "import sys; from hasten.models.registry import names; assert len(names()) == 19;"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_adapter_is_made_without_diffusers():
    code = (
        "import sys; from hasten.models.registry import get, names; [get(n) for n in names()];"
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_real_decoder_runs():
    adapter = get("sd15-vae-decoder")
    image = adapter.module()(latent=torch.randn(1, 4, 16, 16))
    assert image.shape == (1, 3, 128, 128)
    assert torch.isfinite(image).all()


def test_a_skeleton_leaves_what_it_imports_alone() -> None:
    """Modules of diffusers that are imported while everything is made on meta would keep tensors without numbers."""
    program = (
        "from hasten.models import registry\n"
        "registry.get('dit-xl-2').skeleton()\n"
        "from diffusers.hooks import mag_cache\n"
        "print(mag_cache.FLUX_MAG_RATIOS.device)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["cpu"], done.stderr
