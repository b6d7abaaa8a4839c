"""Step caches that others publish, on the bundled models' own weights: diffusers' hooks and cache-dit, in PyTorch.

They are put on the diffusers model itself, with each library's own settings, which then runs eagerly, compiled as a
whole, or with its blocks compiled one by one, as both libraries advise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.models.adapter import Adapter
from hasten.models.scenes.adapters import load, specification

STEPS = 50
FORMS = ("eager", "compile", "blocks")
"""``compile``: ``torch.compile`` of the model. ``blocks``: diffusers' ``compile_repeated_blocks``."""


@dataclass(frozen=True)
class Peer:
    """One setting of one library's cache. ``apply`` puts it on a model and returns what begins a run with it."""

    library: str
    method: str
    setting: str
    apply: Callable[[nn.Module], Callable[[], None]] = field(repr=False, compare=False)


class PeerDenoise:
    """The diffusers model under a peer's cache, called as any denoiser; `begin` starts a run.

    ``computed`` says how often the model's last block ran in this run, None where compiled code does not tell.
    """

    def __init__(self, adapter: Adapter, peer: Peer | None, *, form: str = "eager") -> None:
        self.model = load(adapter.name).eval().requires_grad_(False)
        self.kind = specification(adapter.name)["class"]
        self.calls = 0
        # A tensor, as pipelines have it: of a float, each new value would be compiled for anew.
        self._time = torch.zeros(())
        self.model.now = lambda: self._time  # type: ignore[assignment]
        self._begin = peer.apply(self.model) if peer is not None else lambda: None
        self.counted = form == "eager"
        if self.counted:
            _last_work(self.model).register_forward_pre_hook(self._count)
        self.flip = peer is not None and peer.method == "FasterCache"
        self._forward: Callable[..., Any] = torch.compile(self.model) if form == "compile" else self.model
        if form != "eager":  # models in one process share the hooks' code, which is compiled for each block of each
            torch._dynamo.config.recompile_limit = 64
        if form == "blocks":
            self.model._repeated_blocks = sorted({type(m).__name__ for m in _blocks(self.model)})
            self.model.compile_repeated_blocks()

    @property
    def computed(self) -> int | None:
        return self.calls if self.counted else None

    def begin(self) -> None:
        self.calls, self._time = 0, torch.zeros(())
        self._begin()

    def __call__(self, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        self._time = times[0].clone()
        if self.flip:  # FasterCache wants the half without a label first
            x, times, condition = (torch.cat(t.chunk(2)[::-1]) for t in (x, times, condition))
        made: torch.Tensor = self._forward(**self._named(x, times, condition), return_dict=False)[0]
        return torch.cat(made.chunk(2)[::-1]) if self.flip else made

    def _named(self, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.kind == "UNet2DModel":
            return {"sample": x, "timestep": times, "class_labels": condition}
        if self.kind == "LatteTransformer3DModel":
            named = {"hidden_states": x, "timestep": times, "encoder_hidden_states": condition}
            paired = isinstance(self.model.temporal_transformer_blocks, list)
            return {**named, "enable_temporal_attentions": False} if paired else named
        return {"hidden_states": x, "timestep": times, "class_labels": condition}

    def _count(self, *_: object) -> None:
        self.calls += 1


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What repeats: the blocks of a transformer; a UNet's residual blocks and attentions."""
    if hasattr(model, "up_blocks"):
        sides = [*model.down_blocks, model.mid_block, *model.up_blocks]
        return [m for side in sides for kind in ("resnets", "attentions") for m in getattr(side, kind, None) or ()]
    return [*model.transformer_blocks, *getattr(model, "temporal_transformer_blocks", ())]


def _last_work(model: nn.Module) -> nn.Module:
    """A module that runs where the last block runs, and not where a cache leaves the block out."""
    if hasattr(model, "up_blocks"):
        found: nn.Module = model.mid_block.resnets[0].conv1
        return found
    last = getattr(model, "temporal_transformer_blocks", model.transformer_blocks)[-1]
    return getattr(last, "temporal", last).ff.net[0]


def peers(name: str, ratios: Sequence[float]) -> list[Peer]:
    """Every setting to run on one bundled model; ``ratios`` are MagCache's, measured for it."""
    if name == "scenes-unet":
        return [*_attention_caches(), *_taylorseer("output")]
    if name == "scenes-video":
        pairs = [_first_block(t) for t in (0.05, 0.1, 0.2, 0.3)]
        pairs += [_magcache(t, k, ratios) for t, k in ((0.06, 3), (0.12, 3), (0.4, 6))]
        pairs += _cache_dit()
        own = [*_taylorseer("attentions"), *_attention_caches(temporal=True)]
        return [*(replace(p, apply=_on_pairs(p.apply)) for p in pairs), *own]
    blocks = [_first_block(t) for t in (0.07, 0.1, 0.15, 0.2, 0.3)]
    blocks += [_magcache(t, k, ratios) for t, k in ((0.03, 3), (0.12, 3), (0.2, 4), (0.4, 6), (0.8, 6))]
    return [*blocks, *_taylorseer("attention"), *_attention_caches(), *_cache_dit()]


def _on_pairs(apply: Callable[[nn.Module], Callable[[], None]]) -> Callable[[nn.Module], Callable[[], None]]:
    """On Latte with its two rows of blocks as one of pairs, which libraries that know only rows of blocks can take."""

    def paired(model: nn.Module) -> Callable[[], None]:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        sys.path.append(str(Path(__file__).resolve().parents[1] / "backends"))
        import latte_pairs

        TransformerBlockRegistry.register(latte_pairs.Pair, TransformerBlockMetadata(return_hidden_states_index=0))
        return apply(latte_pairs.paired(model, model.config.video_length))

    return paired


def _hooks(model: nn.Module) -> Callable[[], None]:
    """Begin a run: every hook forgets, and is told that it is in one, as a pipeline would."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    registry = HookRegistry.check_if_exists_or_initialize(model)

    def begin() -> None:
        registry.reset_stateful_hooks()
        _set_cache_context(model, CacheContext(name="inference"))

    return begin


def _first_block(threshold: float) -> Peer:
    def apply(model: nn.Module) -> Callable[[], None]:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
        return _hooks(model)

    return Peer("diffusers", "FirstBlockCache", f"threshold={threshold:g}", apply)


def _magcache(threshold: float, most: int, ratios: Sequence[float]) -> Peer:
    def apply(model: nn.Module) -> Callable[[], None]:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        config = MagCacheConfig(
            threshold=threshold, max_skip_steps=most, num_inference_steps=STEPS, mag_ratios=list(ratios)
        )
        apply_mag_cache(model, config)
        return _hooks(model)

    return Peer("diffusers", "MagCache", f"threshold={threshold:g},max_skip_steps={most}", apply)


TAYLOR_MODULES: Mapping[str, Sequence[str]] = {
    "attention": (r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.ff"),
    "attentions": (r"(temporal_)?transformer_blocks\.\d+\.attn[12]", r"(temporal_)?transformer_blocks\.\d+\.ff"),
    "output": (r"conv_out",),
}
"""What TaylorSeer predicts: its default patterns meet no module of these models. ``conv_out`` predicts the whole result
of a UNet, and with it goes everything that is skipped to make it."""


def _taylorseer(what: str) -> list[Peer]:
    skipped = [r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.\d+", r"mid_block"] if what == "output" else None

    def made(interval: int, order: int) -> Peer:
        def apply(model: nn.Module) -> Callable[[], None]:
            from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

            config = TaylorSeerCacheConfig(
                cache_interval=interval,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=list(TAYLOR_MODULES[what]),
                skip_predict_identifiers=skipped,
            )
            apply_taylorseer_cache(model, config)
            if not any(hasattr(m, "_diffusers_hook") for m in model.modules()):
                raise AssertionError("TaylorSeer hooked nothing")
            return _hooks(model)

        return Peer("diffusers", "TaylorSeer", f"cache_interval={interval},max_order={order}", apply)

    return [made(n, k) for n, k in ((2, 1), (3, 1), (5, 1), (6, 1), (5, 2))]


def _attention_caches(*, temporal: bool = False) -> list[Peer]:
    """PAB and FasterCache, which leave attention out, and FasterCache the half without a label too."""

    def pab(every: int) -> Peer:
        def apply(model: nn.Module) -> Callable[[], None]:
            from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=every,
                temporal_attention_block_skip_range=2 * every if temporal else None,
                spatial_attention_timestep_skip_range=(100, 900),
                temporal_attention_timestep_skip_range=(100, 900),
                current_timestep_callback=model.now,
            )
            apply_pyramid_attention_broadcast(model, config)
            return _hooks(model)

        return Peer("diffusers", "PAB", f"spatial_attention_block_skip_range={every}", apply)

    def faster(every: int) -> Peer:
        def apply(model: nn.Module) -> Callable[[], None]:
            from diffusers.hooks import FasterCacheConfig, apply_faster_cache

            config = FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                temporal_attention_block_skip_range=2 if temporal else None,
                unconditional_batch_skip_range=every,
                tensor_format="BCFHW" if temporal else "BCHW",
                current_timestep_callback=model.now,
                attention_weight_callback=lambda _: 0.3,
                _unconditional_conditional_input_kwargs_identifiers=(
                    "hidden_states",
                    "sample",
                    "encoder_hidden_states",
                    "timestep",
                    "class_labels",
                ),
            )
            apply_faster_cache(model, config)
            return _hooks(model)

        return Peer("diffusers", "FasterCache", f"unconditional_batch_skip_range={every}", apply)

    return [*(pab(n) for n in (2, 4)), *(faster(n) for n in (2, 5))]


def _cache_dit() -> list[Peer]:
    def made(threshold: float, order: int, front: int, warmup: int, mask: str = "") -> Peer:
        def apply(model: nn.Module) -> Callable[[], None]:
            import cache_dit
            from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig
            from cache_dit.caching.patch_functors import DiTPatchFunctor
            from diffusers import DiTTransformer2DModel

            def config() -> Any:
                return DBCacheConfig(
                    Fn_compute_blocks=front,
                    Bn_compute_blocks=0,
                    residual_diff_threshold=threshold,
                    max_warmup_steps=warmup,
                    num_inference_steps=STEPS,
                    steps_computation_mask=[int(b) for b in mask] if mask else None,
                )

            named: dict[str, Any] = {"check_forward_pattern": False}  # of pairs, which it does not know
            if isinstance(model, DiTTransformer2DModel):
                named = {"patch_functor": DiTPatchFunctor()}
            adapter = BlockAdapter(
                pipe=None,
                transformer=model,
                blocks=model.transformer_blocks,
                forward_pattern=ForwardPattern.Pattern_3,
                **named,
            )
            calibrator = {"calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=order)} if order else {}
            cache_dit.enable_cache(adapter, cache_config=config(), **calibrator)
            return lambda: cache_dit.refresh_context(model, cache_config=config(), **calibrator)

        name = f"F{front}B0 W{warmup} R{threshold:g}" + (f" T{order}" if order else "")
        return Peer("cache-dit", "DBCache" + (" + TaylorSeer" if order else ""), name, apply)

    plain = [made(t, 0, 1, 4) for t in (0.1, 0.15, 0.24)]
    return [*plain, *(made(t, 1, 1, 4) for t in (0.1, 0.15, 0.24, 0.4))]


def method_names(found: Sequence[Peer]) -> list[str]:
    """Every library's method once."""
    return list(dict.fromkeys(f"{p.library} {re.sub(' .*', '', p.method)}" for p in found))
