"""Every state of diffusers' schedulers on a problem with a closed-form network, without diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest

from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.sample import sample

GOLDEN = json.loads((Path(__file__).parent / "trajectories.json").read_text())
SD = {"beta_start": 0.00085, "beta_end": 0.012}
TABLES = {
    "ddim": ddim(5, offset=1, set_alpha_to_one=False, **SD),
    "ddim_trailing": ddim(5, spacing="trailing", **SD),
    "ddim_linspace": ddim(5, spacing="linspace", **SD),
    "ddim_sample": ddim(5, spacing="trailing", prediction="sample", **SD),
    "ddim_eta1": ddim(5, spacing="trailing", eta=1.0, **SD),
    "flow_euler": flow_euler(5, sigmas=[1, 0.8, 0.6, 0.4, 0.2]),
    "flow_euler_shift3": flow_euler(5, shift=3.0),
    "flow_euler_stochastic": flow_euler(5, shift=3.0, stochastic=True),
}


def answer(prediction, y, a, b):
    """The posterior mean of x0 under the mixture given y = a x0 + b eps, (P, 2), in the network's terms."""
    weights, means, stds = (np.array(GOLDEN["problem"][k]) for k in ("weights", "means", "stds"))
    variance = (a * stds) ** 2 + b**2
    offset = y[:, None] - a * means
    score = np.log(weights / variance) - (offset**2).sum(-1) / (2 * variance)
    share = np.exp(score - score.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    x0 = (share[..., None] * (means + (a * stds**2 / variance)[:, None] * offset)).sum(1)
    eps = (y - a * x0) / b
    return {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0}[prediction]


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_every_state_is_that_of_diffusers(name):
    case, table = GOLDEN["cases"][name], TABLES[name]
    levels, states = iter(case["signal_noise"]), [np.array(GOLDEN["problem"]["unit_noise"])]
    noise = np.array(GOLDEN["noise"])[: len(table.noisy)]
    sample(
        lambda y, t: answer(case["prediction"], y, *next(levels)),
        table,
        states[0],
        noise=noise,
        callback=lambda i, t, x: states.append(x),
    )
    assert np.allclose(table.time, case["times"], rtol=1e-12)
    assert np.allclose(states, case["trajectory"], rtol=0, atol=2e-14)
