"""The table of solvers: how evaluations are counted, when a mark is reached, and what is written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from solver_quality import SOLVERS, level, psnr, table_at, tables
from solver_quality_render import name_of, reached, render

from hasten.models.processes import process_of
from hasten.passes.solvers.process import Process

UNET, DIT = (Process.of(process_of(name) or {}) for name in ("scenes-unet", "scenes-dit"))


def solver(name: str, evaluations: int, right: float, psnr_db: float | None) -> dict[str, Any]:
    row = {"kind": "solvers", "model": "m", "count": 16, "solver": name, "evaluations": evaluations}
    return {**row, "right": right, "psnr_db": psnr_db}


ROWS = [
    solver("ddim:x=1", 250, 1.0, 40.0),
    solver("ddim:x=1", 5, 0.96, 20.0),
    solver("ddim:x=1", 3, 0.5, 15.0),
    solver("heun", 9, 1.0, 38.5),
    solver("ancestral", 9, 0.2, None),
    {"kind": "marks", "model": "m", "rms": 0.5, "right": 0.95, "psnr_db": 38.0},
    {"kind": "guided", "model": "m", "count": 8, "method": "a", "steps": 5, "weight": 0.0, "network": 5, "guide": 5,
     "right": 0.125},
    {"kind": "guided", "model": "m", "count": 8, "method": "a", "steps": 5, "weight": 2.0, "network": 5, "guide": 5,
     "right": 0.75},
    {"kind": "caf", "count": 8, "evaluations": 2, "method": "caf", "right": 0.5, "psnr_db": 21.0},
    {"kind": "caf", "count": 8, "evaluations": 2, "method": "scenes-dit flow-euler:compat=none", "right": 0.25,
     "psnr_db": 11.0},
]  # fmt: skip


def test_evaluations_are_rows_and_not_steps() -> None:
    for text, steps, rows in (("heun:compat=none", 10, 9), (SOLVERS[0], 10, 10), (SOLVERS[1], 10, 10)):
        table = table_at(text, UNET, steps)
        assert table is not None
        assert len(table) == rows
    assert table_at(SOLVERS[2], UNET, 3) is None  # PNDM begins with four evaluations a step
    assert table_at("flow-euler:compat=none", UNET, 10) is None


@pytest.mark.parametrize(("process", "alone"), [(UNET, "ddim"), (DIT, "flow-euler")])
def test_every_solver_that_applies_is_there(process: Process, alone: str) -> None:
    found = dict(tables(process))
    named = {text.partition(":")[0] for text in found}
    assert alone in named
    assert {"dpm++2m", "dpm++3m", "dpm++2s", "unipc", "deis", "lms", "euler", "heun"} <= named
    assert ({"plms", "pndm", "euler-ancestral"} <= named) == (process is UNET)
    for rows in found.values():
        counts = [len(table) for table in rows]
        assert counts == sorted(set(counts))
        assert all(not table.network.any() for table in rows)


def test_a_mark_is_reached_by_the_fewest_evaluations() -> None:
    own = [r for r in ROWS if r["kind"] == "solvers"][1:3]
    assert reached(own, "right", 0.95) == own[0]
    assert reached(own, "right", 0.5) == own[1]
    assert reached(own, "psnr_db", 38.0) is None
    # a difference of rms 0.005 to pictures of rms 0.5 is a fidelity of 0.99; 95 % of it is one of 0.9405
    assert level(20 * math.log10(2 / 0.005), 0.5) == pytest.approx(20 * math.log10(2 / (0.5 * 0.0595)))
    assert name_of("unipc:compat=none,order=3") == "unipc, order 3"
    assert psnr(torch.full((4, 3), 0.2), torch.zeros(2, 3)) == pytest.approx(20.0)


def test_tables_go_between_their_marks(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    assert render(jsonl, None, None) == 1
    assert "nothing was measured" in capsys.readouterr().err
    jsonl.write_text("\n".join(map(json.dumps, ROWS)))
    page.write_text("<!-- guided -->\nold\n<!-- /guided -->\n")
    assert render(jsonl, page, None) == 1
    assert "has no <!-- solver-quality -->" in capsys.readouterr().err
    names = ("solver-quality", "guided", "caf")
    page.write_text("".join(f"{n}\n<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in names))
    assert render(jsonl, page, None) == 0
    text = page.read_text()
    assert "old" not in text
    assert "| ddim | 5 | more than 5 | 20.0 (5) |" in text
    assert "| heun | 9 | 9 | 38.5 (9) |" in text
    assert "| ancestral | more than 9 | adds noise |  |" in text
    assert "m, 250 steps of ddim: 100.0% of 16 right, 40.0 dB; so the marks are 95.0% and 38.0 dB." in text
    assert "| 5 | a | 5, 5 | 75.0% |" in text
    assert "Without a guide, 5 steps: 12.5% of 8 right." in text
    assert "| caf | 50.0% | 21.0 |" in text
    assert "| flow-euler, scenes-dit | 25.0% | 11.0 |" in text


def test_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    jsonl, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    jsonl.write_text("\n".join(map(json.dumps, ROWS)))
    assert render(jsonl, None, plot) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
