"""A scheduler in the place of diffusers' own, in loops as their pipelines write them."""

import copy
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import solvers as table
import torch

import hasten
from hasten.errors import UsageError
from hasten.passes.solvers.config_keys import OPTIONS
from hasten.passes.solvers.from_config import CLASSES

diffusers = pytest.importorskip("diffusers")

KINDS = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    ("DEISMultistepScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]


def made(kind, config):
    flow = kind.startswith("FlowMatch")
    return getattr(diffusers, kind)(**({} if flow else table.STABLE_DIFFUSION), **config)


def network(y, t):
    return torch.tanh(y) + float(t) * 1e-4


def denoised(scheduler, x, steps=10, begin=None, **timesteps):
    """What a pipeline does; returns the latents and what the network saw."""
    scheduler.set_timesteps(**(timesteps or {"num_inference_steps": steps}))
    start = 0 if begin is None else begin
    if begin is None:
        x = x * getattr(scheduler, "init_noise_sigma", 1)
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        times = scheduler.timesteps[begin : begin + 1].repeat(len(x))
        add = getattr(scheduler, "add_noise", None)
        picture = torch.full_like(x, 0.25)
        x = add(picture, x, times) if add else scheduler.scale_noise(picture, times, x)
    generator, seen = torch.Generator().manual_seed(3), []
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
    takes = scheduler.step.__code__.co_varnames
    extra = {"generator": generator} if "generator" in takes else {}
    for t in scheduler.timesteps[start:]:
        seen.append(scale(x, t))
        x = scheduler.step(network(seen[-1], t), t, x, **extra, return_dict=False)[0]
    return x, seen


def close(got, wanted, tolerance=3e-5):
    return (got - wanted).abs().max().item() <= tolerance * max(wanted.abs().max().item(), 1)


NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_a_loop_gives_the_result_of_the_scheduler_it_replaces(kind, config):
    theirs = made(kind, config)
    ours = hasten.Scheduler.from_config(theirs)
    wanted, seen = denoised(theirs, NOISE)
    got, inputs = denoised(ours, NOISE)
    assert len(inputs) == len(seen)
    assert np.allclose(ours.timesteps.double(), theirs.timesteps.double(), atol=2e-3)
    assert all(close(mine, their) for mine, their in zip(inputs, seen, strict=True))
    assert close(got, wanted)
    assert ours.order == theirs.order
    assert len(ours) == len(getattr(theirs, "betas", range(1000)))


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_again_after_set_timesteps(kind, config):
    ours = hasten.Scheduler.from_config(made(kind, config))
    first, _ = denoised(ours, NOISE, 6)
    again, _ = denoised(ours, NOISE, 6)
    assert torch.equal(first, again)


LATE = [
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, 4),
    ("DPMSolverMultistepScheduler", {}, 4),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, 9),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 4),
    ("DEISMultistepScheduler", {"solver_order": 3}, 4),
    ("EulerDiscreteScheduler", {}, 4),
    ("HeunDiscreteScheduler", {}, 8),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 4),
    *(("DPMSolverSinglestepScheduler", {"solver_order": 2}, begin) for begin in (1, 4, 18)),
    *(("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}, begin) for begin in (3, 4, 5)),
    *(("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, begin) for begin in (1, 2, 10, 20)),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}, 7),
    *(("LMSDiscreteScheduler", {}, begin) for begin in (1, 4, 19)),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}, 9),
]


@pytest.mark.parametrize(("kind", "config", "begin"), LATE)
def test_image_to_image_begins_late_as_the_scheduler_it_replaces(kind, config, begin):
    if kind == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    theirs = made(kind, config)
    ours = hasten.Scheduler.from_config(theirs)
    wanted, seen = denoised(theirs, NOISE, 20, begin)
    got, inputs = denoised(ours, NOISE, 20, begin)
    assert close(inputs[0], seen[0])
    assert close(got, wanted)


def test_what_cannot_begin_late_says_so():
    ours = hasten.Scheduler.from_config(diffusers.PNDMScheduler())
    ours.set_timesteps(10)
    ours.set_begin_index(4)  # a step of Runge-Kutta begins there, but Adams-Bashforth wants the one before
    with pytest.raises(UsageError, match=r"pndm cannot start at step 4: its start is fixed; those that can: plms, .*"):
        ours.step(NOISE, ours.timesteps[4], NOISE)


def test_a_pipeline_that_only_cuts_the_times_begins_late_too():
    """Older image-to-image pipelines set no begin index."""
    for kind, config, begin in [("PNDMScheduler", {"skip_prk_steps": True}, 8), ("HeunDiscreteScheduler", {}, 8)]:
        theirs = made(kind, config)
        ends = []
        for scheduler in (theirs, hasten.Scheduler.from_config(theirs)):
            scheduler.set_timesteps(20)
            times = scheduler.timesteps[begin:]
            x = (
                NOISE
                if kind == "PNDMScheduler"
                else scheduler.add_noise(NOISE * 0, NOISE, times[:1].repeat(len(NOISE)))
            )
            for t in times:
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
            ends.append(x)
        assert close(ends[1], ends[0])


def test_another_solver_keeps_the_process():
    theirs = diffusers.PNDMScheduler(**table.STABLE_DIFFUSION, prediction_type="v_prediction")
    ours = hasten.Scheduler.from_config(theirs.config, solver="unipc:order=3")
    unipc = diffusers.UniPCMultistepScheduler.from_config(theirs.config, solver_order=3, timestep_spacing="linspace")
    assert close(denoised(ours, NOISE)[0], denoised(unipc, NOISE)[0])


def test_overrides_go_into_the_configuration():
    base = diffusers.UniPCMultistepScheduler(**table.STABLE_DIFFUSION)
    ours = hasten.Scheduler.from_config(base, solver_order=3)
    assert ours.config.solver_order == 3
    assert ours.request.options["order"] == 3
    assert ours.config.get("nothing") is None
    with pytest.raises(AttributeError, match="the configuration has no 'nothing'"):
        _ = ours.config.nothing


def test_custom_sigmas_and_dynamic_shift():
    config = {"use_dynamic_shifting": True, "base_shift": 0.5}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = hasten.Scheduler.from_config(theirs)
    given = {"sigmas": np.linspace(1, 1 / 6, 6), "mu": 0.8}
    assert close(denoised(ours, NOISE, **given)[0], denoised(theirs, NOISE, **given)[0])
    assert torch.allclose(ours.sigmas, theirs.sigmas)
    with pytest.raises(UsageError, match="the configuration has use_dynamic_shifting, so set_timesteps needs mu"):
        ours.set_timesteps(6)
    euler = diffusers.EulerDiscreteScheduler(**table.STABLE_DIFFUSION)
    given = {"timesteps": [900, 500, 100]}
    assert close(denoised(hasten.Scheduler.from_config(euler), NOISE, **given)[0], denoised(euler, NOISE, **given)[0])


def test_sigmas_are_those_of_the_scheduler():
    for kind, config in (("EulerDiscreteScheduler", {}), ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})):
        theirs = made(kind, config)
        ours = hasten.Scheduler.from_config(theirs)
        theirs.set_timesteps(7)
        ours.set_timesteps(7)
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=2e-4)


