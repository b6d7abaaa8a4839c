"""One sampler's engine for a range of batches and sizes: what is made is what engines of fixed sizes make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_net import NULL, PROCESS, Net, examples, table
from test_sampler_modules import Transformer
from torch.export import Dim

import hasten
from hasten.backends.sampler import Sampler
from hasten.errors import HastenError, UsageError
from hasten.passes.fx.counter_noise import normal
from hasten.passes.solvers.sample import sample

STEPS = 6
BATCH, SIDE = Dim("batch", min=1, max=8), Dim("side", min=4, max=16)
DYNAMIC = {"sample": {0: BATCH, 2: SIDE, 3: SIDE}, "timestep": {0: BATCH}, "class_labels": {0: BATCH}}
SMALL = Dim("side", min=2, max=8)
CACHE, MODULES = "easycache:threshold=0.3", "fora:interval=3"


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


@pytest.fixture(
    scope="module",
    params=[
        ("onnxruntime:cpu", "batched"),
        pytest.param(("aoti:cpu", "batched"), marks=pytest.mark.slow),
        pytest.param(("onnxruntime:cpu", "sequential"), marks=pytest.mark.slow),
        pytest.param(("aoti:cpu", "sequential"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def ranged(request: Any, tmp_path_factory: Any) -> Sampler:
    target, form = request.param
    return built(tmp_path_factory.mktemp("engines") / "ranged", target, 4, DYNAMIC, form=form, inpaint=True)


def given(pictures: int, side: int = 8) -> dict[str, torch.Tensor]:
    noise = torch.randn(pictures, 4, side, side, generator=torch.Generator().manual_seed(7))
    labels = (torch.arange(pictures) + 2) % NULL
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


@pytest.mark.parametrize(("pictures", "side"), [(1, 8), (3, 8), (2, 12)])
@pytest.mark.parametrize("solver", ["ddim", "dpm++2m", "unipc", "euler-ancestral"])
def test_every_size_makes_the_pictures_of_a_python_loop(
    ranged: Sampler, monkeypatch: pytest.MonkeyPatch, solver: str, pictures: int, side: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    monkeypatch.setattr("torch._inductor.aoti_load_package", refuse)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", refuse)
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


def test_chunks_make_the_same_pictures(ranged: Sampler) -> None:
    whole, chunks = (ranged(solver="euler-ancestral", seed=11, chunk=chunk, **given(3)) for chunk in (None, 4))
    assert torch.equal(chunks.latents, whole.latents)
    assert chunks.decisions == whole.decisions


def test_noise_has_the_sizes_of_what_is_given(ranged: Sampler) -> None:
    told = {name: tensor for name, tensor in given(3).items() if name != "latents"}
    message = r"what is made is \(\w+, 4, side, side\) in this engine, and nothing that was given says .* give latents"
    with pytest.raises(UsageError, match=message):
        ranged(**told)
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    image = torch.zeros(3, 4, 8, 8)
    made = ranged(image=image, mask_image=torch.ones(3, 1, 8, 8), generator=generators, **told)
    assert made.latents.shape == (3, 4, 8, 8)


def test_what_does_not_fit_says_so(ranged: Sampler) -> None:
    told = {**given(2), "class_labels": torch.arange(3)}
    message = r"'negative_class_labels' is \(2,\), which makes \w+ 2, and 'class_labels' makes it 3; give them one size"
    with pytest.raises(UsageError, match=message):
        ranged(**told)
    most = 4 if ranged.loop["guidance"] == "batched" else 8
    with pytest.raises(UsageError, match=f"is {most + 1}, expected 1 to {most}"):
        ranged(**given(most + 1))
    with pytest.raises(UsageError, match=r"\(side\) is 17, expected 4 to 16"):
        ranged(**given(1, 17))


class Flexible(Transformer):
    """The transformer for any size of pictures: (B, 8, S, S), times and classes (B,) -> (B, 8, S, S)."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        told = self.classes(class_labels) + self.time(torch.stack([timestep / 1000, torch.sin(timestep / 100)], 1))
        x = self.into(sample.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, told)
        return self.back(x).transpose(1, 2).unflatten(2, sample.shape[2:])


