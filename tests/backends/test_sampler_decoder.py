"""A decoder in the sampler's engine: the pixels of decoding outside, once a run, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_net import LABELS, PROCESS, SHAPE, Net, examples, unit_noise
from torch import nn

import hasten
from hasten.backends.decoder import Decoder, decoder_of, origin
from hasten.backends.sampler import Sampler
from hasten.errors import UsageError
from hasten.models.registry import get
from hasten.models.scenes.adapters import FOLDER
from hasten.tools.generate_loop import LoopDenoise, sampling_of

STEPS = 4
TARGETS = ("onnxruntime:cpu", pytest.param("aoti:cpu", marks=pytest.mark.slow))
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def autoencoder(**options: Any) -> Any:
    """Random weights, the same every time."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(**{**VAE, **options}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A local diffusers directory."""
    found = tmp_path_factory.mktemp("vae")
    autoencoder().save_pretrained(found)
    return Path(found)


def built(out: Any, target: str, decoder: Decoder | None, **options: Any) -> Sampler:
    engine = hasten.build(
        Net().eval(),
        target=target,
        out=out / "sampler",
        example_kwargs=examples(2),
        sampling=hasten.Sampling("ddim", STEPS, rows=8, process=PROCESS, decoder=decoder, **options),
    )
    return hasten.sampler(engine)


@pytest.fixture(scope="module", params=TARGETS)
def decoding(request: Any, tmp_path_factory: Any, folder: Path) -> Sampler:
    return built(tmp_path_factory.mktemp("engine"), request.param, decoder_of(str(folder), unit=True))


def run(sampler: Sampler, **options: Any) -> Any:
    return sampler(latents=unit_noise(1)[0], class_labels=LABELS, **options)


def outside(latents: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines decode: divide, shift, decode, rescale."""
    vae = autoencoder()
    with torch.no_grad():
        made = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    return (made / 2 + 0.5).clamp(0, 1)


def test_pixels_are_those_of_decoding_outside(decoding: Sampler) -> None:
    made = run(decoding)
    assert made.pixels.shape == (2, 3, 16, 16)
    expected = outside(made.latents)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(made.pixels, expected, rtol=2e-5, atol=2e-5)


def test_chunks_decode_once_and_previews_when_asked(decoding: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Tensor] = []
    decode = decoding.decode

    def counted(latents: torch.Tensor) -> torch.Tensor:
        calls.append(latents)
        return decode(latents)

    monkeypatch.setattr(decoding, "decode", counted)
    whole = run(decoding).pixels
    assert torch.equal(run(decoding, chunk=1).pixels, whole)
    assert len(calls) == 2
    seen: list[torch.Tensor] = []
    run(decoding, chunk=2, callback=lambda c: seen.append(decode(c.preview)), decode=False)
    assert len(calls) == 2
    assert len(seen) == 2
    assert seen[0].shape == whole.shape
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_latents_alone(decoding: Sampler) -> None:
    made = run(decoding, decode=False)
    assert made.pixels is None
    assert torch.equal(made.latents, run(decoding).latents)
    with pytest.raises(UsageError, match=r"latents is \(1, 4, 8, 8\), and the engine makes \(2, 4, 8, 8\)"):
        decoding.decode(torch.zeros(1, 4, 8, 8))


def test_the_manifest_says_what_the_decoder_is(decoding: Sampler) -> None:
    loop = hasten.load(decoding.engine.path).manifest.loop
    assert loop is not None
    described = loop["decoder"]
    assert (described["scaling_factor"], described["shift_factor"], described["unit"]) == (0.3611, 0.1159, True)
    assert described["artifact"].startswith("decoder.")
    assert described["artifact"] in decoding.engine.manifest.files
    (note,) = (n for n in decoding.engine.report["notes"] if n.startswith("decoder: "))
    assert "group-norm-act" in note


def test_an_engine_without_a_decoder(decoding: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that were built before there were any."""
    monkeypatch.setattr(decoding, "loop", {k: v for k, v in decoding.loop.items() if k != "decoder"})
    assert run(decoding).pixels is None
    for ask in (lambda: run(decoding, decode=True), lambda: decoding.decode(torch.zeros(SHAPE))):
        with pytest.raises(UsageError, match=r"has no decoder; build it with one .*--decoder DIR"):
            ask()


def test_what_a_decoder_can_be(folder: Path) -> None:
    given = decoder_of(autoencoder())
    assert given[1:] == (0.3611, 0.1159, False)
    named = decoder_of("sd15-vae-decoder-reduced")
    assert named[1:] == (0.18215, 0.0, False)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(given.module(z), decoder_of(folder).module(z))
        pixels = decoder_of("own", "scenes-unet").module(torch.full((1, 12, 16, 16), 3.0))
    assert pixels.shape == (1, 3, 32, 32)
    assert float(pixels.max()) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nn.Linear(2, 2), r"a diffusers AutoencoderKL, .* is wanted, and this is a Linear; give Decoder\(module\)"),
        ("scenes-unet", "decoder 'scenes-unet' is a .*; give a diffusers AutoencoderKL's directory"),
        ("own", "decoder 'own' is that of a bundled model .*, and this is none; give the directory"),
        ("sd15-vae-decodr", "sd15-vae-decoder"),
    ],
)
def test_what_is_no_decoder(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decoder_of(source)


def test_factors_that_cannot_be_applied(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"latents_mean": [0.0] * 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="normalises latents channel by channel"):
        decoder_of(tmp_path)


def test_a_decoder_needs_fixed_sizes(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    with pytest.raises(UsageError, match=r"dynamic sizes .*the decoder of a sampler is built for one size of latents"):
        hasten.build(
            Net().eval(),
            target="onnxruntime:cpu",
            out=tmp_path / "engine",
            example_kwargs=examples(4),
            dynamic_shapes={name: {0: batch} for name in examples(4)},
            sampling=hasten.Sampling(process=PROCESS, decoder=Decoder(nn.Identity())),
        )
    assert not (tmp_path / "engine").exists()


def test_modules_that_return_more_or_other_types() -> None:
    """The first tensor, in float32, of a module in half precision."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 2.0, dtype=torch.float16))

        def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return latents * self.scale, latents

    made = origin(Decoder(Half(), scaling_factor=0.5, shift_factor=1.0), SHAPE, "cpu")
    pixels = made.module(torch.full(SHAPE, 0.25))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.full(SHAPE, 3.0))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime:cpu", "aoti:cpu"])
def test_generate_decodes_in_the_engine(tmp_path: Path, target: str) -> None:
    if not (FOLDER / "unet.safetensors").is_file():
        pytest.skip("the bundled weights are missing")
    adapter = dataclasses.replace(get("scenes-unet"), batch=4)
    engine = hasten.build(adapter, target=target, out=tmp_path / "e", sampling=sampling_of(adapter, "ddim", 3, 2.0))
    denoise = LoopDenoise(engine, adapter)
    made = denoise.sample([3, 9], seed=1)
    assert torch.equal(denoise.generate([3, 9], seed=1), made.pixels)
    torch.testing.assert_close(made.pixels, denoise.pixels(made.latents), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_a_plan_holds_the_decoders_kernels(tmp_path: Path) -> None:
    """Attention behind the loop is straight-line code, which TensorRT-RTX fuses."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    decoder = decoder_of(autoencoder().half())
    sampler = built(tmp_path, "tensorrt-rtx:sm89", decoder)
    audit = sampler.loop["decoder"]["audit"]
    assert audit["readable"]
    assert audit["counts"]["corrltn"] > 5
    assert audit["counts"]["cjmp"] == 0
    assert audit["stream_capturable"]
