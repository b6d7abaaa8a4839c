"""``python -m hasten.models.scenes.train unet|dit|video``: train a bundled model, resumable at any step.

The UNet predicts v on the squared-cosine schedule (Salimans & Ho, 2202.00512; Nichol & Dhariwal, 2102.09672). The DiT
and the video transformer predict the rectified-flow velocity ``noise - image`` at logit-normal times (Esser et al.,
2403.03206), the latter with that paper's shift to the noisy end: what eight frames have in common shows through more
noise than one picture does. Of four of its batches three are of single frames, eight times as many, without temporal
attention and with the shift due to one: shapes are learned from stills, motion from clips (both, by turns, as Latte's,
Ma et al., 2401.03048). Its blocks' matrices take orthogonalised steps (Muon, Jordan et al. 2024) of AdamW's size, and
it has half of its blocks at first (``stacking``).

All keep an exponential moving average of the weights, which is what is saved, in float16, and drop the label for one
picture in ten so that classifier-free guidance works. Every batch is a function of its step number alone, so a run
that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.models.scenes import clips
from hasten.models.scenes.stacking import stacked
from hasten.models.scenes.subject import subject
from hasten.models.scenes.weights import halved, write

HERE = Path(__file__).parent
LABEL_DROP = 0.1


def network(name: str, layers: int | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build the untrained diffusers module of ``models/scenes/<name>.json``; return it and that file's content.

    ``layers`` is its depth where that is not the file's.
    """
    import diffusers

    spec = json.loads((HERE / f"{name}.json").read_text())
    torch.manual_seed(0)
    config = spec["config"] if layers is None else {**spec["config"], "num_layers": layers}
    return getattr(diffusers, spec["class"])(**config), spec


def squared_cosine_alpha_bar(count: int = 1000, cap: float = 0.999) -> torch.Tensor:
    """``alpha_bar`` of diffusers' ``squaredcos_cap_v2``, (count,) float64."""

    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar((i + 1) / count) / bar(i / count), cap) for i in range(count)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


def loss_at(model: torch.nn.Module, spec: dict[str, Any], step: int, batch: int) -> torch.Tensor:
    """Compute the training loss on batch number ``step``: a function of the weights and that number only."""
    rng = torch.Generator().manual_seed(step)
    drawn = subject(spec)
    shift: float = spec.get("shift", 1)
    options: dict[str, bool] = {}
    if spec.get("stills") and step % 4:
        # Averaged over F frames, noise is sqrt(F) times smaller: that much of a clip's shift is due to its frames.
        frames = spec["config"]["video_length"]
        batch, shift, options = batch * frames, shift / math.sqrt(frames), {"enable_temporal_attentions": False}
        clips_of_one = clips.render(batch, 1_000_000 + step, frames=1)
        pixels, labels = clips_of_one.frames, clips_of_one.labels
    else:
        pixels, labels = drawn.render(batch, 1_000_000 + step, None)
    image = drawn.latents(torch.from_numpy(pixels), spec["unshuffle"])
    dropped = torch.rand(batch, generator=rng) < LABEL_DROP
    condition = drawn.condition(torch.where(dropped, drawn.null_class, torch.from_numpy(labels)))
    noise = torch.randn(image.shape, generator=rng)
    each = (batch, *[1] * (image.ndim - 1))
    if spec["objective"] == "v_prediction":
        time = torch.randint(0, 1000, (batch,), generator=rng)
        bar = squared_cosine_alpha_bar().float()[time].view(each)
        noisy, target = bar.sqrt() * image + (1 - bar).sqrt() * noise, bar.sqrt() * noise - (1 - bar).sqrt() * image
    else:
        sigma = torch.sigmoid(torch.randn(batch, generator=rng) + math.log(shift))
        time, sigma = sigma * 1000, sigma.view(each)
        noisy, target = (1 - sigma) * image + sigma * noise, noise - image
    # Of sequences as short as these, PyTorch's plain attention has the faster backward on a CPU.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        output = model(noisy, time, condition, **options).sample
    return F.mse_loss(output.float(), target)


