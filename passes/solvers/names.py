"""The inputs and outputs of a compiled sampling loop: their names, in order, with types and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hasten.passes.solvers.loop import PREFIX as TABLE
from hasten.passes.solvers.loop import Rows
from hasten.passes.solvers.plan import NEGATIVE, LoopPlan, Shaped

STATE, FIRST, STOP = "state", "first", "stop"
SCALE, RESCALE, NOISE, SEED = "guidance_scale", "guidance_rescale", "noise", "seed"
MASK, KNOWN, KNOWN_NOISE = "mask_image", "image", "image_noise"
CLIP, RATIO, LARGEST = "x0_clip", "x0_ratio", "x0_largest"
HOOKS: Mapping[str, tuple[str, ...]] = {"none": (), "clip": (CLIP,), "threshold": (RATIO, LARGEST)}
"""The numbers of each hook on x0, () float32."""
RESULT, PREVIEW = "latents", "preview"
NEXT = "next_"
CACHE = "cache_"
FORCED, DECISIONS = CACHE + "forced", CACHE + "mask"
WHICH = "which_network"
"""The input of two networks in one that says which is asked, () int64."""
BRANCHES = ("", "_negative")
"""What tells the calls of one row apart in the names of what they keep."""


def inputs(plan: LoopPlan, kept: Sequence[Shaped], controls: Sequence[Shaped]) -> tuple[Shaped, ...]:
    """The inputs, in order; ``kept`` is the step cache's state and ``controls`` are its numbers, empty without one.

    ``state`` (K, B, ...) float32; ``first`` and ``stop`` () int64, the rows to be done; the network's own conditions
    and what stands for none (``negative_…``); ``guidance_scale`` and ``guidance_rescale`` (); ``noise`` (R, B, ...) or
    ``seed`` (); ``mask_image`` (B, 1, ...), 1 where pictures are made and 0 where they stay ``image`` (B, ...), which
    is seen with ``image_noise``; ``x0_clip`` (), or ``x0_ratio`` and ``x0_largest`` (); the table (``solver_…``, see
    `passes.solvers.loop.Rows`); then ``cache_forced`` and ``cache_mask`` (R,) int64, the controls, and what each branch
    keeps.
    """
    r, k = plan.rows, plan.history
    found = [Shaped(STATE, "float32", (k, *plan.latents)), Shaped(FIRST, "int64", ()), Shaped(STOP, "int64", ())]
    for prefix in ("", NEGATIVE) if plan.guided else ("",):
        found += [Shaped(prefix + c.name, c.dtype, plan.picture(c)) for c in plan.conditions]
    found += plan.shared
    if plan.guidance != "none":
        found.append(Shaped(SCALE, "float32", ()))
    if plan.rescale:
        found.append(Shaped(RESCALE, "float32", ()))
    if plan.noise != "none":
        found.append(
            Shaped(NOISE, "float32", (r, *plan.latents)) if plan.noise == "input" else Shaped(SEED, "int64", ())
        )
    if plan.inpaint:
        found += [Shaped(MASK, "float32", (plan.batch, 1, *plan.latents[2:]))]
        found += [Shaped(name, "float32", plan.latents) for name in (KNOWN, KNOWN_NOISE)]
    found += [Shaped(name, "float32", ()) for name in HOOKS[plan.hook]]
    columns = Rows((r,), (r, k), (r, k, k), (r, k), (r, k), (r, 2), (r, 2), (r,), (r, k), (r, k), (k,))._asdict()
    if plan.noise == "none":
        del columns["kick"]
    if not plan.inpaint:
        del columns["level"]
    if plan.which is None:
        del columns["network"]
    if plan.beside is None:
        del columns["condition"]
    if plan.hook == "none":
        del columns["x0_gain"]
    found += [Shaped(TABLE + name, "float32", shape) for name, shape in columns.items()]
    if controls or kept:
        found += [Shaped(FORCED, "int64", (r,)), Shaped(DECISIONS, "int64", (r,))]
    found += [c for c in controls if c.name not in (CACHE + "step", CACHE + "force")]
    return (*found, *carried_cache(plan, kept))


def carried_cache(plan: LoopPlan, kept: Sequence[Shaped]) -> tuple[Shaped, ...]:
    """What the step cache of every call of a row keeps."""
    branches = BRANCHES[: plan.calls]
    return tuple(Shaped(s.name + branch, s.dtype, s.shape) for branch in branches for s in kept)


def outputs(plan: LoopPlan, given: Mapping[str, Shaped], carried: Sequence[str]) -> tuple[Shaped, ...]:
    """``latents`` and ``preview`` (B, ...), then ``next_…`` for each of the inputs ``carried``."""
    pictures = [Shaped(name, "float32", plan.latents) for name in (RESULT, PREVIEW)]
    return (*pictures, *(Shaped(NEXT + name, given[name].dtype, given[name].shape) for name in carried))