def test_half_precision_samples_keep_their_state_in_float32():
    ours = hasten.Scheduler.from_config(diffusers.DPMSolverMultistepScheduler(**table.STABLE_DIFFUSION))
    wide, _ = denoised(ours, NOISE, 20)
    ours.set_timesteps(20)
    x = NOISE.half()
    for t in ours.timesteps:
        stepped = ours.step(network(x.float(), t).half(), t, x)
        x = stepped.prev_sample
        assert x.dtype == stepped.pred_original_sample.dtype == torch.float16
    assert (x.float() - wide).abs().max() < 0.02


def test_a_changed_sample_is_taken_up():
    ours = hasten.Scheduler.from_config(diffusers.EulerDiscreteScheduler(**table.STABLE_DIFFUSION))
    theirs = diffusers.EulerDiscreteScheduler(**table.STABLE_DIFFUSION)
    ours.set_timesteps(4)
    theirs.set_timesteps(4)
    x, y = NOISE * ours.init_noise_sigma, NOISE * theirs.init_noise_sigma
    for i, (t, u) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        seen = theirs.scale_model_input(y, u)
        x, y = ours.step(network(x, t), t, x).prev_sample, theirs.step(network(seen, u), u, y).prev_sample
        if i == 1:  # inpainting puts known pixels back, here zeros
            x, y = x * (NOISE > 0), y * (NOISE > 0)
    assert close(x, y)


def test_pred_original_sample_is_what_the_network_says_of_x0():
    theirs, ours = (s(diffusers.DDIMScheduler(clip_sample=False)) for s in (lambda x: x, hasten.Scheduler.from_config))
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    one, other = (s.step(NOISE * 0.5, s.timesteps[0], NOISE).pred_original_sample for s in (theirs, ours))
    assert close(other, one)


