"""How fast errors fall as steps double: the order of every method, on even and uneven levels and on a flow."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.deis import deis
from hasten.passes.solvers.dpm_singlestep import dpm_singlestep
from hasten.passes.solvers.dpm_solver import dpm_solver
from hasten.passes.solvers.euler import euler, lms
from hasten.passes.solvers.grid import Grid, variance_preserving
from hasten.passes.solvers.heun import heun
from hasten.passes.solvers.pndm import plms, pndm
from hasten.passes.solvers.sample import step
from hasten.passes.solvers.unipc import unipc

GOLDEN = json.loads((Path(__file__).parent / "trajectories.json").read_text())
TOLERANCE = 0.1
FINEST = 768


def spread(kind: str, first: float, last: float, steps: int) -> np.ndarray:
    """Ratios b / a: even in the logarithm, the same distorted, or even; those of half the steps are among them."""
    u = np.linspace(0, 1, steps + 1)
    if kind == "uneven":
        u = u + 0.04 * np.sin(6 * np.pi * u)
    return first + u * (last - first) if kind == "linear" else first * (last / first) ** u


def grid(kind: str, steps: int) -> Grid:
    """Levels b / a from 8 to 0.05, of diffusion; or of a flow, even in the logarithm."""
    ratios = spread(kind, 8, 0.05, steps)
    if kind == "flow":
        return Grid(np.zeros(steps), 1 / (1 + ratios), ratios / (1 + ratios), path="flow")
    return Grid(np.zeros(steps), *variance_preserving(ratios))


def network_of(kind: str) -> str:
    return "flow_prediction" if kind == "flow" else "epsilon"


@pytest.fixture(scope="module")
def solutions(mixture):
    """(kind, steps) -> the solution x / a at every level, (N + 1, 4, 2)."""
    found = {}
    for kind in ("even", "uneven", "flow"):
        ratios = spread(kind, 8, 0.05, FINEST)
        signal, _ = variance_preserving(ratios)
        along = mixture.exact(ratios, mixture.noise) / signal[:, None, None]
        found |= {(kind, FINEST // every): along[::every] for every in (1, 2, 4, 8)}
    return found


def from_exact_history(mixture, table, known, exact, prediction):
    """Go through a table from row ``known`` on, with the exact solution x / a and the exact values before it."""
    exact = exact[: known + 1] * table.level[: known + 1, 0, None, None]
    # the earlier latents hold what the method integrates, made of what the network sees and says
    earlier = range(known - 1, known - table.width, -1)
    said = {i: mixture.answer(prediction, exact[i], *table.level[i]) for i in earlier}
    state = [exact[known], *(table.cy[i] * exact[i] + table.cf[i] * said[i] for i in earlier)]
    table = table.fold()
    for i in range(known, len(table)):
        state = step(table, i, state, mixture.answer(prediction, state[0], *table.level[i]))
    return state[0] / table.level[-1, 0]


def from_the_start(mixture, table, exact, prediction):
    """The result as x / a of a run that begins at the exact solution's first point, with the method's own start."""
    return mixture.solve(table, exact[0] * table.level[0, 0], prediction)[-1] / table.level[-1, 0]


def observed(errors: list[float]) -> float:
    """The slope over the last doubling."""
    return float(np.log2(errors[-2] / errors[-1]))


EVEN = {"lower_order_final": False}
PREDICTOR = {"disable_corrector": range(FINEST), **EVEN}
FROM_EXACT_HISTORY = {
    "euler": (euler, 0, 1),
    "dpm++ 2m": (partial(dpm_solver, **EVEN), 1, 2),
    "dpm++ 2m heun": (partial(dpm_solver, slope="heun", **EVEN), 1, 2),
    "dpm 2m": (partial(dpm_solver, form="noise", **EVEN), 1, 2),
    "dpm 2m heun": (partial(dpm_solver, form="noise", slope="heun", **EVEN), 1, 2),
    "dpm++ 3m": (partial(dpm_solver, order=3, compat=None, **EVEN), 2, 3),
    "dpm 3m": (partial(dpm_solver, order=3, form="noise", compat=None, **EVEN), 2, 3),
    "dpm++ 3m of diffusers": (partial(dpm_solver, order=3, **EVEN), 2, 2),
    "dpm 3m of diffusers": (partial(dpm_solver, order=3, form="noise", **EVEN), 2, 2),
    "deis 2": (partial(deis, order=2, **EVEN), 1, 2),
    "deis 3": (partial(deis, order=3, **EVEN), 2, 3),
    "lms 2": (partial(lms, order=2), 1, 2),
    "lms 3": (partial(lms, order=3), 2, 3),
    "lms 4": (partial(lms, order=4), 3, 4),
    "unip 2": (partial(unipc, order=2, **PREDICTOR), 1, 2),
    "unip 3": (partial(unipc, order=3, **PREDICTOR), 2, 3),
    "unipc 1": (partial(unipc, order=1, **EVEN), 1, 2),
    "unipc 1 bh1": (partial(unipc, order=1, variant="bh1", **EVEN), 1, 2),
    "unipc 2": (partial(unipc, order=2, **EVEN), 2, 3),
    "unipc 2 bh1": (partial(unipc, order=2, variant="bh1", **EVEN), 2, 3),
    "unipc 2 noise": (partial(unipc, order=2, form="noise", **EVEN), 2, 3),
    "unipc 3": (partial(unipc, order=3, **EVEN), 3, 4),
    "unipc 3 bh1": (partial(unipc, order=3, variant="bh1", **EVEN), 3, 4),
    "unipc 3 noise": (partial(unipc, order=3, form="noise", **EVEN), 3, 4),
}
FROM_THE_START = {
    "heun": (heun, 2),
    "dpm++ 2s": (dpm_singlestep, 2),
    "dpm++ 2s heun": (partial(dpm_singlestep, slope="heun"), 2),
    "dpm 2s": (partial(dpm_singlestep, form="noise"), 2),
    "dpm++ 3s": (partial(dpm_singlestep, order=3), 3),
    "dpm++ 3s heun": (partial(dpm_singlestep, order=3, slope="heun"), 3),
    "dpm 3s heun": (partial(dpm_singlestep, order=3, form="noise", slope="heun"), 3),
    # these keep their order through the start that they make themselves
    "own start: dpm++ 2m": (partial(dpm_solver, **EVEN), 2),
    "own start: unipc 2": (partial(unipc, order=2, **EVEN), 3),
    "own start: unipc 3": (partial(unipc, order=3, **EVEN), 4),
}
"""These need no history."""
FINER = ("dpm++ 3m of diffusers", "dpm++ 3s", "unipc 3 noise")
"""They still approach their order at 384 steps, and are observed at twice as many as the others."""
OF_FLOWS = ("euler", "heun", "dpm++ 2m", "dpm++ 3m", "dpm++ 2s", "unipc 2", "unipc 3", "deis 2", "lms 2", "lms 4")


def counts_of(name: str) -> tuple[int, int]:
    return (384, 768) if name in FINER else (192, 384)


def error(mixture, solutions, name, kind, steps, *, exact_history):
    """The largest error of x / a at the end."""
    along, prediction = solutions[kind, steps], network_of(kind)
    if exact_history:
        make, known, _ = FROM_EXACT_HISTORY[name]
        table = make(grid(kind, steps), prediction=prediction)
        end = from_exact_history(mixture, table, known, along, prediction)
    else:
        make = (FROM_THE_START | FROM_EXACT_HISTORY)[name][0]
        end = from_the_start(mixture, make(grid(kind, steps), prediction=prediction), along, prediction)
    return float(np.abs(end - along[-1]).max())


METHODS = [*FROM_EXACT_HISTORY, *FROM_THE_START]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in METHODS for kind in ("even", "uneven")), *((name, "flow") for name in OF_FLOWS)],
)
def test_methods_have_their_order(mixture, solutions, name, kind):
    known = name in FROM_EXACT_HISTORY
    errors = [error(mixture, solutions, name, kind, n, exact_history=known) for n in counts_of(name)]
    order = (FROM_EXACT_HISTORY | FROM_THE_START)[name][-1]
    assert observed(errors) == pytest.approx(order, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "order"), [("dpm++ 3m", 2), ("unipc 3 bh1", 3)])
def test_a_start_of_lower_order_limits_a_method(mixture, solutions, name, order):
    """With an exact history the same are of one order more, above."""
    errors = [error(mixture, solutions, name, "even", n, exact_history=False) for n in (384, 768)]
    assert observed(errors) == pytest.approx(order, abs=TOLERANCE)


STARTS = [(start, name) for start in ("own start", "exact history") for name in GOLDEN["errors"][start]]


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize(("start", "name"), STARTS)
def test_errors_are_those_of_the_reference(mixture, solutions, start, name, kind):
    """Of another program of the same methods, which measures x and not x / a."""
    steps, wanted = GOLDEN["errors"]["steps"], GOLDEN["errors"][start][name][kind]
    got = error(mixture, solutions, name, kind, steps, exact_history=start == "exact history")
    assert got * grid(kind, steps).signal[-1] == pytest.approx(wanted, rel=1e-5)


TIMES = 384


@pytest.fixture(scope="module")
def between(mixture):
    """kind -> the solution on levels b / a from 2 to 0.5, at every second of the training's times."""
    return {k: mixture.exact(spread(k, 2, 0.5, TIMES), mixture.noise) for k in ("even", "uneven", "linear")}


@pytest.mark.parametrize("kind", ["even", "uneven", "linear"])
@pytest.mark.parametrize(("solver", "order"), [(plms, 4), (pndm, 4), (ddim, 1)])
def test_methods_on_the_trainings_times_have_their_order(mixture, between, solver, order, kind):
    """Adams-Bashforth counts steps and not levels: of order 4 where levels are even, of order 2 elsewhere."""
    errors = []
    for n in (TIMES // 2, TIMES):
        # two training times a step, so that Runge-Kutta has one in the middle
        ratios = spread(kind, 2, 0.5, 2 * n)[::-1]
        bars = {"schedule" if solver is ddim else "bars": 1 / (1 + ratios**2)}
        table = solver(n, **bars, times=range(2 * n, 0, -2), set_alpha_to_one=False, compat=None)
        errors.append(np.abs(mixture.solve(table, mixture.noise)[-1] - between[kind][-1]).max())
    assert observed(errors) == pytest.approx(order if kind == "linear" else min(order, 2), abs=TOLERANCE)
