import numpy as np
import pytest

from hasten.passes.steps.catalog import parse
from hasten.passes.steps.simulate import replay

INPUTS = [10.0 - n for n in range(10)]
OUTPUTS = [5 + 0.125 * n for n in range(10)]


@pytest.fixture(scope="module")
def compiled(compile_policies):
    texts = {"easy": "easycache:threshold=0.05,warmup=3", "eager": "easycache:threshold=0.05,warmup=1,last=0"}
    return compile_policies({name: parse(text) for name, text in texts.items()}, signal=(2,))


def run(compiled, engine, name="easy", inputs=INPUTS, outputs=OUTPUTS, **options):
    return compiled.run(engine, name, len(inputs), signal=inputs, before=inputs, after=outputs, **options)


def test_a_run(compiled, engine):
    bits, results, _ = run(compiled, engine)
    assert bits == "1110010011"
    assert [float(r[0]) for r in results] == [5, 5.125, 5.25, 4.25, 3.25, 5.625, 4.625, 3.625, 6, 6.125]
    assert run(compiled, engine, threshold=0.1)[0] == "1110000101"


def test_the_numpy_reference_runs_the_same():
    policy = parse("easycache:threshold=0.05,warmup=3")
    inputs = [np.full(2, x, np.float32) for x in INPUTS]
    played = replay(policy, lambda _, step: np.full(2, OUTPUTS[step], np.float32), inputs, signals=inputs)
    assert played.mask == "1110010011"
    assert float(played.outputs[8][0]) == 6


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_no_positive_threshold_is_off(compiled, engine, threshold):
    assert run(compiled, engine, threshold=threshold)[0] == "1" * 10


def test_one_computed_call_has_no_slope(compiled, engine):
    assert run(compiled, engine, "eager", threshold=1e9)[0][:3] == "110"


def test_an_input_that_stays_reuses_for_good(compiled, engine):
    assert run(compiled, engine, "eager", inputs=[1.0] * 6, outputs=[2.0] * 6)[0] == "110000"


def test_an_output_that_moves_under_a_still_input_computes(compiled, engine):
    assert run(compiled, engine, "eager", inputs=[1.0] * 6, threshold=1e9, outputs=OUTPUTS[:6])[0] == "111111"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_computes_until_it_is_gone(compiled, engine, bad):
    inputs = [1.0, 2.0, bad, 4.0, 5.0, 6.0, 7.0, 8.0]
    outputs = [2.0] * 8
    bits = run(compiled, engine, "eager", inputs=inputs, outputs=outputs, threshold=1e9)[0]
    assert bits == "11111000"
    # A NaN from the model itself: the next calls compute until two sound ones are there.
    outputs = [2.0, 2.0, 2.0, bad, 2.0, 2.0, 2.0, 2.0]
    bits = run(compiled, engine, "eager", inputs=[1.0 + n for n in range(8)], outputs=outputs, mask="11110000")[0]
    assert bits == "11110000"
    bits = run(compiled, engine, "eager", inputs=[1.0 + n for n in range(8)], outputs=[bad] * 8, threshold=1e9)[0]
    assert bits == "11111111"


def test_a_limit_bounds_reuses_in_a_row(compiled, engine):
    assert run(compiled, engine, threshold=1e9, limit=2)[0] == "1110010011"


@pytest.mark.parametrize(("steps", "mask"), [(1, "1"), (2, "11"), (3, "111"), (4, "1111"), (5, "11101")])
def test_short_runs(compiled, engine, steps, mask):
    assert run(compiled, engine, inputs=INPUTS[:steps], outputs=OUTPUTS[:steps], threshold=1e9)[0] == mask


def test_the_whole_model_is_left_out():
    policy = parse("easycache")
    assert policy.granularity == "output"
    assert policy.decision.signal == "input"
