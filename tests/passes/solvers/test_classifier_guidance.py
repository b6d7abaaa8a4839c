"""Guidance by a classifier without splitting: the table against a loop that is written out, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers.caf import caf
from hasten.passes.solvers.catalog import build
from hasten.passes.solvers.classifier_guidance import classifier_guided
from hasten.passes.solvers.prediction import convert
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.start import levels

SOLVERS = ("ddim:spacing=trailing,compat=none", "ddim:eta=0.5", "plms", "pndm", "dpm++2m", "unipc", "heun", "lms")


def denoise(y: Any, t: float) -> Any:
    return np.tanh(y) + t * 1e-4


def guide(y: Any, t: float) -> Any:
    return np.cos(y + t * 1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_solver_over_a_network_whose_eps_is_shifted(solver: str, prediction: str) -> None:
    process, weight = Process.diffusion("scaled_linear", prediction=prediction), 1.7
    table = build(solver, process, 6)
    rows = {time: row for row, time in enumerate(table.time.tolist())}

    def shifted(y: Any, t: float) -> Any:
        """What the network would have to say for its eps to be eps - w b g."""
        own = table.level[rows[t]]
        a, b = own if own.any() else levels(process, np.array([t]))[0]
        cy, cf = convert(prediction, "eps", a, b)
        eps = cy * y + cf * denoise(y, t) - weight * b * guide(y, t)
        return (eps - cy * y) / cf

    x, noise = np.linspace(-1, 1, 5), [np.full(5, 0.1)] * len(table.noisy)
    guided = classifier_guided(table, process, weight)
    assert len(guided) == 2 * len(table)
    assert guided.network.tolist() == [1, 0] * len(table)
    got = sample([denoise, guide], guided, x, noise=noise)
    np.testing.assert_allclose(got, sample(shifted, table, x, noise=noise), rtol=1e-9, atol=1e-9)
    assert not np.allclose(got, sample(denoise, table, x, noise=noise), rtol=1e-3)


def test_weight_zero_is_the_plain_solver() -> None:
    process, x = Process.diffusion(prediction="v_prediction"), np.linspace(-1, 1, 5)
    table = build("unipc", process, 5)
    got = sample([denoise, guide], classifier_guided(table, process, 0.0), x)
    np.testing.assert_allclose(got, sample(denoise, table, x), rtol=1e-12)


@pytest.mark.parametrize(
    ("process", "table", "message"),
    [
        (Process.flow(), build("flow-euler", Process.flow(), 3), "shifts eps, and this model is a flow"),
        (Process.diffusion(), caf(3), "for solvers of one network; LTSP and STSP have a weight of their own"),
    ],
)
def test_what_cannot_be_guided_says_so(process: Process, table: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        classifier_guided(table, process, 1.0)
