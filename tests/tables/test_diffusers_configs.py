"""Every tiny diffusers configuration: equal to eager, in as many graphs as without us, with nothing left to rewrite.

The rewritten graphs run in eager; with ``-m slow`` Inductor compiles them all.
"""

from __future__ import annotations

import json

import diffusers_configs as table
import pytest
import torch

from hasten.backends.capture import capture
from hasten.errors import HastenError

CONFIGS = table.configs()
INDUCTOR = ("AutoencoderTiny", "TemporalTransformer")
"""Compiled for real without ``-m slow`` as well."""
NO_RULE = ("LTX2VideoDiffusionDecoderModel",)
"""All its attention is flex_attention, which takes half a minute in eager: with ``-m slow``."""
LONG = (
    "AnyFlowFARTransformer3D",
    "AutoencoderKLCosmos",
    "AutoencoderKLWan",
    "LTX2Transformer",
    "OmniGenTransformer",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
    "WanAnimateTransformer3D",
)
"""The longest of those that have a sibling among the others: with ``-m slow``."""
AS_INDUCTOR = ("ConsistencyDecoderVAE", "LTX2VideoDiffusionDecoderModel")
"""The first draws noise, which Inductor draws otherwise than eager; flex_attention of the second fails to compile."""
WRONG_IF_STRICT = ("CogVideoXTransformer", "ConsisIDTransformer")
"""Strict export succeeds, and computes something else: a table written with ``.data[...].copy_()`` is lost."""


def test_every_configuration_is_here() -> None:
    assert len(CONFIGS) == 80
    assert CONFIGS.keys() >= {*table.CANNOT_CAPTURE, *INDUCTOR}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in (*NO_RULE, *LONG) else []) for n in CONFIGS]
)
def test_rewritten(name: str) -> None:
    row = table.measure(name, CONFIGS[name])
    assert (row.verdict, row.reason) == ("ok", "")
    assert row.graphs == row.plain_graphs > 0
    assert max(row.errors) <= table.TOLERANCE
    assert bool(row.hits) == (name not in NO_RULE)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in INDUCTOR else pytest.mark.slow) for n in CONFIGS])
def test_compiled(name: str) -> None:
    row = table.measure(name, CONFIGS[name], engine="inductor")
    if name in AS_INDUCTOR:
        assert row.verdict == "as Inductor"
        return
    assert (row.verdict, row.reason) == ("ok", "")
    assert bool(row.hits) == (name not in NO_RULE)


@pytest.mark.parametrize("name", table.CANNOT_CAPTURE)
def test_capture_refuses(name: str) -> None:
    model, inputs = table.build(CONFIGS[name]), table.inputs(CONFIGS[name], 1)
    with pytest.raises(HastenError) as caught:
        capture(model, (), inputs)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"cannot capture {type(model).__name__}: {table.CANNOT_CAPTURE[name]}")
    what_to_do = ("must leave forward", "pass the noise or the state as an input")
    assert str(caught.value).endswith(what_to_do)


@pytest.mark.parametrize("name", WRONG_IF_STRICT)
def test_strict_capture_of_a_lost_write_is_refused(name: str) -> None:
    with pytest.raises(HastenError) as caught:
        capture(table.build(CONFIGS[name]), (), table.inputs(CONFIGS[name], 1), strict=True)
    assert caught.value.exit_code == 1
    assert "it writes to its buffer" in str(caught.value)
    assert str(caught.value).endswith("an engine keeps no state; return the new value as an output instead")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in table.CANNOT_CAPTURE])
def test_capture_is_equal(name: str) -> None:
    capture(table.build(CONFIGS[name]), (), table.inputs(CONFIGS[name], 1))  # which compares, twice


def test_capture_of_what_fx_prints_wrong() -> None:
    """AutoencoderKLCosmos multiplies by ``(-1) ** x``, which FX prints as ``-1 ** x``."""
    config = CONFIGS["AutoencoderKLCosmos"]
    model, inputs = table.build(config), table.inputs(config, 1)
    program = capture(model, (), inputs)
    with torch.no_grad():
        want, got = model(**inputs).sample, program.module()(**inputs).sample
    assert table.relative_error([want], [got]) < 1e-5


def test_parameters_are_drawn_anew() -> None:
    model = table.build(CONFIGS["DiTTransformer2D"])
    again = table.build(CONFIGS["DiTTransformer2D"])
    assert all(p.count_nonzero() == p.numel() for p in model.parameters())
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from hasten.passes.rules import geglu

    def value_first(view, found, root):
        return view.emit("geglu", [found["x"]], {"approximate": "none", "gate_first": True}, at=root)

    monkeypatch.setattr(geglu, "GEGLU", dataclasses.replace(geglu.GEGLU, replace=value_first))
    row = table.measure("TemporalTransformer", CONFIGS["TemporalTransformer"])
    assert row.verdict == "wrong"
    assert row.reason.endswith(", 0.0001 is allowed")


def test_what_is_left_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.passes import catalog

    monkeypatch.setattr(catalog, "FX", ("attention",))
    row = table.measure("TemporalTransformer", CONFIGS["TemporalTransformer"])
    assert (row.verdict, row.reason) == ("left", "1 group_norm")


def test_a_failing_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from hasten.passes.rules import geglu

    monkeypatch.setattr(geglu, "GEGLU", dataclasses.replace(geglu.GEGLU, replace=lambda *_: 1 / 0))
    row = table.measure("TemporalTransformer", CONFIGS["TemporalTransformer"])
    assert row.failed == 1
    assert row.verdict != "ok"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--only", "PixArt", "--json"]) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    assert row["name"] == "PixArtTransformer2D"
    found = (row["graphs"], row["plain_graphs"], row["hits"], row["verdict"])
    assert found == (1, 1, {"attention": 2, "fold-conv": 3, "native-attention": 2}, "ok")
    total = "1 configurations: 1 ok; rewrites: attention 2, fold-conv 3, native-attention 2"
    assert captured.err.splitlines()[-1] == total
