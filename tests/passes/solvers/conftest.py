"""A problem with a closed-form network: a mixture of Gaussians in the plane."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hasten.passes.solvers.sample import sample

GOLDEN = json.loads((Path(__file__).parent / "trajectories.json").read_text())


class Mixture:
    """The mixture, four starting points, and what a perfect network says."""

    golden = GOLDEN
    weights, means, stds = (np.array(GOLDEN["problem"][k]) for k in ("weights", "means", "stds"))
    noise = np.array(GOLDEN["problem"]["unit_noise"])

    def components(self, y, a, b):
        """How likely each component is given y = a x0 + b eps, (P, 3), and the mean of x0 in each, (P, 3, 2)."""
        variance = (a * self.stds) ** 2 + b**2
        offset = y[:, None] - a * self.means
        score = np.log(self.weights / variance) - (offset**2).sum(-1) / (2 * variance)
        share = np.exp(score - score.max(1, keepdims=True))
        return share / share.sum(1, keepdims=True), self.means + (a * self.stds**2 / variance)[:, None] * offset

    def answer(self, prediction, y, a, b):
        """The posterior mean of x0, (P, 2), in the network's terms."""
        share, means = self.components(y, a, b)
        x0 = (share[..., None] * means).sum(1)
        eps = (y - a * x0) / b
        said = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow_prediction": eps - x0}
        return said[prediction]

    def guide(self, y, a, b, component):
        """The gradient of the logarithm of a component's probability given y, (P, 2)."""
        variance = (a * self.stds) ** 2 + b**2
        slopes = -(y[:, None] - a * self.means) / variance[:, None]
        share, _ = self.components(y, a, b)
        return slopes[:, component] - (share[..., None] * slopes).sum(1)

    def solve(self, table, start=None, prediction="epsilon"):
        """Every state of a table, and the result, from ``start``; (M + 1, P, 2)."""
        levels = iter(table.level.tolist())
        states = [self.noise * table.init if start is None else start]
        sample(
            lambda y, t: self.answer(prediction, y, *next(levels)),
            table,
            states[0] / table.init,
            callback=lambda i, t, x: states.append(x),
        )
        return np.array(states)

    def exact(self, ratios, start, eps=None):
        """The solution at every level of a grid in b / a from ``start``, to about 1e-12; (N + 1, P, 2).

        ``eps(y, a, b)`` is the mixture's unless given.
        """
        eps = eps or partial(self.answer, "epsilon")

        def slope(log, scaled):  # of x / a over ln(b / a)
            ratio = np.exp(log)
            a = 1 / np.sqrt(1 + ratio**2)
            return ratio * eps(scaled * a, a, ratio * a)

        scaled, states = start * np.sqrt(1 + ratios[0] ** 2), [start]
        parts = max(1, 1536 // (len(ratios) - 1))
        for here, there in zip(np.log(ratios[:-1]), np.log(ratios[1:]), strict=True):
            h = (there - here) / parts
            for log in here + h * np.arange(parts):  # the classical method of Runge and Kutta
                first = slope(log, scaled)
                second = slope(log + h / 2, scaled + h / 2 * first)
                third = slope(log + h / 2, scaled + h / 2 * second)
                fourth = slope(log + h, scaled + h * third)
                scaled = scaled + h / 6 * (first + 2 * second + 2 * third + fourth)
            states.append(scaled / np.sqrt(1 + np.exp(2 * there)))
        return np.array(states)


@pytest.fixture(scope="session")
def mixture():
    return Mixture()