@pytest.mark.parametrize("config", [{}, {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5}])
def test_pred_original_sample_is_clipped_where_the_solver_clips_it(config):
    theirs = diffusers.DDIMScheduler(**table.STABLE_DIFFUSION, **config)
    ours = hasten.Scheduler.from_config(theirs)
    found = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        found.append(scheduler.step(NOISE * 3, scheduler.timesteps[0], NOISE).pred_original_sample)
    assert found[0].abs().max() <= 1
    assert close(found[1], found[0])


EDITED = [
    ("DPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", {}),
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), EDITED)
def test_an_edit_in_place_is_taken_up(kind, config, dtype, inference):
    theirs = made(kind, config)
    ours = hasten.Scheduler.from_config(theirs)

    def edited(scheduler, copy):
        scheduler.set_timesteps(5)
        x = NOISE.to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x + x.mean((2, 3), keepdim=True)), t, x, return_dict=False)[0]
            if t != scheduler.timesteps[-1]:
                x = x.clone() if copy else x
                x[:, :, :2] = 2.0
        return x.float()

    with torch.inference_mode(inference):
        got, wanted = edited(ours, False), edited(theirs, False)
        assert torch.equal(got, edited(ours, True))
    assert (got - wanted).abs().max() < 5 * torch.finfo(dtype).eps * wanted.abs().max()


def test_what_rounding_cut_off_is_kept_where_a_sample_comes_back_as_it_was():
    ours = hasten.Scheduler.from_config(diffusers.DPMSolverMultistepScheduler(**table.STABLE_DIFFUSION))

    def ends(dtype):
        ours.set_timesteps(20)
        x = NOISE
        for t in ours.timesteps:
            x = ours.step(network(NOISE, t), t, x.to(dtype), return_dict=False)[0]
        return ours._state[0]

    wide, narrow = ends(torch.float32), ends(torch.bfloat16)
    assert (wide - narrow).abs().max() < 0.01 * wide.abs().max()  # that of the first sample's rounding


def in_list(count):
    return [torch.Generator().manual_seed(7 + i) for i in range(count)]


NOISY = [
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 1.0}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
]


def drawn(scheduler, generator, **options):
    scheduler.set_timesteps(6)
    x = NOISE * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else NOISE
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scale(x, t), t), t, x, generator=generator, **options, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("kind", "config", "options"), NOISY)
def test_a_generator_for_each_picture(kind, config, options):
    theirs = made(kind, config)
    ours = hasten.Scheduler.from_config(theirs)
    assert close(drawn(ours, in_list(2), **options), drawn(theirs, in_list(2), **options))
    assert close(drawn(ours, in_list(1), **options), drawn(theirs, in_list(1), **options))
    with pytest.raises(UsageError, match="3 generators were given for 2 pictures; give one, or one each"):
        drawn(ours, in_list(3), **options)


@pytest.mark.parametrize("config", [{"clip_sample": False}, {"clip_sample": True}])
@pytest.mark.parametrize("options", [{"eta": 1.0}, {"eta": 0.4}, {"eta": 0.5, "use_clipped_model_output": True}])
def test_ddim_takes_eta_as_pipelines_pass_it(config, options):
    theirs = made("DDIMScheduler", config)
    ours = hasten.Scheduler.from_config(theirs)
    assert {"eta", "generator"} <= set(inspect.signature(ours.step).parameters)
    wanted, got = (drawn(s, torch.Generator().manual_seed(2), **options) for s in (theirs, ours))
    assert close(got, wanted)
    plain = drawn(ours, torch.Generator().manual_seed(2), eta=0.0)
    assert not close(plain, wanted)
    assert close(plain, drawn(theirs, None))


def test_eta_that_says_nothing_leaves_the_solver_as_it_is():
    theirs = made("DDIMScheduler", {"clip_sample": False})
    ours = hasten.Scheduler.from_config(theirs, solver="ddim:eta=1,spacing=leading")
    wanted = drawn(theirs, torch.Generator().manual_seed(2), eta=1.0)
    assert close(drawn(ours, torch.Generator().manual_seed(2), eta=0.0), wanted)
    unipc = hasten.Scheduler.from_config(theirs, solver="unipc")
    assert torch.equal(drawn(unipc, None, eta=1.0), drawn(unipc, None))
    with pytest.raises(UsageError, match="ddim: eta: -1 was given; it goes from 0"):
        drawn(ours, None, eta=-1.0)


