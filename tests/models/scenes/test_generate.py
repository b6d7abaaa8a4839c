"""Making pictures and clips: against networks that know the answer, and the seeds' promises."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.errors import HastenError, UsageError
from hasten.models.random_weights import fill
from hasten.models.registry import get
from hasten.models.scenes import adapters, clips
from hasten.models.scenes.data import render
from hasten.models.scenes.generate import MILLISECONDS, generate, initial_noise, solver, write_gif, write_grid
from hasten.models.scenes.subject import subject
from hasten.passes.solvers.schedule import alpha_bar


@pytest.fixture(params=["scenes-unet", "scenes-dit", "scenes-video"])
def adapter(request):
    return get(request.param)


@pytest.fixture
def drawn(adapter):
    return subject(adapters.specification(adapter.name))


@pytest.fixture
def pictures(drawn):
    """One picture or clip for each label, that of no class last."""
    count = drawn.null_class + 1
    return torch.from_numpy(drawn.render(count, 3, np.arange(count) % drawn.null_class)[0])


def labels_of(drawn, condition):
    """Read the labels from a model's third input."""
    every = drawn.condition(torch.arange(drawn.null_class + 1)).flatten(1 if condition.ndim > 1 else 0)
    same = condition.reshape(len(condition), 1, -1) == every.reshape(1, len(every), -1)
    assert torch.equal(same.all(2).sum(1), torch.ones(len(condition)))
    return same.all(2).int().argmax(1)


def knowing(adapter, drawn, pictures):
    """A network that knows the picture of every label and answers exactly, in the model's own terms."""
    spec = adapters.specification(adapter.name)
    clean = drawn.latents(pictures, spec["unshuffle"])
    bars = torch.from_numpy(alpha_bar("squaredcos_cap_v2"))

    def denoise(x, times, condition):
        assert len(x) == len(times) == len(condition)
        assert x.shape[1:] == adapter.inputs[0].shape[1:]
        x0, x = clean[labels_of(drawn, condition)].double(), x.double()
        each = (len(x), *[1] * (x.ndim - 1))
        if spec["objective"] == "v_prediction":
            bar = bars[times.long()].view(each)
            eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
            return (bar.sqrt() * eps - (1 - bar).sqrt() * x0).float()
        sigma = times.double().view(each) / 1000
        return ((x - x0) / sigma).float()

    return denoise


@pytest.mark.parametrize("steps", [1, 7])
def test_a_network_that_knows_the_picture_draws_it(adapter, drawn, pictures, steps):
    images = generate(knowing(adapter, drawn, pictures), adapter, [4, 0, 15], steps=steps, guidance=1.0)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, pictures[[4, 0, 15]], rtol=0, atol=2e-5)


def test_guidance_goes_from_the_unlabelled_picture_past_the_labelled_one(adapter, drawn, pictures):
    soft = pictures * 0.2  # so that nothing is clamped
    images = generate(knowing(adapter, drawn, soft), adapter, [4, 9], steps=5, guidance=3.0)
    wanted = soft[-1] + 3 * (soft[[4, 9]] - soft[-1])
    torch.testing.assert_close(images, wanted, rtol=0, atol=5e-5)


def test_the_network_sees_labels_first_and_then_none(adapter, drawn):
    seen = []

    def denoise(x, times, condition):
        seen.append((labels_of(drawn, condition).tolist(), times.tolist(), x.dtype))
        assert torch.equal(x[:2], x[2:])
        return torch.zeros_like(x)

    generate(denoise, adapter, [3, 5], steps=2, guidance=2.0)
    times = solver(adapter, 2).time.tolist()
    assert seen == [([3, 5, drawn.null_class, drawn.null_class], [t] * 4, torch.float32) for t in times]


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
    for stem in ("unet", "dit", "video"):
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


def test_a_grid_has_every_picture_in_its_place(tmp_path):
    pictures = torch.from_numpy(render(5, seed=3).images)
    path = write_grid(pictures, tmp_path / "grid.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 64, 3 * 64, 3)
    pixels = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    assert np.array_equal(sheet[64::2, 64:128:2], pixels[4])
    assert np.array_equal(sheet[1:64:2, 1:64:2], pixels[0])
    assert (sheet[64:, 128:] == 255).all()
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_clips_are_film_strips_and_moving_pictures(tmp_path):
    frames = torch.from_numpy(clips.render(3, seed=3, frames=4).frames)
    strips = np.asarray(Image.open(write_grid(frames, tmp_path / "strips.png", scale=1)))
    assert strips.shape == (3 * 32, 4 * 32, 3)
    pixels = ((frames.permute(0, 1, 3, 4, 2) + 1) * 127.5).round().numpy().astype(np.uint8)
    assert np.array_equal(strips[64:, 32:64], pixels[2, 1])
    film = Image.open(write_gif(frames, tmp_path / "film.gif", columns=2, scale=2))
    assert (film.n_frames, film.size, film.info["duration"], film.info["loop"]) == (4, (128, 128), MILLISECONDS, 0)
    for number in range(4):
        film.seek(number)
        shown = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(shown[1:64:2, 64::2] - pixels[1, number]).mean() < 3  # a palette of 256 colours
        assert (shown[64:, 64:] > 250).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.gif", "strips.png"]


def test_messages_name_what_was_given(adapter, drawn, tmp_path):
    last = drawn.null_class - 1
    with pytest.raises(UsageError) as caught:
        generate(lambda x, t, y: x, adapter, [last + 1], steps=1)
    assert str(caught.value) == f"generate: labels are a list of numbers from 0 to {last}; [{last + 1}] was given"
    with pytest.raises(UsageError) as caught:
        generate(lambda x, t, y: x, get("sd15-unet"), [1], steps=1)
    assert str(caught.value) == (
        "generate: sd15-unet makes no scenes; the models that do are scenes-unet, scenes-dit, scenes-video"
    )
    with pytest.raises(UsageError) as caught:
        write_grid(torch.zeros(1, 12, 16, 16), tmp_path / "grid.png")
    assert str(caught.value) == "write_grid: pictures are (B, 3, H, W); (1, 12, 16, 16) was given"
    with pytest.raises(UsageError) as caught:
        write_gif(torch.zeros(2, 3, 32, 32), tmp_path / "film.gif")
    assert str(caught.value) == "write_gif: clips are (B, F, 3, H, W); (2, 3, 32, 32) was given"
