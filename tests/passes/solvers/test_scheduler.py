"""A scheduler in the place of diffusers' own, in loops as their pipelines write them."""

import json

import numpy as np
import pytest
import solvers as table
import torch

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
]


@pytest.mark.parametrize(("kind", "config", "begin"), LATE)
def test_image_to_image_begins_late_as_the_scheduler_it_replaces(kind, config, begin):
    theirs = made(kind, config)
    ours = hasten.Scheduler.from_config(theirs)
    wanted, seen = denoised(theirs, NOISE, 20, begin)
    got, inputs = denoised(ours, NOISE, 20, begin)
    assert close(inputs[0], seen[0])
    assert close(got, wanted)


def test_what_cannot_begin_late_says_so():
    ours = hasten.Scheduler.from_config(diffusers.PNDMScheduler(skip_prk_steps=True))
    ours.set_timesteps(10)
    ours.set_begin_index(4)
    with pytest.raises(UsageError, match=r"plms cannot start at step 4: its start is fixed; those that can: .*unipc"):
        ours.step(NOISE, ours.timesteps[4], NOISE)


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


def test_saved_configuration_is_read_by_diffusers(tmp_path):
    theirs = diffusers.UniPCMultistepScheduler(**table.STABLE_DIFFUSION, solver_order=3)
    hasten.Scheduler.from_config(theirs).save_pretrained(tmp_path)
    again = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.solver_order == 3
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "UniPCMultistepScheduler"


def test_a_pipeline_samples_with_it_unchanged():
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
    assert np.abs(pictures() - wanted).max() > 1e-3


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
