"""Make pictures or clips with a scenes model, and write them to a file.

The noise is a function of the seed and the picture's or clip's number alone: a baseline and an optimised network
start from the same noise, and so does a larger batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hasten.errors import UsageError
from hasten.models.adapter import Adapter
from hasten.models.scenes.adapters import MODELS, specification
from hasten.models.scenes.subject import subject
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.seeds import of_picture
from hasten.passes.solvers.table import SolverTable

Denoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents, times, labels or captions) -> prediction: the adapter's module, or what a compiler made of it."""
MILLISECONDS = 120
"""How long a GIF shows a frame."""


def solver(adapter: Adapter, steps: int) -> SolverTable:
    """Return a scenes model's table: DDIM for the UNet, Euler's method for the rectified flows."""
    spec = _specification(adapter)
    if spec["objective"] == "v_prediction":
        return ddim(steps, schedule=spec["schedule"], prediction="v_prediction", spacing="trailing", compat=None)
    return flow_euler(steps, shift=spec.get("shift", 1))


def initial_noise(adapter: Adapter, count: int, seed: int) -> torch.Tensor:
    """Draw unit noise, (count, C, [F,] H, W) float32; that of picture or clip i depends on ``seed`` and i alone."""
    return _noise(adapter, count, seed, 1)[0]


def _noise(adapter: Adapter, count: int, seed: int, draws: int) -> list[torch.Tensor]:
    """Draw several times, each picture from a generator of its own."""
    shape = adapter.inputs[0].shape[1:]
    generators = [torch.Generator().manual_seed(of_picture(seed, i)) for i in range(count)]
    return [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(draws)]


def generate(
    denoise: Denoise,
    adapter: Adapter,
    labels: Sequence[int] | torch.Tensor,
    *,
    steps: int = 50,
    guidance: float = 2.0,
    seed: int = 0,
    table: SolverTable | None = None,
    guide: Denoise | None = None,
    device: torch.device | str = "cpu",
    callback: Callable[[int, float, torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """Generate one picture a label, (B, 3, 32, 32), or one clip, (B, F, 3, 32, 32); float32 in [-1, 1], on the CPU.

    Classifier-free guidance (Ho & Salimans, 2207.12598): the network sees a batch of 2 B, first with the labels and
    then without, and ``f = f_without + guidance * (f_with - f_without)``. At guidance 1 it sees the labelled half
    alone. ``table`` is the solver's, the model's plain one (`solver`) unless given.

    Classifier guidance: ``guide`` returns ``grad_x log p(labels | x)`` for tables that ask it (LTSP, STSP, guided), as
    `noisy_classifier.guide` does, and the network is told no class at all; ``guidance`` is then left aside.
    """
    spec = _specification(adapter)
    drawn = subject(spec)
    label = torch.as_tensor(labels, dtype=torch.int64, device=device)
    if label.ndim != 1 or not ((label >= 0) & (label < len(drawn.classes))).all():
        raise UsageError(
            f"generate: labels are a list of numbers from 0 to {len(drawn.classes) - 1}; {labels} was given"
        )
    guided, untold = guidance != 1 and guide is None, torch.full_like(label, drawn.null_class)
    condition = drawn.condition(torch.cat([label, untold]) if guided else label if guide is None else untold)

    def predict(x: torch.Tensor, time: float) -> torch.Tensor:
        x = torch.cat([x, x]) if guided else x
        times = torch.full((len(x),), time, dtype=torch.float32, device=device)
        prediction = denoise(x, times, condition).float()
        if not guided:
            return prediction
        with_label, without = prediction.chunk(2)
        return without + guidance * (with_label - without)

    def gradient(x: torch.Tensor, time: float) -> torch.Tensor:
        assert guide is not None
        return guide(x, torch.full((len(x),), time, dtype=torch.float32, device=device), label)

    table = table or solver(adapter, steps)
    first, *later = (z.to(device) for z in _noise(adapter, len(label), seed, 1 + len(table.noisy)))
    with torch.no_grad():
        networks = [predict, gradient] if guide is not None and table.network.any() else predict
        latents = sample(networks, table, first, noise=later, callback=callback)
    return drawn.pixels(latents, spec["unshuffle"]).clamp(-1, 1).cpu()


def write_grid(images: torch.Tensor, path: str | Path, *, columns: int | None = None, scale: int = 4) -> Path:
    """Write pictures (B, 3, H, W) in [-1, 1] as one PNG, row by row, each pixel ``scale`` pixels wide.

    Clips (B, F, 3, H, W) are written as film strips, a clip a row.
    """
    from PIL import Image

    if images.ndim == 5:
        columns, images = images.shape[1], images.flatten(0, 1)
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UsageError(f"write_grid: pictures are (B, 3, H, W); {tuple(images.shape)} was given")
    sheet = Image.fromarray(_sheet(images, columns, scale))
    return _replace(path, lambda part: sheet.save(part, format="PNG"))


def write_gif(clips: torch.Tensor, path: str | Path, *, columns: int | None = None, scale: int = 4) -> Path:
    """Write clips (B, F, 3, H, W) in [-1, 1] as one animated GIF that shows them beside each other, for ever."""
    from PIL import Image

    if clips.ndim != 5 or clips.shape[2] != 3 or 0 in clips.shape:
        raise UsageError(f"write_gif: clips are (B, F, 3, H, W); {tuple(clips.shape)} was given")
    first, *others = (Image.fromarray(_sheet(frame, columns, scale)) for frame in clips.unbind(1))
    return _replace(
        path,
        lambda part: first.save(part, format="GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0),
    )


def _sheet(images: torch.Tensor, columns: int | None, scale: int) -> npt.NDArray[np.uint8]:
    columns = min(columns or round(len(images) ** 0.5) or 1, len(images))
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = -(-len(images) // columns)
    _, height, width, _ = pixels.shape
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        row, column = divmod(i, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    return sheet.repeat(scale, 0).repeat(scale, 1)


def _replace(path: str | Path, save: Callable[[Path], Any]) -> Path:
    path = Path(path)
    part = path.with_name(path.name + ".part")
    save(part)
    os.replace(part, path)
    return path


def _specification(adapter: Adapter) -> dict[str, Any]:
    if adapter.name not in MODELS:
        raise UsageError(f"generate: {adapter.name} makes no scenes; the models that do are {', '.join(MODELS)}")
    return specification(adapter.name)
