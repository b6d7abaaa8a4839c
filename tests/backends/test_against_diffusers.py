"""The same step cache as diffusers' own hooks: the same decisions, and the same outputs, where the rule is the same.

Flux has two streams that become one, Wan one, CogVideoX two. Named differences: diffusers' hook never reuses by a
schedule and knows no last step, so ours is asked without one; a distance equal to the threshold reuses in both
(``at_threshold=reuse``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cached_eager import CachedEager
from diffusers_configs import build as build_config
from diffusers_configs import configs
from diffusers_configs import inputs as draw

STEPS = 12
MODELS = {
    "flux": ("FluxTransformer", {"num_layers": 4, "num_single_layers": 8}),
    "wan": ("WanTransformer3D", {"num_layers": 6}),
    "cogvideox": ("CogVideoX15Transformer", {"num_layers": 6}),
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    key, more = MODELS[name]
    config = configs()[key]
    return build_config({**config, "init": {**config["init"], **more}}), draw(config, 1)


def walk(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A run: latents that drift."""
    noise = torch.Generator().manual_seed(2)
    for i in range(STEPS):
        drift = 0.03 * i * torch.randn(inputs["hidden_states"].shape, generator=noise)
        yield {**inputs, "hidden_states": inputs["hidden_states"] + drift}


def by_diffusers(model: torch.nn.Module, config: Any, calls: list[dict[str, Any]]) -> tuple[list[torch.Tensor], str]:
    """Outputs under a hook, and its decisions as a mask."""
    from diffusers.hooks import first_block_cache

    mask, original = "", first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks

    def record(self: Any, residual: torch.Tensor) -> bool:
        nonlocal mask
        decided = bool(original(self, residual))
        mask += str(int(decided))
        return decided

    model.enable_cache(config)
    outputs = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(first_block_cache.FBCHeadBlockHook, "_should_compute_remaining_blocks", record)
        for given in calls:
            with model.cache_context("cond"):
                outputs.append(model(**given, return_dict=False)[0])
    model.disable_cache()
    return outputs, mask


@pytest.mark.parametrize(
    ("name", "threshold"), [("flux", 0.3), ("flux", 0.1), ("wan", 0.05), ("wan", 0.02), ("cogvideox", 0.2)]
)
def test_first_block_cache(name: str, threshold: float) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    model, inputs = build(name)
    calls = list(walk(inputs))
    wanted, mask = by_diffusers(model, FirstBlockCacheConfig(threshold=threshold), calls)
    assert "0" in mask
    assert "1" in mask[1:]
    flat = {**calls[0], "return_dict": False}
    cached = CachedEager(model, flat, f"first-block:threshold={threshold}", STEPS)
    for given, output in zip(calls, wanted, strict=True):
        found = cached(**_flat({**given, "return_dict": False}))
        torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    assert cached.mask == mask


def _flat(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs by the names that a capture gives them."""
    named: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            named |= {f"{name}_{i}": v for i, v in enumerate(value)}
        else:
            named[name] = value
    return named
