"""PyTorch's own samples of the operators that rules touch: equal to eager, alone and where rules fire."""

from __future__ import annotations

import logging

import opinfo as table
import pytest
import torch

CASES = [(name, composition) for name, compositions in table.COMPOSITIONS.items() for composition in compositions]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """Refused samples are logged with tracebacks."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("name", "composition"), CASES, ids=["-".join(c) for c in CASES])
def test_is_equal_to_eager(name: str, composition: str) -> None:
    row = table.measure(name, composition)
    assert row.different == []
    assert row.samples == row.equal + row.refused > 0
    assert bool(row.rewritten) == ((name, composition) in table.FIRES)
    if "group_norm" in name:
        assert row.rewritten == row.samples - row.refused


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.passes.rules import geglu

    wrong = geglu._replace

    def swapped(view, found, root):
        found.tags["gate"] = "first" if found.tags["gate"] == "last" else "last"
        return wrong(view, found, root)

    import dataclasses

    monkeypatch.setattr(geglu, "GEGLU", dataclasses.replace(geglu.GEGLU, replace=swapped))
    row = table.measure("nn.functional.glu", "gelu gate", (torch.float64,))
    assert 0 < len(row.different) <= row.rewritten
    assert row.equal == row.samples - len(row.different)
    assert "relative error" in row.different[0]


def test_reports_what_differs() -> None:
    one = torch.ones(3)
    assert table.difference([one], [one.double()], torch.float32) == (
        "[('torch.float64', (3,))] instead of [('torch.float32', (3,))]"
    )
    assert table.difference([one], [one * 1.1], torch.float32) == "relative error 0.1"
    assert table.difference([one], [one * float("inf")], torch.float32) == "infinities or NaN in other places"
    assert table.difference([one], [one * float("nan")], torch.float32) == "infinities or NaN in other places"
    assert table.difference([one * float("nan")], [one * 0], torch.float32) is None
    assert table.difference([one.long()], [one.long() * 2], torch.float32) == "other integers"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--only", "erf", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["operator", "composition", "samples", "rewritten", "equal", "refused"]
    assert out[-1] == "2 samples, 1 rewritten, 2 equal, 0 refused, 0 random, 0 different"
