"""The same step cache as diffusers' own hooks and cache-dit: the same decisions, and the same outputs.

Flux has two streams that become one, Wan one, CogVideoX two, Latte one that changes its layout from block to block.
Named differences: these hooks know no last step, so ours is asked without one; a distance equal to the threshold reuses
in diffusers (``at_threshold=reuse``) and computes in cache-dit (``at_threshold=compute``), whose first
``max_warmup_steps`` calls are our ``warmup``. Latte's spatial and temporal blocks are two lists that take turns, which
neither library's rows of blocks can be, so the peers get pairs of them (`latte_pairs`); a pair is two of our blocks
(``head=2``). cache-dit decides for each of Flux's two lists of blocks by itself, with a cache of its own: it is
compared on the first, behind which ours leaves the second list's eight to run (``foot=8``).
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
from latte_pairs import Pair, paired

STEPS = 12
FRAMES = 4
MODELS = {
    "flux": ("FluxTransformer", {"num_layers": 4, "num_single_layers": 8}),
    "wan": ("WanTransformer3D", {"num_layers": 6}),
    "cogvideox": ("CogVideoX15Transformer", {"num_layers": 6}),
    "latte": ("LatteTransformer", {"num_layers": 4, "video_length": FRAMES}),
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    key, more = MODELS[name]
    config = configs()[key]
    config = {**config, "init": {**config["init"], **more}}
    if name == "latte":
        config["inputs"] = {**config["inputs"], "hidden_states": {"float": [2, 4, FRAMES, 8, 8]}}
    return build_config(config), draw(config, 1)


def build_for_peer(name: str, calls: list[dict[str, Any]]) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """The same model and calls as a peer can take them."""
    model, _ = build(name)
    if name != "latte":
        return model, calls
    return paired(model, FRAMES), [{**given, "enable_temporal_attentions": False} for given in calls]


@pytest.fixture(autouse=True, scope="module")
def _diffusers_knows_pairs() -> None:
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(Pair, TransformerBlockMetadata(return_hidden_states_index=0))


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


def test_pairs_are_lattes_own_blocks() -> None:
    model, inputs = build("latte")
    other, (given,) = build_for_peer("latte", [inputs])
    with torch.no_grad():
        wanted = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(other(**given, return_dict=False)[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("flux", 0.3),
        pytest.param("flux", 0.1, marks=pytest.mark.slow),
        ("wan", 0.05),
        ("wan", 0.02),
        ("cogvideox", 0.2),
        ("latte", 0.02),
        ("latte", 0.05),
    ],
)
def test_first_block_cache(name: str, threshold: float) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    model, inputs = build(name)
    calls = list(walk(inputs))
    hooked, given = build_for_peer(name, calls)
    wanted, mask = by_diffusers(hooked, FirstBlockCacheConfig(threshold=threshold), given)
    assert "0" in mask
    assert "1" in mask[1:]
    policy = f"first-block:threshold={threshold}"
    if name == "latte":
        policy = f"dbcache:head=2,foot=0,warmup=1,at_threshold=reuse,threshold={threshold}"
    assert same(model, calls, policy, wanted) == mask


def counted(model: torch.nn.Module) -> list[int]:
    """Grows by one whenever the last block runs, whatever is hooked around it."""
    blocks = [m for name, m in model.named_children() if name.endswith("blocks") and isinstance(m, torch.nn.ModuleList)]
    layer = next(m for m in blocks[-1][-1].modules() if isinstance(m, torch.nn.Linear))
    calls: list[int] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def run_counted(model: torch.nn.Module, calls: list[dict[str, Any]]) -> tuple[list[torch.Tensor], str]:
    """Outputs of a hooked model, and which calls ran its last block."""
    ran, outputs, mask = counted(model), [], ""
    with torch.no_grad():
        for given in calls:
            before = len(ran)
            outputs.append(model(**given, return_dict=False)[0])
            mask += str(int(len(ran) > before))
    return outputs, mask


def same(model: torch.nn.Module, calls: list[dict[str, Any]], policy: str, wanted: list[torch.Tensor]) -> str:
    """Ours on the same calls: the outputs are those of the peer; returns the decisions."""
    cached = CachedEager(model, {**calls[0], "return_dict": False}, policy, STEPS)
    for given, output in zip(calls, wanted, strict=True):
        found = cached(**_flat({**given, "return_dict": False}))
        torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
    return cached.mask


@pytest.mark.parametrize(
    ("name", "threshold", "most", "retention"),
    [("flux", 0.2, 3, 0.2), ("wan", 0.1, 2, 0.1), ("cogvideox", 0.3, 4, 0.3), ("latte", 0.2, 3, 0.2)],
)
def test_magcache(name: str, threshold: float, most: int, retention: float) -> None:
    from diffusers.hooks import MagCacheConfig

    ratios = [1.0, *(1.0 + 0.05 * (-1) ** i / (1 + i % 4) for i in range(STEPS - 1))]
    other, inputs = build(name)
    calls = list(walk(inputs))
    model, hooked = build_for_peer(name, calls)
    model.enable_cache(
        MagCacheConfig(
            threshold=threshold,
            max_skip_steps=most,
            retention_ratio=retention,
            num_inference_steps=STEPS,
            mag_ratios=ratios,
        )
    )
    with model.cache_context("cond"):
        wanted, mask = run_counted(model, hooked)
    assert "0" in mask
    assert "1" in mask.lstrip("1")
    text = f"magcache:ratios={'/'.join(map(repr, ratios))},threshold={threshold},limit={most},retention={retention}"
    assert same(other, calls, text, wanted) == mask


@pytest.mark.parametrize(
    ("name", "pattern", "threshold", "front", "back", "warmup"),
    [
        ("wan", "Pattern_2", 0.05, 1, 0, 1),
        ("wan", "Pattern_2", 0.06, 2, 1, 1),
        ("cogvideox", "Pattern_0", 0.2, 1, 0, 2),
        ("cogvideox", "Pattern_0", 0.25, 2, 2, 4),
        ("flux", "Pattern_1", 0.1, 1, 0, 1),
        ("flux", "Pattern_1", 0.2, 1, 1, 2),
        ("latte", "Pattern_3", 0.02, 1, 0, 1),
        ("latte", "Pattern_3", 0.05, 1, 1, 2),
    ],
)
def test_dbcache(name: str, pattern: str, threshold: float, front: int, back: int, warmup: int) -> None:
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed: pip install cache-dit")
    other, inputs = build(name)
    calls = list(walk(inputs))
    model, hooked = build_for_peer(name, calls)
    blocks = next(m for n, m in model.named_children() if n in ("blocks", "transformer_blocks"))
    middle = next(m for m in blocks[len(blocks) - back - 1].modules() if isinstance(m, torch.nn.Linear))
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=blocks,
        forward_pattern=getattr(cache_dit.ForwardPattern, pattern),
        check_forward_pattern=False,
        has_separate_cfg=False,
    )
    cache_dit.enable_cache(
        adapter,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=front,
            Bn_compute_blocks=back,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            num_inference_steps=STEPS,
        ),
    )
    ran, mask, wanted = [], "", []
    middle.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        for given in hooked:
            before = len(ran)
            wanted.append(model(**given, return_dict=False)[0])
            mask += str(int(len(ran) > before))
    assert "0" in mask
    assert "1" in mask[warmup:]
    ours = 2 if name == "latte" else 1
    foot = back * ours + (8 if name == "flux" else 0)
    text = f"dbcache:head={front * ours},foot={foot},warmup={warmup},threshold={threshold}"
    assert same(other, calls, text, wanted) == mask


def _flat(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs by the names that a capture gives them."""
    named: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            named |= {f"{name}_{i}": v for i, v in enumerate(value)}
        else:
            named[name] = value
    return named


