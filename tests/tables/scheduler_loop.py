"""A loop over a scheduler as a pipeline writes it, with a network that is arithmetic."""

import torch

NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


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
