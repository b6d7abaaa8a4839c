"""One sampler's engine for a range of batches and sizes: what is made is what engines of fixed sizes make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_net import NULL, PROCESS, Net, examples, table
from torch.export import Dim

import hasten
from hasten.backends.sampler import Sampler
from hasten.errors import UsageError
from hasten.passes.fx.counter_noise import normal
from hasten.passes.solvers.sample import sample

STEPS = 6
BATCH, SIDE = Dim("batch", min=1, max=8), Dim("side", min=4, max=16)
DYNAMIC = {"sample": {0: BATCH, 2: SIDE, 3: SIDE}, "timestep": {0: BATCH}, "class_labels": {0: BATCH}}
CACHE = "easycache:threshold=0.3"


def built(
    folder: Any, target: str, batch: int, dynamic: Any = None, cache: str | None = CACHE, **options: Any
) -> Sampler:
    options = {"guidance": 3.0, "noise": "seed", "rows": 12, **options}
    engine = hasten.build(
        Net().eval(),
        target=target,
        out=folder,
        example_kwargs=examples(batch),
        dynamic_shapes=dynamic,
        cache=cache,
        sampling=hasten.Sampling(steps=STEPS, process=PROCESS, **options),
    )
    return hasten.sampler(engine)


@pytest.fixture(scope="module", params=["batched", pytest.param("sequential", marks=pytest.mark.slow)])
def ranged(request: Any, tmp_path_factory: Any) -> Sampler:
    folder = tmp_path_factory.mktemp("engines") / "ranged"
    return built(folder, "onnxruntime:cpu", 4, DYNAMIC, form=request.param, inpaint=True)


def given(pictures: int, side: int = 8) -> dict[str, torch.Tensor]:
    noise = torch.randn(pictures, 4, side, side, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(pictures) + 2
    return {"latents": noise, "class_labels": labels, "negative_class_labels": torch.full((pictures,), NULL)}


def eager(solver: str, pictures: int, side: int) -> torch.Tensor:
    net, told, found = Net().eval(), given(pictures, side), table(solver, STEPS)

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        t = torch.full((pictures,), time)
        with_condition, without = net(x, t, told["class_labels"]), net(x, t, told["negative_class_labels"])
        return without + 3.0 * (with_condition - without)

    drawn = [normal(torch.tensor(11), torch.tensor(row), told["latents"]) for row in found.noisy]
    with torch.no_grad():
        made: torch.Tensor = sample(denoise, found, told["latents"], noise=drawn)
    return made


@pytest.mark.parametrize(("pictures", "side"), [(1, 8), (2, 8), (3, 8), (2, 12)])
@pytest.mark.parametrize("solver", ["unipc", "euler-ancestral"])
def test_every_size_makes_the_pictures_of_a_python_loop(
    ranged: Sampler, monkeypatch: pytest.MonkeyPatch, solver: str, pictures: int, side: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    rows = len(table(solver, STEPS))
    made = ranged(solver=solver, seed=11, mask="1" * rows, **given(pictures, side))
    expected = eager(solver, pictures, side)
    torch.testing.assert_close(made.latents, expected, rtol=5e-5, atol=2e-5 * float(expected.abs().max()))


def test_the_cache_decides_as_in_an_engine_of_fixed_sizes(ranged: Sampler, tmp_path: Any) -> None:
    form = ranged.loop["guidance"]
    fixed = built(tmp_path / "fixed", "onnxruntime:cpu", 6 if form == "batched" else 3, form=form, inpaint=True)
    mine, other = (s(solver="dpm++2m", num_inference_steps=12, **given(3)) for s in (ranged, fixed))
    assert "0" in mine.decisions
    assert mine.decisions == other.decisions
    torch.testing.assert_close(mine.latents, other.latents, rtol=2e-5, atol=2e-5)
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., 4:] = 1
    painting = {"image": torch.ones(3, 4, 8, 8) / 2, "mask_image": mask}
    mine, other = (s(solver="dpm++2m", **painting, **given(3)) for s in (ranged, fixed))
    torch.testing.assert_close(mine.latents, other.latents, rtol=2e-5, atol=2e-5)


def test_noise_has_the_sizes_of_what_is_given(ranged: Sampler) -> None:
    told = {name: tensor for name, tensor in given(3).items() if name != "latents"}
    message = r"what is made is \(\w+, 4, side, side\) in this engine, and nothing that was given says .* give latents"
    with pytest.raises(UsageError, match=message):
        ranged(**told)
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    image = torch.zeros(3, 4, 8, 8)
    made = ranged(image=image, mask_image=torch.ones(3, 1, 8, 8), generator=generators, **told)
    assert made.latents.shape == (3, 4, 8, 8)


def test_what_does_not_fit_says_so(ranged: Sampler, tmp_path: Any) -> None:
    told = {**given(2), "class_labels": torch.arange(3)}
    message = r"'negative_class_labels' is \(2,\), which makes \w+ 2, and 'class_labels' makes it 3; give them one size"
    with pytest.raises(UsageError, match=message):
        ranged(**told)
    most = 4 if ranged.loop["guidance"] == "batched" else 8
    with pytest.raises(UsageError, match=f"expected 1 to {most}"):
        ranged(**given(most + 1))
    for target in ("aoti:cpu", "tensorrt-rtx:sm89"):
        with pytest.raises(UsageError, match=f"target {target}: input 'sample' has dynamic sizes .* for onnxruntime"):
            built(tmp_path / "other", target, 4, DYNAMIC)


def test_the_manifest_has_the_ranges(ranged: Sampler) -> None:
    batched = ranged.loop["guidance"] == "batched"
    wanted = {"pictures": (1, 4)} if batched else {"batch": (1, 8)}
    assert {name: tuple(r) for name, r in ranged.engine.manifest.dims.items()} == {**wanted, "side": (4, 16)}
    assert ranged.latents_shape == (next(iter(wanted)), 4, "side", "side")
