"""AdaCache spends less on clips that stand still than on those that move, where MoReg looks at the motion."""

from __future__ import annotations

from dataclasses import replace

import motion
import pytest
import torch

import hasten
from hasten.models.registry import get

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow
COUNT = 4
"""Clips of each speed, in pairs of the same noise."""


def spent(folder, options):
    adapter = replace(get("scenes-video"), batch=2)
    with torch.no_grad():
        engine = hasten.build(adapter, target="onnxruntime:cpu", out=folder / "engine", cache=f"adacache:{options}")
        return motion.computed(engine, COUNT)


def test_still_clips_cost_less_than_moving_ones_with_moreg(tmp_path):
    found = spent(tmp_path, f"{motion.OPTIONS[1]},moreg=true")
    assert all(still < fast for still, fast in zip(found["still"], found["fast"], strict=True))
    assert sum(found["fast"]) > 1.3 * sum(found["still"])


def test_without_moreg_motion_hardly_matters(tmp_path):
    found = spent(tmp_path, f"{motion.OPTIONS[1]},moreg=false")
    assert all(abs(still - fast) <= 2 for still, fast in zip(found["still"], found["fast"], strict=True))
