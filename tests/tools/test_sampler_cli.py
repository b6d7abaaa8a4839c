"""``--solver``: a sampler's engine from the command line, what it makes, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from hasten import load
from hasten import sampler as sampler_of
from hasten.models.scenes.adapters import FOLDER
from hasten.passes.solvers.sample import sample

pytestmark = pytest.mark.skipif(not (FOLDER / "dit.safetensors").is_file(), reason="the bundled weights are missing")

QUICK = ("--count", 1, "--repeat", 1, "--target", "onnxruntime:cpu", "-q")


def test_generate_runs_the_whole_sampler_in_the_engine(hasten: Any, tmp_path: Any) -> None:
    """A solver with history and noise, and a step cache: the baseline's Python loop is given the same noise."""
    words = ("generate", "scenes-dit", "-o", tmp_path, "--solver", "dpm++2m-sde", "--steps", 4, *QUICK)
    done = hasten(*words, "--cache", "first-block:threshold=0.0001")
    assert done.code == 0, done.err
    document = json.loads((tmp_path / "scenes-dit.json").read_text())
    assert document["solver"] == "dpm++2m-sde"
    assert document["cache"]["mask"] == "1111"
    assert document["results"][1]["max_abs_difference"] < 1e-4
    manifest = json.loads((tmp_path / "scenes-dit" / "manifest.json").read_text())
    assert manifest["loop"]["guidance"] == "batched"
    assert manifest["loop"]["noise"] == "input"


def test_generate_runs_a_solver_with_a_guide(hasten: Any, tmp_path: Any) -> None:
    """Two networks in one engine: the baseline's Python loop asks the same two."""
    solver = "ltsp4:weight=8,spacing=leading,offset=1"
    done = hasten("generate", "scenes-unet", "-o", tmp_path, "--solver", solver, "--steps", 3, *QUICK)
    assert done.code == 0, done.err
    document = json.loads((tmp_path / "scenes-unet.json").read_text())
    assert document["guidance"] == 1
    assert document["results"][1]["max_abs_difference"] < 1e-4
    loop = json.loads((tmp_path / "scenes-unet" / "manifest.json").read_text())["loop"]
    assert (loop["networks"], loop["conditions"], loop["latents"][0]) == (2, ["class_labels", "guide_labels"], 1)


class Net(nn.Module):
    """Two pictures, guided: four samples a call."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return torch.sin(sample * timestep[:, None, None, None] / 1000) + prompt.mean((1, 2))[:, None, None, None]


def test_build_puts_an_onnx_model_and_what_it_was_trained_on_into_an_engine(hasten: Any, tmp_path: Any) -> None:
    config, source = tmp_path / "scheduler_config.json", tmp_path / "net.onnx"
    config.write_text(json.dumps({"beta_schedule": "linear", "prediction_type": "v_prediction"}))
    examples = (torch.randn(4, 3, 4, 4), torch.rand(4), torch.randn(4, 5, 6))
    names = ["sample", "timestep", "prompt"]
    torch.onnx.export(Net(), examples, source, dynamo=True, input_names=names, output_names=["out"], verbose=False)
    words = ("build", source, "--target", "onnxruntime:cpu", "--solver", "unipc", "--steps", 7, "--guidance", 3)
    shape = {"latent_channels": 3, "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = pytest.importorskip("diffusers").AutoencoderKL(**shape, **blocks, scaling_factor=0.5).eval()
    vae.save_pretrained(tmp_path / "vae")
    words = (*words, "--decoder", tmp_path / "vae")
    done = hasten(*words, "--scheduler", config, "--rows", 9, "-o", tmp_path / "engine", "-q")
    assert done.code == 0, done.err
    sampler = sampler_of(load(tmp_path / "engine"))
    loop = sampler.loop
    assert (loop["solver"].partition(":")[0], loop["steps"], loop["scale"], loop["rows"]) == ("unipc", 7, 3.0, 9)
    prompt, negative, unit = examples[2][:2], examples[2][2:], examples[0][:2]
    table = sampler.table()
    assert sampler.process.prediction == "v_prediction"

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        t = torch.full((2,), time)
        told, untold = Net()(x, t, prompt), Net()(x, t, negative)
        return untold + 3.0 * (told - untold)

    made = sampler(prompt=prompt, negative_prompt=negative, latents=unit)
    torch.testing.assert_close(made.latents, sample(denoise, table, unit), rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        expected = vae.decode(made.latents / 0.5, return_dict=False)[0]
    assert made.pixels is not None
    torch.testing.assert_close(made.pixels, expected, rtol=2e-5, atol=2e-5)


class Clock(nn.Module):
    """It predicts the time that it is told."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return 0 * sample + timestep[:, None, None, None]


