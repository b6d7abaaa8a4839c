"""The cache settings of diffusers and cache-dit as policies, read by class name and attributes: neither is imported.

diffusers: ``FirstBlockCacheConfig``, ``MagCacheConfig``, ``TaylorSeerCacheConfig``. cache-dit: ``DBCacheConfig`` and
its base ``BasicCacheConfig``, with a ``TaylorSeerCalibratorConfig`` beside it or without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.passes.steps.catalog import build, entry
from hasten.passes.steps.options import Request, read_all
from hasten.passes.steps.policy import Policy


def from_config(config: Any, calibrator: Any = None) -> Policy:
    """Build the policy that a peer's settings ask for; `UsageError` where there is none that does the same."""
    return build(request_from(config, calibrator))


def request_from(config: Any, calibrator: Any = None) -> Request:
    """Like `from_config`, as a request, whose text goes to a command line or a manifest."""
    kind = type(config).__name__
    if kind not in _READERS:
        raise UsageError(
            f"a {kind} is no step-cache policy; these are: {', '.join(_READERS)}.{nearest(kind, _READERS)}"
        )
    if calibrator is not None and kind not in _WITH_CALIBRATOR:
        raise UsageError(f"a {type(calibrator).__name__} goes with {' or '.join(_WITH_CALIBRATOR)}, not with {kind}")
    name, options = _READERS[kind](config, calibrator) if calibrator is not None else _READERS[kind](config)
    return Request(name, read_all(name, entry(name).options, {k: v for k, v in options.items() if v is not None}))


_Read = tuple[str, Mapping[str, Any]]


def _first_block(config: Any) -> _Read:
    return "first-block", {"threshold": float(config.threshold)}


def _mag(config: Any) -> _Read:
    if config.calibrate:
        raise UsageError("a MagCacheConfig with calibrate=True measures ratios and reuses nothing; give mag_ratios")
    return "magcache", {
        "ratios": [float(ratio) for ratio in config.mag_ratios],
        "threshold": float(config.threshold),
        "limit": config.max_skip_steps,
        "retention": float(config.retention_ratio),
        "interpolation": "nearest",
    }


def _taylor(config: Any) -> _Read:
    for name in ("skip_predict_identifiers", "cache_identifiers"):
        if getattr(config, name) is not None:
            raise UsageError(
                f"a TaylorSeerCacheConfig with {name} names modules by pattern, which has no counterpart; leave it "
                "out, or use taylorseer:granularity=modules,modules=NAME/NAME"
            )
    return "taylorseer", {
        "interval": config.cache_interval,
        "order": config.max_order,
        "warmup": config.disable_cache_before_step,
        "after": config.disable_cache_after_step,
        "granularity": "stack" if config.use_lite_mode else "modules",
    }


def _dbcache(config: Any, calibrator: Any = None) -> _Read:
    plain = {"warmup_interval": (1, None), "max_accumulated_residual_diff_threshold": (None,)}
    for name, usual in plain.items():
        if (value := getattr(config, name, usual[0])) not in usual:
            raise UsageError(f"a {type(config).__name__} with {name}={value} has no counterpart; leave it out")
    options: dict[str, Any] = {
        "head": config.Fn_compute_blocks,
        "foot": config.Bn_compute_blocks,
        "branches": "separate" if config.enable_separate_cfg else "joint",
        **_payload(calibrator),
    }
    bits = getattr(config, "steps_computation_mask", None)
    if bits is not None:
        bits = "".join(str(int(bit)) for bit in bits)
        if getattr(config, "steps_computation_policy", "dynamic") == "static":
            return "mask", {**options, "bits": bits, "granularity": "tail"}
    return "dbcache", {
        **options,
        "warmup": max(1, config.max_warmup_steps),
        "threshold": float(config.residual_diff_threshold),
        "limit": config.max_continuous_cached_steps,
        "cached": config.max_cached_steps,
        "mask": bits,
    }


def _payload(calibrator: Any) -> Mapping[str, Any]:
    if calibrator is None:
        return {}
    kind = type(calibrator).__name__
    if kind != "TaylorSeerCalibratorConfig":
        raise UsageError(f"a {kind} has no counterpart; a TaylorSeerCalibratorConfig has: payload=taylor-residual")
    of_residual = getattr(calibrator, "calibrator_cache_type", "residual") == "residual"
    return {"payload": "taylor-residual" if of_residual else "taylor", "order": calibrator.taylorseer_order}


_READERS: Mapping[str, Callable[..., _Read]] = {
    "FirstBlockCacheConfig": _first_block,
    "MagCacheConfig": _mag,
    "TaylorSeerCacheConfig": _taylor,
    "DBCacheConfig": _dbcache,
    "BasicCacheConfig": _dbcache,
}
_WITH_CALIBRATOR = ("DBCacheConfig", "BasicCacheConfig")
