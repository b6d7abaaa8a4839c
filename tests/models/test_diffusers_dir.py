"""Weights from a directory on disk: safetensors only, everything checked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.errors import UsageError
from hasten.models.diffusers_dir import from_source, is_directory_source
from hasten.models.registry import get

diffusers = pytest.importorskip("diffusers")

FILE = "diffusion_pytorch_model.safetensors"
NARROW = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(**NARROW).eval()


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory):
    """A pipeline directory with a UNet and a VAE."""
    root = tmp_path_factory.mktemp("pipeline")
    unet.save_pretrained(root / "unet", safe_serialization=True)
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.save_pretrained(root / "vae", safe_serialization=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the UNet's directory, to spoil."""
    return shutil.copytree(saved / "unet", tmp_path / "unet")


def check(adapter, unet, **tolerance):
    inputs = adapter.example_inputs()
    wanted = unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample
    torch.testing.assert_close(adapter.module()(**inputs), wanted.detach(), **tolerance)


def test_a_directory_gives_the_saved_model_and_its_own_sizes(saved, unet):
    adapter = get("sd15-unet", weights=saved / "unet")
    assert adapter.trained
    assert adapter.name == "sd15-unet"
    assert adapter.expected == {
        "attention": 8,
        "geglu": 4,
        "group-norm-act": 21,
        "group-norm-act.silu": 17,
        "upsample-conv": 1,
    }
    assert adapter.inputs[0].shape == (2, 4, 16, 16)
    assert adapter.parameters == sum(p.numel() for p in unet.parameters())
    check(adapter, unet, rtol=0, atol=0)


def test_a_sharded_directory_is_read(unet, tmp_path):
    unet.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="60KB")
    assert (tmp_path / f"{FILE}.index.json").is_file()
    assert not (tmp_path / FILE).exists()
    check(from_source(str(tmp_path)), unet, rtol=0, atol=0)


def test_the_only_variant_is_taken(unet, tmp_path):
    half = diffusers.UNet2DConditionModel(**NARROW)
    half.load_state_dict(unet.state_dict())
    half.half().save_pretrained(tmp_path, safe_serialization=True, variant="fp16")
    adapter = get("sd15-unet", weights=tmp_path)
    module = adapter.module()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    check(adapter, unet, rtol=2e-2, atol=2e-2)
    with pytest.raises(UsageError) as caught:
        get("sd15-unet", weights=tmp_path, variant="ema").module()
    assert str(caught.value) == f"{tmp_path} has no variant 'ema'; there are fp16"