MIXED = [
    ("DDIMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


@pytest.mark.parametrize("begin", [None, 0, 3])
@pytest.mark.parametrize(("kind", "config"), MIXED)
def test_noise_is_added_at_the_times_that_diffusers_takes(kind, config, begin):
    theirs = made(kind, config)
    ours = hasten.Scheduler.from_config(theirs)
    picture = torch.full_like(NOISE, 0.25)

    def added(scheduler, at):
        times = torch.stack([scheduler.timesteps[i] for i in at])
        if kind.startswith("Flow"):
            return scheduler.scale_noise(picture, times, NOISE)
        return scheduler.add_noise(picture, NOISE, times)

    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        if begin is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
    assert close(added(ours, (5, 2)), added(theirs, (5, 2)))
    for scheduler in (ours, theirs):
        x = NOISE
        for t in scheduler.timesteps[begin or 0 :][:2]:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    assert close(added(ours, (5, 7)), added(theirs, (5, 7)))


def test_noise_at_times_outside_of_the_grid_is_that_of_the_training():
    theirs = diffusers.DDIMScheduler(**table.STABLE_DIFFUSION)
    wanted = theirs.add_noise(NOISE, NOISE * 2, torch.tensor([437, 12]))
    # UniPC of diffusers pairs levels with times in reverse before its set_timesteps, and after it takes the last level
    for kind in ("DDIMScheduler", "UniPCMultistepScheduler"):
        ours = hasten.Scheduler.from_config(made(kind, {}))
        before = ours.add_noise(NOISE, NOISE * 2, torch.tensor([437, 12]))
        ours.set_timesteps(10)
        after = ours.add_noise(NOISE, NOISE * 2, torch.tensor([437, 12]))
        assert close(before, wanted)
        assert close(after, wanted)
    one = ours.add_noise(NOISE.half(), NOISE.half() * 2, torch.tensor([437]))
    assert one.dtype == torch.float16
    assert close(one[0].float(), wanted[0], 1e-3)
    for time in (-1, 1000):
        with pytest.raises(UsageError, match=f"scheduler: {time} is no time of the training; they go from 0 to 999"):
            ours.add_noise(NOISE, NOISE, torch.tensor([time]))
    theirs = made("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    flow, times = hasten.Scheduler.from_config(theirs), theirs.timesteps[[0, 700]]
    assert close(flow.scale_noise(NOISE, times, NOISE * 2), theirs.scale_noise(NOISE, times, NOISE * 2))


def test_the_configuration_is_frozen():
    ours = hasten.Scheduler.from_config(diffusers.UniPCMultistepScheduler())
    changes = [
        lambda c: c.update(solver_order=3),
        lambda c: c.__setitem__("solver_order", 3),
        lambda c: setattr(c, "solver_order", 3),
        lambda c: c.pop("solver_order"),
        lambda c: c.setdefault("x", 1),
    ]
    for change in changes:
        with pytest.raises(UsageError, match=r"cannot be changed; make another scheduler with Scheduler\.from_config"):
            change(ours.config)
    assert ours.config.solver_order == 2
    again = copy.deepcopy(ours)
    assert again.config == ours.config
    assert close(denoised(again, NOISE)[0], denoised(ours, NOISE)[0])


def test_a_pipeline_may_correct_the_configuration():
    """Stable Diffusion's sets ``steps_offset`` of old configurations so."""
    base = diffusers.PNDMScheduler(**table.STABLE_DIFFUSION, skip_prk_steps=True)
    ours = hasten.Scheduler.from_config(base)
    ours._internal_dict = {**ours.config, "steps_offset": 1}
    ours.set_timesteps(10)
    assert ours.config.steps_offset == 1
    assert int(ours.timesteps[-1]) == 1
    ours.register_to_config(steps_offset=2)
    ours.set_timesteps(10)
    assert int(ours.timesteps[-1]) == 2


def test_alphas_cumprod_and_compatibles():
    theirs = diffusers.DPMSolverMultistepScheduler(**table.STABLE_DIFFUSION)
    ours = hasten.Scheduler.from_config(theirs)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert isinstance(ours, diffusers.SchedulerMixin)
    assert hasten.Scheduler.from_config({"beta_schedule": "linear"}, solver="ddim").compatibles == []
    flow = hasten.Scheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler())
    assert not hasattr(flow, "alphas_cumprod")


def test_every_option_of_a_class_that_is_read_is_known():
    for name in CLASSES:
        given = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert set(given) - {"self", "kwargs", "args"} <= set(OPTIONS), name


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("DPMSolverMultistepScheduler", {"solver_type": "midpont"}, "'midpont' is none of midpoint, heun.*'midpoint'?"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver+++"}, r"none of .*Did you mean 'dpmsolver\+\+'"),
        ("DPMSolverSinglestepScheduler", {"solver_type": "huen"}, "Did you mean 'heun'?"),
        (
            "UniPCMultistepScheduler",
            {"solver_type": "bh3"},
            "UniPCMultistepScheduler: solver_type 'bh3' is none of bh1",
        ),
        ("DEISMultistepScheduler", {"solver_type": "logroh"}, "'logroh' is none of logrho. Did you mean 'logrho'?"),
        ("DEISMultistepScheduler", {"algorithm_type": "dies"}, "algorithm_type 'dies' is none of deis. Did you mean"),
        (
            "UniPCMultistepScheduler",
            {"solvr_order": 3},
            "no scheduler has an option 'solvr_order'. Did you mean 'solver_o",
        ),
        (
            "DDIMScheduler",
            {"clip_smaple": False},
            "no scheduler has an option 'clip_smaple'. Did you mean 'clip_sample'",
        ),
    ],
)
def test_nonsense_is_refused_with_the_nearest_name(kind, given, message):
    config = {**getattr(diffusers, kind)().config, "_class_name": kind}
    with pytest.raises(UsageError, match=message):
        hasten.Scheduler.from_config(config, **given)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "DEISMultistepScheduler"),
        ("DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    ],
)
def test_what_another_class_says_is_taken_as_diffusers_takes_it(one, other):
    base = getattr(diffusers, one)(**table.STABLE_DIFFUSION)
    takes = inspect.signature(getattr(diffusers, other).__init__).parameters
    spelt = {key: base.config[key] for key in ("solver_type", "algorithm_type") if key in base.config and key in takes}
    if "final_sigmas_type" in takes and "algorithm_type" in spelt:
        spelt["final_sigmas_type"] = "sigma_min"
    theirs = getattr(diffusers, other)(**table.STABLE_DIFFUSION, **spelt)
    ours = hasten.Scheduler.from_config({**table.STABLE_DIFFUSION, **spelt, "_class_name": other})
    assert close(denoised(ours, NOISE)[0], denoised(theirs, NOISE)[0])