def _optimizers(model: torch.nn.Module, spec: dict[str, Any], rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW of all parameters, or, with ``"optimizer": "muon"``, Muon of the blocks' matrices beside it."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = spec.get("optimizer") == "muon" and parameter.ndim == 2 and "blocks." in name
        (matrices if inside else others).append(parameter)
    adam = torch.optim.AdamW(others, rate, weight_decay=0.01, betas=(0.9, 0.99))
    if not matrices:
        return [adam]
    return [adam, torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def train(name: str, steps: int, batch: int, rate: float, run: Path, threads: int, compiled: bool = False) -> Path:
    """Train to ``steps`` steps, going on from ``run/<name>.pt`` where there is one; return the saved weights' path.

    A model with ``"stacked": {"layers": n, "until": step}`` has n layers until that step and all of them behind it.
    """
    torch.set_num_threads(threads)
    spec = network(name)[1]
    run.mkdir(parents=True, exist_ok=True)
    layers = spec["config"].get("num_layers")
    for stage in _stages(spec, steps):
        mean, curve = _train(name, stage, steps, batch, rate, run / f"{name}.pt", compiled)
    return _write(name, stacked(mean, layers) if layers else mean, curve)


class _Stage(NamedTuple):
    """Steps ``start`` to ``end`` of a training, with ``layers`` blocks (None: the configuration says)."""

    start: int
    end: int
    layers: int | None


def _stages(spec: dict[str, Any], steps: int) -> list[_Stage]:
    if "stacked" not in spec:
        return [_Stage(0, steps, None)]
    until = spec["stacked"]["until"]
    shallow = _Stage(0, min(steps, until), spec["stacked"]["layers"])
    return [shallow, *([_Stage(until, steps, None)] if steps > until else [])]


def _train(
    name: str, stage: _Stage, steps: int, batch: int, rate: float, state: Path, compiled: bool
) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Train one stage, or read what a later one left; return the mean of the weights and the curve of the loss."""
    model, spec = network(name, stage.layers)
    model.eval()  # neither model has dropout; in training mode DiT would drop labels a second time
    mean = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizers = _optimizers(model, spec, rate)
    done, curve = stage.start, []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["step"] >= stage.end:
            return saved["mean"], saved["curve"]
        fresh = len(saved["model"]) < len(mean)
        layers = spec["config"].get("num_layers")
        model.load_state_dict(stacked(saved["model"], layers) if fresh else saved["model"])
        mean = stacked(saved["mean"], layers) if fresh else saved["mean"]
        if not fresh:
            for optimizer, state_dict in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state_dict)
        done, curve = saved["step"], saved["curve"]
    if compiled:
        model.compile()
    recent: list[float] = []
    for step in range(done, stage.end):
        warm = min(1.0, (step - stage.start + 1) / 200)
        loss = loss_at(model, spec, step, batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                mean[key].lerp_(value, 1 - decay)
        recent.append(loss.item())
        told = (step + 1) % 100 == 0 or step + 1 == steps
        if told:
            curve.append([step + 1, float(np.mean(recent))])
            recent = []
            print(f"{name} step {step + 1}/{steps} loss {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
        if told or step + 1 == stage.end:
            part = state.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "mean": mean,
                    "step": step + 1,
                    "curve": curve,
                },
                part,
            )
            os.replace(part, state)
    return mean, curve


def _write(name: str, mean: dict[str, torch.Tensor], curve: list[list[float]]) -> Path:
    weights = write(halved(mean), HERE / f"{name}.safetensors")
    with (HERE / f"{name}_loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "loss"], *curve])
    return weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hasten.models.scenes.train", description=__doc__)
    parser.add_argument("model", choices=["unet", "dit", "video"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--run", type=Path, default=Path("runs/scenes"), help="where checkpoints go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="through torch.compile: a fifth faster, needs g++")
    args = parser.parse_args(argv)
    weights = train(args.model, args.steps, args.batch, args.rate, args.run, args.threads, args.compile)
    print(weights)
    return 0


if __name__ == "__main__":
    sys.exit(main())
