"""A scheduler in the place of diffusers' own, in loops as their pipelines write them."""

import inspect

import numpy as np
import pytest
import solvers as table
import torch
from scheduler_loop import NOISE, close, denoised, network

import hasten
from hasten.errors import UsageError

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