def transformer(folder: Any, target: str, form: str, cache: str, pictures: int, side: int, dynamic: Any) -> Sampler:
    batch = 2 * pictures if form == "batched" else pictures
    examples = {
        "sample": torch.zeros(batch, 8, side, side),
        "timestep": torch.zeros(batch),
        "class_labels": torch.arange(batch),
    }
    engine = hasten.build(
        Flexible().eval(),
        target=target,
        out=folder,
        example_kwargs=examples,
        dynamic_shapes=dynamic,
        cache=cache,
        sampling=hasten.Sampling(
            "ddim", steps=8, guidance=1.0 if form == "none" else 3.0, form=form, rows=12, process=PROCESS
        ),
    )
    return hasten.sampler(engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "form", "cache"),
    [
        ("onnxruntime:cpu", "batched", "first-block:threshold=0.2"),
        ("aoti:cpu", "none", "teacache:threshold=0.2,coefficients=1/0"),
        ("aoti:cpu", "batched", "first-block:threshold=0.2"),
        ("aoti:cpu", "sequential", "first-block:threshold=0.2"),
        ("aoti:cpu", "batched", "mask:bits=11010101,payload=taylor,order=2"),
        ("aoti:cpu", "none", MODULES),
    ],
)
def test_what_a_cache_keeps_has_the_sizes_of_what_is_given(target: str, form: str, cache: str, tmp_path: Any) -> None:
    """Tokens of square pictures are a power of a size, of which `torch.export.Dim` knows no name."""
    sides = {} if cache == MODULES else {2: SMALL, 3: SMALL}
    dynamic = {"sample": {0: BATCH, **sides}, "timestep": {0: BATCH}, "class_labels": {0: BATCH}}
    ranged = transformer(tmp_path / "ranged", target, form, cache, 2, 4, dynamic)
    assert any(("side**2" if sides else 16) in s["shape"] for s in ranged.engine.manifest.state)
    pictures, size = 3, 6 if sides else 4
    fixed = transformer(tmp_path / "fixed", "onnxruntime:cpu", form, cache, pictures, size, None)
    told = given(pictures, size)
    told["latents"] = torch.cat([told["latents"], -told["latents"]], 1)
    if form == "none":
        del told["negative_class_labels"]
    for solver in ("ddim", "dpm++2m"):
        mine, other = (s(solver=solver, **told) for s in (ranged, fixed))
        assert mine.decisions == other.decisions
        assert "0" in mine.decisions
        limit = 2e-5 * float(other.latents.abs().max())
        torch.testing.assert_close(mine.latents, other.latents, rtol=2e-5, atol=limit)


def test_a_branch_that_unpatches_square_pictures_is_refused(tmp_path: Any) -> None:
    """`torch.cond` finds no strides for what was reshaped from a product of sizes; ONNX Runtime takes it."""
    dynamic = {"sample": {0: BATCH, 2: SMALL, 3: SMALL}, "timestep": {0: BATCH}, "class_labels": {0: BATCH}}
    with pytest.raises(HastenError, match=r"a branch returns what was reshaped .*; fix height and width, "):
        transformer(tmp_path / "ranged", "aoti:cpu", "none", MODULES, 2, 4, dynamic)
    assert not (tmp_path / "ranged").exists()


def test_the_manifest_has_the_ranges(ranged: Sampler) -> None:
    batched = ranged.loop["guidance"] == "batched"
    wanted = {"pictures": (1, 4)} if batched else {"batch": (1, 8)}
    assert {name: tuple(r) for name, r in ranged.engine.manifest.dims.items()} == {**wanted, "side": (4, 16)}
    assert ranged.latents_shape == (next(iter(wanted)), 4, "side", "side")