def test_build_tells_the_network_a_thousandth_of_the_time(hasten: Any, tmp_path: Any) -> None:
    config, source = tmp_path / "scheduler_config.json", tmp_path / "net.onnx"
    flux = {"shift": 3.0, "use_dynamic_shifting": True, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    config.write_text(json.dumps(flux))
    names, examples = ["sample", "timestep"], (torch.zeros(1, 2, 4, 4), torch.zeros(1))
    torch.onnx.export(Clock(), examples, source, dynamo=True, input_names=names, output_names=["out"], verbose=False)
    words = ("build", source, "--target", "onnxruntime:cpu", "--scheduler", config, "--steps", 4, "-q")
    solver = ("--solver", "flow-euler:tokens=4096,spacing=trailing")
    done = hasten(*words, *solver, "--time-scale", "0.001", "-o", tmp_path / "engine")
    assert done.code == 0, done.err
    made = sampler_of(load(tmp_path / "engine"))(latents=torch.zeros(1, 2, 4, 4)).latents
    # Euler's steps of a velocity that is s itself, over the levels of FLUX at 4096 image tokens
    s = [1, 0.90453, 0.75951, 0.51284, 0]
    wanted = sum((b - a) * a for a, b in pairwise(s))
    torch.testing.assert_close(made, torch.full_like(made, wanted), rtol=1e-4, atol=1e-4)
    done = hasten(*words, "--solver", "flow-euler", "-o", tmp_path / "other")
    assert done.code == 2
    assert "shift depends on the picture's size (use_dynamic_shifting), and nothing says how far it goes" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": "abc"}, "num_train_timesteps: 'abc' is not a whole number"),
        ({"num_train_timesteps": -3}, "num_train_timesteps: -3 was given; it goes from 1"),
        ({"beta_start": "x"}, "beta_start: 'x' is not a number"),
        ({"beta_start": None}, "beta_start: None is not a number"),
        ({"beta_schedule": 3}, "beta_schedule: 3 is not a word"),
        ({"beta_schedule": "cosine"}, "unknown noise schedule 'cosine'"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas: 'x' is not a number"),
        ({"prediction_type": 5}, "prediction_type: 5 is not a word"),
        ({"shift": "abc"}, "shift: 'abc' is not a number"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous' is of a network that is told a function of the"),
    ],
)
def test_a_wrong_configuration_is_named_with_its_file(
    hasten: Any, tmp_path: Any, changes: dict[str, Any], message: str
) -> None:
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps({"beta_schedule": "linear", "_class_name": "DDIMScheduler", **changes}))
    words = ("build", "scenes-dit", "--target", "onnxruntime:cpu", "--solver", "unipc", "--scheduler", config)
    done = hasten(*words, "-o", tmp_path / "out")
    assert done.code == 2
    assert f"--scheduler: {config}: {message}" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["scenes-dit", "scenes-unet"])
@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("mask:bits=101", "mask: it was made for 3 steps and the run has 5; give a mask of 5, or stretch=nearest"),
        (
            "teacache:model=flux,signal=time-embedding,times=999/500/1",
            "teacache: times: 3 were given and the run has 5 steps; give one a step",
        ),
    ],
)
def test_a_mask_for_another_number_of_steps_is_refused_before_anything_is_built(
    hasten: Any, tmp_path: Any, model: str, cache: str, message: str
) -> None:
    words = ("--target", "onnxruntime:cpu", "--steps", 5, "--cache", cache, "-o", tmp_path / "out")
    done = hasten("generate", model, *words)
    assert (done.code, message in done.err) == (2, True), done.err
    assert not list((tmp_path / "out").glob("*"))
    if cache.startswith("mask"):  # in a loop each run decides by the times that it has
        done = hasten("build", model, "--solver", "unipc", *words)
        assert (done.code, message in done.err) == (2, True), done.err
        assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "scenes-dit", "--steps", "5"], "--steps is of a sampler; say which: --solver NAME"),
        (["build", "scenes-dit", "--time-scale", "0.1"], "--time-scale is of a sampler; say which: --solver NAME"),
        (
            ["build", "scenes-dit", "--solver", "unipc", "--time-scale", "0"],
            "--time-scale: '0' is not a number above 0",
        ),
        (["build", "scenes-dit", "--inpaint"], "--inpaint is of a sampler; say which: --solver NAME"),
        (["build", "scenes-dit", "--decoder", "own"], "--decoder is of a sampler; say which: --solver NAME"),
        (
            ["build", "sd15-unet-reduced", "--solver", "unipc", "--decoder", "own"],
            "decoder 'own' is that of a bundled model (scenes-unet, scenes-dit, scenes-video), and this is sd15-",
        ),
        (["build", "scenes-dit", "--solver", "unipc", "--decoder", "scenes-unet"], "decoder 'scenes-unet' is a "),
        (["build", "scenes-dit", "--solver", "unipk"], "no solver named 'unipk'; solvers: "),
        (["build", "scenes-dit", "--solver", "ddim"], "ddim is for diffusion processes, and this model is a flow"),
        (
            ["build", "scenes-dit", "--solver", "unipc", "--guidance-form", "bached"],
            "form of guidance 'bached' is none of none, batched, sequential, embedded. Did you mean 'batched'?",
        ),
        (["build", "scenes-dit", "--solver", "unipc", "--steps", "9", "--rows", "4"], "rows: 4 given, and 9 steps"),
        (["build", "scenes-dit", "--solver", "unipc", "--scheduler", "nowhere.json"], "nowhere.json cannot be read"),
        (["build", "flux-dev-reduced", "--solver", "unipc"], "must know what the network was trained on"),
        (["generate", "scenes-dit", "--solver", "unipk"], "no solver named 'unipk'"),
        (["generate", "scenes-dit", "--solver", "stsp"], "it is for diffusion; guide a flow's velocity inside"),
        (
            ["generate", "scenes-unet", "--solver", "caf"],
            "the one that is bundled is the guide of scenes-unet, for ltsp",
        ),
        (["build", "scenes-unet", "--solver", "stsp"], "stsp asks two networks, and one was given"),
        (["generate", "scenes-dit", "--solver", "unipc", "--target", "inductor:cpu"], "--solver: for engines"),
    ],
)
def test_wrong_usage(hasten: Any, tmp_path: Any, words: list[str], message: str) -> None:
    target = [] if "--target" in words else ["--target", "onnxruntime:cpu"]
    done = hasten(*words, *target, "-o", tmp_path / "out")
    assert done.code == 2
    assert message in done.err