def test_a_stored_key_that_nobody_knows_is_kept():
    ours = hasten.Scheduler.from_config({**diffusers.DDIMScheduler().config, "_class_name": "DDIMScheduler", "new": 1})
    assert ours.config["new"] == 1


def test_an_override_is_saved_and_read_again(tmp_path, caplog):
    base = diffusers.UniPCMultistepScheduler(**table.STABLE_DIFFUSION)
    ours = hasten.Scheduler.from_config(base, solver_order=3)
    ours.save_pretrained(tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["scheduler_config.json"]
    assert diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "a").config.solver_order == 3
    assert diffusers.UniPCMultistepScheduler.from_config(ours.config).config.solver_order == 3
    again = hasten.Scheduler.from_pretrained(tmp_path, subfolder="a")
    assert again.request == ours.request
    assert hasten.Scheduler.from_pretrained(tmp_path / "a", solver_order=2).request.options["order"] == 2
    other = hasten.Scheduler.from_config(ours, solver="dpm++3m", trained_betas=np.linspace(1e-4, 2e-2, 50))
    other.save_pretrained(tmp_path / "b")
    again = hasten.Scheduler.from_pretrained(tmp_path / "b")
    assert again.request == other.request
    assert len(again) == 50
    assert hasten.Scheduler.from_config(again).request == other.request
    with caplog.at_level("WARNING", logger="diffusers"):
        diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "b")
    assert not caplog.records


def test_a_model_on_the_hub_is_found_by_diffusers(tmp_path, monkeypatch):
    asked = {}

    def load_config(name, **options):
        asked.update(name=name, **options)
        return {"_class_name": "DDIMScheduler"}

    monkeypatch.setattr(diffusers.DDIMScheduler, "load_config", load_config)
    ours = hasten.Scheduler.from_pretrained("owner/model", subfolder="scheduler", revision="main", clip_sample=False)
    assert asked == {"name": "owner/model", "subfolder": "scheduler", "revision": "main"}
    assert ours.config.clip_sample is False


