"""The table over ONNX's own node cases: outputs stay, and each operator's decomposition is as good as the operator."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("onnx_node_tests", Path(__file__).with_name("onnx_node_tests.py"))
node_tests = importlib.util.module_from_spec(SPEC)
sys.modules["onnx_node_tests"] = node_tests  # dataclasses look their module up
SPEC.loader.exec_module(node_tests)

TOO_STRICT = {"test_affine_grid_2d_expanded", "test_affine_grid_2d_align_corners_expanded"}
"""Range gets vectors of one element there, which ONNX Runtime refuses as soon as it sees their rank."""


@pytest.fixture(scope="module")
def results():
    logging.disable(logging.WARNING)
    found, skipped = node_tests.run()
    logging.disable(logging.NOTSET)
    assert skipped < 500
    return {r.name: r for r in found}


def test_every_output_stays(results):
    assert len(results) > 1300
    wrong = {r.name: r.wrong for r in results.values() if r.wrong}
    assert wrong.keys() <= TOO_STRICT, wrong


def test_decompositions_are_recognised_like_the_operator(results):
    recognised = [name for name, r in results.items() if r.recognised and "expanded" not in name]
    twins = [f"{name}_expanded" for name in recognised if f"{name}_expanded" in results]
    assert len(twins) >= 30
    assert [name for name in twins if not results[name].recognised] == []
    expanded = {name for name, r in results.items() if r.recognised and "expanded" in name}
    assert {n for n in results if n.startswith("test_gelu") and "expanded" in n} <= expanded


def test_what_is_left_alone_has_a_reason(results):
    """An Attention that is not recognised has a cache, a soft cap, a window, padded keys or read scores."""
    more = ("past", "present", "softcap", "qk_matmul", "nonpad", "padded", "window", "cache", "fullymasked_qk", "mode3")
    left = [n for n, r in results.items() if n.startswith("test_attention") and not r.recognised]
    assert [n for n in left if not any(word in n for word in more)] == []


def test_no_rewrite_is_taken_back(results):
    """A site that its check takes back is a defect of the view or of a rule."""
    differs = {n: r.reasons for n, r in results.items() if any("the result" in reason for reason in r.reasons)}
    assert differs == {}


@pytest.mark.parametrize("only", ["attention", "group_normalization", "gelu"])
@pytest.mark.parametrize("target", ["onnxruntime:cpu", "tensorrt-rtx:sm89"])
def test_outputs_stay_for_a_target(only, target):
    logging.disable(logging.WARNING)
    found, _ = node_tests.run(only, target)
    logging.disable(logging.NOTSET)
    assert found
    assert {r.name: r.wrong for r in found if r.wrong} == {}


def test_the_table_has_totals(results):
    text = node_tests.table(list(results.values()), 3)
    assert "3 more are not passed by ONNX Runtime itself" in text
    assert text.splitlines()[0].split() == ["operator", "cases", "recognised", "equal", "left", "alone"]