MODULES = [r".*attn\d?", r".*\.ffn?", r".*\.ff_context", r"single_transformer_blocks\.\d+\.proj_out"]
"""What ``granularity=modules`` finds in the data flow, by these models' names; TaylorSeer's own are attentions."""


@pytest.mark.parametrize("granularity", ["output", "modules"])
@pytest.mark.parametrize(
    ("name", "interval", "order"), [("flux", 3, 1), ("wan", 4, 2), ("cogvideox", 3, 0), ("latte", 3, 1)]
)
def test_taylorseer(name: str, interval: int, order: int, granularity: str) -> None:
    """Lite, which forecasts the last projection, is our forecast of the result; Latte needs no pairs here."""
    from diffusers.hooks import TaylorSeerCacheConfig

    model, inputs = build(name)
    calls = list(walk(inputs))
    hooked, _ = build(name)
    lite = granularity == "output"
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=lite,
        cache_identifiers=None if lite else MODULES,
    )
    hooked.enable_cache(config)
    wanted = []
    with torch.no_grad():
        for given in calls:
            with hooked.cache_context("cond"):
                wanted.append(hooked(**given, return_dict=False)[0])
    policy = f"taylorseer:interval={interval},warmup=2,order={order},granularity={granularity}"
    mask = same(model, calls, policy, wanted)
    assert mask.startswith("110")
    assert "1" in mask[3:]