def test_without_diffusers_there_are_schedulers_too(tmp_path):
    """A loop of one's own needs none."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import hasten\n"
        "s = hasten.Scheduler.from_config({'_class_name': 'DDIMScheduler', 'clip_sample': False})\n"
        f"s.save_pretrained({str(tmp_path)!r})\n"
        f"s = hasten.Scheduler.from_pretrained({str(tmp_path)!r})\n"
        "s.set_timesteps(3)\n"
        "print(s.timesteps.tolist())\n"
        "try:\n    hasten.Scheduler.from_pretrained('owner/model')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[666, 333, 0]",
        "diffusers is not installed: pip install 'hasten[diffusers]'",
    ]


def test_message_where_there_is_no_configuration(tmp_path):
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(UsageError, match=r"there is no scheduler_config.json in .*model.*; give subfolder='scheduler'"):
        hasten.Scheduler.from_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="is no folder here, and diffusers found no scheduler there"):
        hasten.Scheduler.from_pretrained(tmp_path / "none", local_files_only=True)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"scheduler_config.json is not JSON: "):
        hasten.Scheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"holds no configuration but \[1\]"):
        hasten.Scheduler.from_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="from_config takes a scheduler or its configuration, not 'owner/model'; from_pre"
    ):
        hasten.Scheduler.from_config("owner/model")


def test_saved_configuration_is_read_by_diffusers(tmp_path):
    theirs = diffusers.UniPCMultistepScheduler(**table.STABLE_DIFFUSION, solver_order=3)
    hasten.Scheduler.from_config(theirs).save_pretrained(tmp_path)
    again = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.solver_order == 3
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "UniPCMultistepScheduler"


def test_a_pipeline_samples_with_it_unchanged_and_is_saved_with_it(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        out_channels=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    base = diffusers.DPMSolverMultistepScheduler(**table.STABLE_DIFFUSION)
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), base)  # in training it drops labels at random
    pipe.set_progress_bar_config(disable=True)

    def pictures():
        generator = torch.Generator().manual_seed(1)
        return pipe([1, 2], num_inference_steps=6, generator=generator, output_type="np").images

    wanted = pictures()
    pipe.scheduler = hasten.Scheduler.from_config(pipe.scheduler)
    got = pictures()
    assert wanted.std() > 0.01
    assert np.abs(got - wanted).max() < 1e-4
    pipe.scheduler = hasten.Scheduler.from_config(base.config, solver="ddim:spacing=trailing")
    other = pictures()
    assert np.abs(other - wanted).max() > 1e-3
    pipe.save_pretrained(tmp_path)
    for given in ({}, {"scheduler": pipe.scheduler}):
        pipe = diffusers.DiTPipeline.from_pretrained(tmp_path, **given)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe.scheduler) is hasten.Scheduler
        assert np.abs(pictures() - other).max() < 1e-6
    assert diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler") is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_timesteps(), "set_timesteps needs a number of steps, timesteps or sigmas; none was given"),
        (lambda s: s.step(NOISE, 1, NOISE), "call set_timesteps\\(steps\\) first; there is no table before"),
        (lambda s: (s.set_timesteps(3), s.step(NOISE, 5, NOISE)), "5 is none of the timesteps; pass one of scheduler"),
        (lambda s: s.set_timesteps(3, mu=1.0), "ddim has no option 'mu'"),
        (lambda s: s.set_timesteps(timesteps=[5, 5]), "times must descend, each given once; 5, 5 were given"),
        (
            lambda s: s.from_config({"_class_name": "DDIMSchedular"}),
            "no solver for diffusers' DDIMSchedular; .*Did you",
        ),
        (lambda s: s.from_config({}), r"the configuration does not say whose it is \(_class_name\)"),
        (lambda s: s.from_config(s.config, solver="unpic"), "no solver named 'unpic'.*Did you mean 'unipc'?"),
        (lambda s: s.from_config(s.config, variance_type="learned"), "the network predicts a variance too"),
        (lambda s: s.from_config(s.config, beta_schedule="cosine"), "unknown noise schedule 'cosine'"),
    ],
)
def test_message_says_what_is_wrong(call, message):
    scheduler = hasten.Scheduler.from_config(diffusers.DDIMScheduler(clip_sample=False))
    with pytest.raises(UsageError, match=message):
        call(scheduler)


def test_no_step_after_the_last():
    ours = hasten.Scheduler.from_config(diffusers.DDIMScheduler(clip_sample=False))
    denoised(ours, NOISE, 3)
    with pytest.raises(UsageError, match="all 3 steps are taken; call set_timesteps to start again"):
        ours.step(NOISE, 1, NOISE)
