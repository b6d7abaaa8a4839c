"""Exactly the counts of the architecture, however the graph arrives. Real width: ``-m slow``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hasten.models import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "tables"))
import counts as table

SHAPES = json.loads((Path(__file__).parents[1] / "data" / "group_norm_and_attention_counts.json").read_text())


@pytest.mark.parametrize("name", table.MODELS)
def test_registry_expects_what_the_architecture_has(name: str) -> None:
    expected = registry.get(name).expected
    wanted = SHAPES[name]
    assert expected["group-norm-act"] == wanted["group_norms"]
    assert expected["group-norm-act.silu"] == wanted["with_silu"]
    assert expected["attention"] == wanted["attentions"]


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("sd15-unet", "sdpa"),
        ("sd15-unet", "classic"),
        ("sd15-vae-decoder", "sdpa"),
        ("sd15-vae-decoder", "classic"),
        ("sdxl-unet", "sdpa"),
    ],
)
def test_fx(name: str, processor: str) -> None:
    row = table.on_fx(registry.get(name, reduced=True, processor=processor), "")
    assert row.counts == row.expected


ONNX = [
    ("sd15-vae-decoder", 18, "classic", True),
    ("sd15-vae-decoder", 20, "sdpa", True),
    ("sd15-vae-decoder", 22, "classic", False),
    ("sd15-vae-decoder", 23, "sdpa", False),
    ("sd15-unet", 18, "sdpa", False),
    ("sd15-unet", 20, "classic", False),
    ("sd15-unet", 22, "sdpa", True),
]
"""Each opset, processor and kind of batch; `test_every_row_reduced` has them all together."""


@pytest.mark.parametrize(("name", "opset", "processor", "dynamic"), ONNX)
def test_onnx(name: str, opset: int, processor: str, dynamic: bool) -> None:
    row = table.on_onnx(registry.get(name, reduced=True, processor=processor), opset, dynamic, "")
    assert row.counts == row.expected


@pytest.mark.slow
@pytest.mark.parametrize("name", table.MODELS)
def test_every_row_reduced(name: str) -> None:
    assert [r.how for r in table.rows((name,), reduced=True) if not r.right] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", table.MODELS)
def test_full_width(name: str) -> None:
    adapter = registry.get(name)
    row = table.on_fx(adapter, "")
    assert row.counts == row.expected
    assert row.seconds < 10
