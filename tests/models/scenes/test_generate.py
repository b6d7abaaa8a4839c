"""Making pictures: against networks that know the answer, and the seeds' promises."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hasten.errors import HastenError, UsageError
from hasten.models.random_weights import fill
from hasten.models.registry import get
from hasten.models.scenes import adapters
from hasten.models.scenes.data import NULL_CLASS, render
from hasten.models.scenes.generate import generate, initial_noise, solver, write_grid
from hasten.passes.solvers.schedule import alpha_bar


@pytest.fixture(params=["scenes-unet", "scenes-dit"])
def adapter(request):
    return get(request.param)


def knowing(adapter, pictures):
    """A network that knows the picture of every label (17, 3, 32, 32) and answers exactly, in the model's own terms."""
    spec = adapters.specification(adapter.name)
    clean = F.pixel_unshuffle(pictures, spec["unshuffle"])
    bars = torch.from_numpy(alpha_bar("squaredcos_cap_v2"))

    def denoise(x, times, labels):
        assert len(x) == len(times) == len(labels)
        x0, x = clean[labels].double(), x.double()
        if spec["objective"] == "v_prediction":
            bar = bars[times.long()][:, None, None, None]
            eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
            return (bar.sqrt() * eps - (1 - bar).sqrt() * x0).float()
        sigma = times.double()[:, None, None, None] / 1000
        return ((x - x0) / sigma).float()

    return denoise


@pytest.fixture(scope="module")
def pictures():
    return torch.from_numpy(render(17, seed=3).images)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_network_that_knows_the_picture_draws_it(adapter, pictures, steps):
    images = generate(knowing(adapter, pictures), adapter, [4, 0, 15], steps=steps, guidance=1.0)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, pictures[[4, 0, 15]], rtol=0, atol=2e-5)


def test_guidance_goes_from_the_unlabelled_picture_past_the_labelled_one(adapter, pictures):
    soft = pictures * 0.2  # so that nothing is clamped
    images = generate(knowing(adapter, soft), adapter, [4, 9], steps=5, guidance=3.0)
    wanted = soft[NULL_CLASS] + 3 * (soft[[4, 9]] - soft[NULL_CLASS])
    torch.testing.assert_close(images, wanted, rtol=0, atol=5e-5)


def test_the_network_sees_labels_first_and_then_none(adapter):
    seen = []

    def denoise(x, times, labels):
        seen.append((labels.tolist(), times.tolist(), x.dtype))
        assert torch.equal(x[:2], x[2:])
        return torch.zeros_like(x)

    generate(denoise, adapter, [3, 5], steps=2, guidance=2.0)
    times = solver(adapter, 2).time.tolist()
    assert seen == [([3, 5, NULL_CLASS, NULL_CLASS], [t] * 4, torch.float32) for t in times]


def test_noise_depends_on_the_seed_and_the_pictures_number_alone(adapter):
    noise = initial_noise(adapter, 3, seed=5)
    assert noise.shape == (3, *adapter.inputs[0].shape[1:])
    assert torch.equal(noise[:2], initial_noise(adapter, 2, seed=5))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, initial_noise(adapter, 3, seed=6))
    starts = []

    def one(x, times, labels):
        starts.append(x)
        return x * 0

    def other(x, times, labels):
        starts.append(x)
        return x * 0.5

    generate(one, adapter, [1], steps=1, seed=9)
    generate(other, adapter, [2], steps=1, seed=9)
    assert torch.equal(starts[0], starts[1])


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """The folder of weights replaced by an empty one with the configurations."""
    for stem in ("unet", "dit"):
        (tmp_path / f"{stem}.json").write_text((adapters.FOLDER / f"{stem}.json").read_text())
    monkeypatch.setattr(adapters, "FOLDER", tmp_path)
    return tmp_path


def test_half_precision_weights_are_read_into_float32(adapter, untrained):
    from safetensors.torch import save_file

    stem = adapter.name.removeprefix("scenes-")
    spec = json.loads((untrained / f"{stem}.json").read_text())
    model = fill(adapters.MODELS[adapter.name].family.model_class()(**spec["config"])).eval()
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(half, untrained / f"{stem}.safetensors")
    module = adapter.module()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    inputs = adapter.example_inputs()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    wanted = model(*inputs.values()).sample
    torch.testing.assert_close(module(**inputs), wanted.detach())
    for key, value in adapter.example_inputs(seed=1).items():
        assert not torch.equal(module(**{**inputs, key: value}), module(**inputs))


def test_message_says_how_to_train(adapter, untrained):
    stem = adapter.name.removeprefix("scenes-")
    with pytest.raises(HastenError) as caught:
        adapter.module()
    assert str(caught.value) == (
        f"{adapter.name} has no weights: {untrained / stem}.safetensors is missing; "
        f"train it with `python -m hasten.models.scenes.train {stem}`"
    )


def test_a_grid_has_every_picture_in_its_place(tmp_path, pictures):
    path = write_grid(pictures[:5], tmp_path / "grid.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 64, 3 * 64, 3)
    pixels = ((pictures[:5].permute(0, 2, 3, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    assert np.array_equal(sheet[64::2, 64:128:2], pixels[4])
    assert np.array_equal(sheet[1:64:2, 1:64:2], pixels[0])
    assert (sheet[64:, 128:] == 255).all()
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_messages_name_what_was_given(adapter, tmp_path):
    with pytest.raises(UsageError) as caught:
        generate(lambda x, t, y: x, adapter, [16], steps=1)
    assert str(caught.value) == "generate: labels are a list of numbers from 0 to 15; [16] was given"
    with pytest.raises(UsageError) as caught:
        generate(lambda x, t, y: x, get("sd15-unet"), [1], steps=1)
    assert str(caught.value) == ("generate: sd15-unet makes no scenes; the models that do are scenes-unet, scenes-dit")
    with pytest.raises(UsageError) as caught:
        write_grid(torch.zeros(1, 12, 16, 16), tmp_path / "grid.png")
    assert str(caught.value) == "write_grid: pictures are (B, 3, H, W); (1, 12, 16, 16) was given"
