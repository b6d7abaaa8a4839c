"""One row of a sampling loop in torch, before and after the network is called; traced into FX and ONNX loops alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.passes.fx import clean_hook
from hasten.passes.fx.counter_noise import normal
from hasten.passes.solvers import loop
from hasten.passes.solvers.plan import LoopPlan

Painting = tuple[Tensor, Tensor, Tensor]
"""The mask, the picture that stays outside, and its noise."""


def before(
    plan: LoopPlan, rows: loop.Rows, index: Tensor, state: Tensor, painting: Painting | None
) -> tuple[Tensor, ...]:
    """Take row ``index`` () int64: its columns (as `loop.Row`), what is seen, and the network's sample and time.

    What is seen is (B, ...) float32; the network's own inputs have its types, and twice the batch where it is doubled.
    Behind them are the number of the network () int64 and what the second one sees beside, or None.
    """
    picked = (None if column is None else column.index_select(0, index.reshape(1))[0] for column in rows[:-1])
    row = loop.Row(*picked)
    seen = loop.network_input(row, state)
    if painting is not None:
        # solvers work on each pixel for itself, so what the state holds outside the mask never matters
        mask, known, noise = painting
        seen = loop.blended(mask, seen, row.level[0] * known + row.level[1] * noise)
    sample = torch.cat([seen, seen]) if plan.doubled else seen
    time = row.time.to(_dtype(plan.time.dtype))
    if plan.time.shape:
        time = time.reshape(1).expand(1 if plan.time.shape == (1,) else sample.shape[0]).clone()
    which = None if plan.which is None else (row.network + 0.5).to(torch.int64)
    beside = None
    if plan.beside is not None:
        beside = loop.combined(row.condition, state).to(_dtype(plan.beside.dtype))
    return *row, seen, sample.to(_dtype(plan.sample.dtype)), time, which, beside


def after(
    plan: LoopPlan,
    row: loop.Row,
    state: Tensor,
    seen: Tensor,
    predictions: Sequence[Tensor],
    scale: Tensor | None,
    rescale: Tensor | None,
    noise: Tensor | None,
    preview: Tensor,
    hook: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The next state, (K, B, ...), and the predicted clean sample, (B, ...), of the network's ``predictions``.

    There is one prediction for each call, or both halves of a call that sees the batch twice. ``scale`` and
    ``rescale`` are (), ``noise`` (B, ...). A row that says nothing of the clean sample leaves ``preview``, the last
    one's, as it is. ``hook`` holds the numbers of the plan's hook, () each; the clean sample is what it leaves, in rows
    whose solver asks for it.
    """
    # networks that learn the variance return it behind the prediction
    channels = seen.shape[1]
    first, *others = (p.float()[:, :channels] if p.shape[1] != channels else p.float() for p in predictions)
    if plan.doubled and not others:
        # not `chunk`, which asks how many parts a dynamic size makes
        with_condition, without = first.split([seen.shape[0]] * 2)
    elif plan.guided:
        with_condition, without = first, others[0]
    prediction = first
    if plan.guided:
        assert scale is not None
        prediction = loop.guided(with_condition, without, scale)
        if rescale is not None:
            prediction = loop.rescaled(prediction, with_condition, rescale)
    clean: Tensor = loop.predicted_x0(row, seen, prediction)
    if plan.which is not None:
        clean = torch.where((row.x0 != 0).any(), clean, preview)
    if plan.hook == "none":
        return loop.advance(row, state, prediction, noise), clean
    kept = clean_hook.clipped(clean, *hook) if plan.hook == "clip" else _thresholded(plan, clean, hook)
    return loop.advance(row, state, prediction, noise, kept), torch.where((row.x0_gain != 0).any(), kept, clean)


def _thresholded(plan: LoopPlan, clean: Tensor, hook: Sequence[Tensor]) -> Tensor:
    ratio, largest = hook
    return clean_hook.thresholded(clean, ratio, largest, plan.sorted)


def spread(scale: Tensor, state: Tensor, dtype: str) -> Tensor:
    """The guidance scale () for each picture, (B,), as a network takes it."""
    return scale.reshape(1).expand(state.shape[1]).to(_dtype(dtype)).clone()


def finished(output: Tensor, state: Tensor, painting: Painting | None) -> Tensor:
    """The pictures, (B, ...), of the state after the last row."""
    latents: Tensor = loop.result(output, state)
    return latents if painting is None else loop.blended(painting[0], latents, painting[1])


def noise_of(plan: LoopPlan, given: Tensor | None, index: Tensor, like: Tensor) -> Tensor | None:
    """The row's unit noise, (B, ...): taken from ``given`` (R, B, ...), or made of ``given`` () int64, a seed."""
    if given is None:
        return None
    if plan.noise == "input":
        return given.index_select(0, index.reshape(1))[0]
    return normal(given, index, like)


def noted(plan: LoopPlan, decisions: Tensor, computed: Tensor, index: Tensor) -> Tensor:
    """The step cache's decisions, (R,) int64, with that of row ``index``: 1 computed, 0 reused."""
    here = torch.arange(plan.rows, device=index.device) == index
    return torch.where(here, computed.to(torch.int64), decisions)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