def test_several_variants_must_be_chosen_from(copy):
    (copy / FILE).rename(copy / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(copy / "diffusion_pytorch_model.fp16.safetensors", copy / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(UsageError) as caught:
        get("sd15-unet", weights=copy).module()
    assert str(caught.value) == f"{copy} has the variants ema, fp16; name one with variant="
    assert get("sd15-unet", weights=copy, variant="ema").module() is not None


def test_a_part_of_a_pipeline_is_read(saved, unet):
    source = f"{saved}#unet"
    assert is_directory_source(source)
    adapter = from_source(source)
    assert adapter.name == source
    check(adapter, unet, rtol=0, atol=0)


def test_of_an_autoencoder_the_decoder_is_taken(saved):
    adapter = from_source(f"{saved}#vae")
    assert adapter.family == "vae-decoder"
    latent = adapter.example_inputs()["latent"]
    assert latent.shape == (1, 4, 16, 16)
    vae = diffusers.AutoencoderKL.from_pretrained(saved / "vae").eval()
    torch.testing.assert_close(adapter.module()(latent), vae.decode(latent).sample.detach())


@pytest.mark.parametrize("name", ["dit-xl-2", "pixart-alpha", "latte", "stable-audio-dit", "flux-dev", "sdxl-unet"])
def test_every_class_comes_back_from_disk(name, tmp_path):
    reduced = get(name, reduced=True)
    module = reduced.module()
    module.model.save_pretrained(tmp_path, safe_serialization=True)
    adapter = from_source(str(tmp_path))
    assert adapter.family == reduced.family
    assert adapter.expected == reduced.expected
    inputs = reduced.example_inputs()
    assert list(adapter.example_inputs(batch=1)) == list(inputs)
    torch.testing.assert_close(adapter.module()(**inputs), module(**inputs), rtol=0, atol=0)


def test_a_pickle_is_refused(copy):
    torch.save(load_file(copy / FILE), copy / "diffusion_pytorch_model.bin")
    (copy / FILE).unlink()
    with pytest.raises(UsageError) as caught:
        get("sd15-unet", weights=copy).module()
    assert str(caught.value) == (
        f"{copy} has no safetensors; diffusion_pytorch_model.bin is a pickle, and pickles are not loaded. Convert it "
        "where you trust it: load it with diffusers and call save_pretrained(..., safe_serialization=True)"
    )


def spoil(directory, change):
    weights = load_file(directory / FILE)
    change(weights)
    save_file(weights, directory / FILE)


def test_missing_keys_are_named(copy):
    def drop(weights):
        for key in [k for k in weights if k.startswith("conv_out") or k == "conv_in.bias"]:
            del weights[key]

    spoil(copy, drop)
    with pytest.raises(UsageError) as caught:
        get("sd15-unet", weights=copy).module()
    assert str(caught.value) == (
        f"{copy} does not fit its config.json: conv_in.bias is missing; conv_out.bias is missing; "
        "conv_out.weight is missing"
    )


def test_unexpected_keys_are_named(copy):
    spoil(copy, lambda w: w.update({f"lora.{i}": torch.zeros(1) for i in range(5)}))
    with pytest.raises(UsageError) as caught:
        get("sd15-unet", weights=copy).module()
    assert str(caught.value) == (
        f"{copy} does not fit its config.json: lora.0 is not a parameter of the model; "
        "lora.1 is not a parameter of the model; lora.2 is not a parameter of the model and 2 more"
    )


def test_a_shape_that_does_not_fit_is_named(copy):
    spoil(copy, lambda w: w.update({"conv_in.bias": torch.zeros(3)}))
    with pytest.raises(UsageError) as caught:
        get("sd15-unet", weights=copy).module()
    assert str(caught.value) == f"{copy} does not fit its config.json: conv_in.bias has shape [3], [8] is needed"


def test_a_file_that_is_no_safetensors_is_refused(copy):
    (copy / FILE).write_bytes(b"\x80\x04 this is a pickle under another name")
    with pytest.raises(Exception, match=f"^{copy} could not be read: "):
        get("sd15-unet", weights=copy).module()


def rewrite(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_other_mistakes_say_what_to_do(saved, copy, tmp_path):
    def message(call):
        with pytest.raises(UsageError) as caught:
            call()
        return str(caught.value)

    assert message(lambda: get("sd15-unet", weights=saved)) == (
        f"{saved} is a pipeline, not a model; name one of its parts: unet, vae"
    )
    assert message(lambda: from_source(f"{saved}#unett")) == (
        f"{saved} has no part 'unett'; it has unet, vae. Did you mean 'unet'?"
    )
    assert message(lambda: get("sd15-unet", weights=saved / "vae")) == (
        f"{saved}/vae holds a AutoencoderKL, but sd15-unet is a UNet2DConditionModel; "
        "name a directory with a UNet2DConditionModel"
    )
    assert message(lambda: from_source(str(tmp_path / "none"))) == (
        f"no directory {tmp_path}/none; name a diffusers model directory, one with a config.json"
    )
    assert message(lambda: from_source(str(tmp_path))) == (
        f"{tmp_path} has no config.json; name a diffusers model directory"
    )
    rewrite(copy, _class_name="UNet2DConditionalModel")
    assert message(lambda: from_source(str(copy))) == (
        f"{copy} holds a UNet2DConditionalModel, which is not known; known are UNet2DConditionModel, UNet2DModel, "
        "AutoencoderKL, DiTTransformer2DModel, PixArtTransformer2DModel, LatteTransformer3DModel, StableAudioDiTModel, "
        "FluxTransformer2DModel. Did you mean 'UNet2DConditionModel'?"
    )
    rewrite(copy, _class_name="UNet2DConditionModel", addition_embed_type="image")
    assert message(lambda: from_source(str(copy))) == (
        "a UNet2DConditionModel with addition_embed_type='image' is not supported; only 'text_time' is"
    )
    rewrite(copy, addition_embed_type=None, quantization_config={})
    assert message(lambda: from_source(str(copy))) == (
        f"{copy}/config.json describes quantised weights, which are not read; save the model in float16 or float32"
    )
    (copy / FILE).unlink()
    rewrite(saved / "unet")  # unchanged
    (copy / "config.json").write_text((saved / "unet" / "config.json").read_text())
    assert message(lambda: from_source(str(copy)).module()) == (f"{copy} has no weights; {FILE} was looked for")
    (copy / "config.json").write_text("{}")
    assert message(lambda: from_source(str(copy))) == (
        f"{copy}/config.json does not name its class (_class_name); it is not a diffusers model's configuration"
    )
    assert not is_directory_source("sd15-unet")
