"""Settings of diffusers (the real classes) and of cache-dit (objects with its attributes)."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import canonical, parse
from hasten.passes.steps.from_config import from_config, request_from
from hasten.passes.steps.simulate import replay


def settings(kind, **attributes):
    return type(kind, (SimpleNamespace,), {})(**attributes)


def dbcache(**changes):
    usual = {
        "Fn_compute_blocks": 8,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 0.08,
        "max_warmup_steps": 8,
        "warmup_interval": 1,
        "max_cached_steps": -1,
        "max_continuous_cached_steps": -1,
        "enable_separate_cfg": None,
        "num_inference_steps": None,
    }
    return settings("DBCacheConfig", **usual | changes)


def test_diffusers_settings():
    hooks = pytest.importorskip("diffusers.hooks")
    mag = pytest.importorskip("diffusers.hooks.mag_cache")
    assert from_config(hooks.FirstBlockCacheConfig(threshold=0.2)) == parse("first-block:threshold=0.2")
    policy = from_config(mag.MagCacheConfig(threshold=0.1, max_skip_steps=4, mag_ratios=mag.FLUX_MAG_RATIOS))
    expected = parse("magcache:model=flux,threshold=0.1,limit=4,retention=0.2")
    assert policy.decision.ratios == pytest.approx(expected.decision.ratios)
    assert policy.decision.mask(28).tolist() == expected.decision.mask(28).tolist()
    taylor = hooks.TaylorSeerCacheConfig(
        cache_interval=4, disable_cache_before_step=3, disable_cache_after_step=20, max_order=2, use_lite_mode=True
    )
    assert from_config(taylor) == parse("taylorseer:interval=4,warmup=3,after=20,order=2")
    assert from_config(hooks.TaylorSeerCacheConfig()).granularity == "modules"


def test_diffusers_settings_without_a_counterpart():
    hooks = pytest.importorskip("diffusers.hooks")
    mag = pytest.importorskip("diffusers.hooks.mag_cache")
    with pytest.raises(UsageError, match="calibrate=True measures ratios"):
        from_config(mag.MagCacheConfig(calibrate=True))
    with pytest.raises(UsageError, match="cache_identifiers names modules by pattern"):
        from_config(hooks.TaylorSeerCacheConfig(cache_identifiers=["^x$"]))
    with pytest.raises(UsageError, match="a FasterCacheConfig is no step-cache policy"):
        from_config(hooks.FasterCacheConfig())


def test_taylorseer_is_that_of_diffusers():
    hooks = pytest.importorskip("diffusers.hooks")
    torch = pytest.importorskip("torch")

    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = ""

        def forward(self, x):
            self.mask += "1"
            return x**3 / 50

    mixin = pytest.importorskip("diffusers.models.cache_utils").CacheMixin
    for interval, before, after, order in ((4, 3, None, 1), (3, 1, 9, 2), (2, 1, None, 0), (5, 4, 12, 3)):
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=before,
            disable_cache_after_step=after,
            max_order=order,
            cache_identifiers=["inner"],
            taylor_factors_dtype=torch.float32,
        )
        model = type("Model", (torch.nn.Module, mixin), {})()
        model.inner = Counter()
        model.enable_cache(config)
        counted, results = "", []
        for step in range(16):
            calls = len(model.inner.mask)
            with model.cache_context("test"):
                results.append(float(model.inner(torch.ones(1) * step)[0]))
            counted += str(len(model.inner.mask) - calls)
        text = f"taylorseer:interval={interval},warmup={before},order={order}" + (f",after={after}" if after else "")
        inputs = [np.full(1, step, np.float32) for step in range(16)]
        played = replay(parse(text), lambda x, _: x**3 / 50, inputs)
        assert played.mask == counted
        assert [float(o[0]) for o in played.outputs] == pytest.approx(results, rel=1e-5)


def test_cache_dit_settings():
    assert from_config(dbcache()) == parse("dbcache")
    changed = dbcache(
        Fn_compute_blocks=1, Bn_compute_blocks=2, residual_diff_threshold=0.2, max_warmup_steps=4, max_cached_steps=20,
        max_continuous_cached_steps=4, enable_separate_cfg=True,
    )  # fmt: skip
    expected = "dbcache:head=1,foot=2,threshold=0.2,warmup=4,cached=20,limit=4,branches=separate"
    assert from_config(changed) == parse(expected)
    assert str(request_from(changed)) == canonical(expected)
    masked = dbcache(steps_computation_mask=[1, 1, 0, 1], steps_computation_policy="dynamic")
    assert from_config(masked) == parse("dbcache:mask=1101")
    masked = dbcache(steps_computation_mask=[1, 1, 0, 1], steps_computation_policy="static")
    assert from_config(masked) == parse("mask:1101,granularity=tail,head=8")


def test_cache_dit_with_a_calibrator():
    taylor = settings("TaylorSeerCalibratorConfig", taylorseer_order=2, calibrator_cache_type="residual")
    assert from_config(dbcache(), taylor) == parse("dbcache:payload=taylor-residual,order=2")
    taylor.calibrator_cache_type = "hidden_states"
    assert from_config(dbcache(), taylor) == parse("dbcache:payload=taylor,order=2")
    with pytest.raises(UsageError, match="a FoCaCalibratorConfig has no counterpart"):
        from_config(dbcache(), settings("FoCaCalibratorConfig"))
    with pytest.raises(UsageError, match="goes with DBCacheConfig or BasicCacheConfig"):
        from_config(settings("FirstBlockCacheConfig", threshold=0.1), taylor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_interval": 2}, "warmup_interval=2 has no counterpart"),
        ({"max_accumulated_residual_diff_threshold": 0.4}, "max_accumulated_residual_diff_threshold=0.4"),
        ({"Fn_compute_blocks": 0}, "dbcache: head: 0 was given; it goes from 1"),
    ],
)
def test_cache_dit_settings_without_a_counterpart(changes, message):
    with pytest.raises(UsageError, match=message):
        from_config(dbcache(**changes))


def test_other_objects():
    with pytest.raises(UsageError, match="a dict is no step-cache policy"):
        from_config({})
    with pytest.raises(UsageError, match="Did you mean 'DBCacheConfig'"):
        from_config(settings("DBCachConfig"))


def test_policies_need_no_torch():
    code = (
        "import sys; from hasten.passes.steps import catalog, describe, from_config, simulate;"
        "[catalog.entry(n) for n in catalog.names()]; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
