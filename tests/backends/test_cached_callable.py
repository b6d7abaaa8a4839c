"""Which step and which guidance branch a call belongs to, told by the timestep alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten import step_cache
from hasten.backends.cached_callable import CachedCallable, Kind, Run
from hasten.errors import UsageError
from hasten.passes.steps.catalog import parse


def walk(times: list[float], *, ascending: bool = False) -> list[tuple[int, int]]:
    """(branch, step) of each call."""
    run, found = Run(), []
    for time in times:
        branch = run.advance(time, ascending=ascending)
        found.append((run.branches.index(branch), len(branch.mask)))
        branch.mask.append(True)
    return found


def test_steps_go_down() -> None:
    assert walk([999, 500, 1]) == [(0, 0), (0, 1), (0, 2)]


def test_a_higher_time_is_a_new_run() -> None:
    assert walk([999, 500, 999, 500]) == [(0, 0), (0, 1), (0, 0), (0, 1)]


def test_the_same_time_again_is_another_branch() -> None:
    assert walk([999, 999, 500, 500]) == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_run_of_other_length_after_an_interruption() -> None:
    assert walk([999, 750, 999, 900, 800]) == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 2)]


def test_an_interruption_between_the_branches_of_a_step() -> None:
    # The step at 500 had one call of two; 250 cannot be relied on to follow it.
    assert walk([999, 999, 500, 250, 250])[3:] == [(0, 0), (1, 0)]


def test_times_that_go_up() -> None:
    assert walk([0.0, 0.5, 0.9, 0.0], ascending=True) == [(0, 0), (0, 1), (0, 2), (0, 0)]


class Recorder:
    """Stands for a compiled ``step`` program: counts calls, computes where it is told to."""

    def __init__(self) -> None:
        self.forces: list[int] = []
        self.residuals: list[float] = []

    def __call__(self, x: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        _, _, residual, force = rest
        self.forces.append(int(force))
        self.residuals.append(float(residual.sum()))
        return [x + 1, residual + 1, torch.tensor(int(force) != 0)]


def callable_of(program: Recorder) -> CachedCallable:
    sizes = (lambda inputs: inputs[0].shape[0],)
    return CachedCallable(
        parse("easycache:threshold=0.1"),
        {"step": (program, ("cache_residual", "cache_force"), ("cache_residual", "cache_computed"))},
        {"cache_residual": Kind(sizes, torch.float32, torch.device("cpu"), 0.0)},
        time_at=1,
        owner_at=2,
    )


def test_two_models_do_not_share_state() -> None:
    program = Recorder()
    call = callable_of(program)
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    for time in (3.0, 2.0, 1.0):
        call(torch.zeros(1), torch.tensor(time), a)
    call(torch.zeros(1), torch.tensor(2.0), b)
    assert program.residuals == [0, 1, 2, 0]


def test_threads_do_not_share_state() -> None:
    program = Recorder()
    call, owner = callable_of(program), nn.Parameter(torch.ones(1))
    call(torch.zeros(1), torch.tensor(3.0), owner)
    thread = threading.Thread(target=call, args=(torch.zeros(1), torch.tensor(2.0), owner))
    thread.start()
    thread.join()
    call(torch.zeros(1), torch.tensor(2.0), owner)
    assert program.residuals == [0, 0, 1]


def test_other_sizes_begin_anew() -> None:
    program = Recorder()
    call, owner = callable_of(program), nn.Parameter(torch.ones(1))
    for size, time in ((1, 3.0), (1, 2.0), (4, 1.0)):
        call(torch.zeros(size), torch.tensor(time), owner)
    assert program.residuals == [0, 1, 0]


def test_settings_are_those_of_the_model() -> None:
    program, model = Recorder(), nn.Linear(2, 2)
    call, settings = callable_of(program), step_cache(model)
    settings.mask = "101"
    for time in (3.0, 2.0, 1.0):
        call(torch.zeros(1), torch.tensor(time), model.weight)
    assert program.forces == [1, 0, 1]
    assert settings.masks == ["101"]
    assert step_cache(model) is settings


def test_reset_begins_a_run() -> None:
    program, model = Recorder(), nn.Linear(2, 2)
    call = callable_of(program)
    call(torch.zeros(1), torch.tensor(3.0), model.weight)
    step_cache(model).reset()
    call(torch.zeros(1), torch.tensor(2.0), model.weight)
    assert program.residuals == [0, 0]


def test_reset_by_the_model() -> None:
    program, model = Recorder(), nn.Linear(2, 2)
    call = callable_of(program)
    call(torch.zeros(1), torch.tensor(3.0), model.weight)
    hasten.reset(model)
    call(torch.zeros(1), torch.tensor(2.0), model.weight)
    call(torch.zeros(1), torch.tensor(1.0), model.weight)
    assert program.residuals == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "stepz",
            4,
            "a step cache has no setting 'stepz'; settings: threshold, limit, steps, mask. Did you mean 'steps'",
        ),
        ("masks", ["1"], "a step cache has no setting 'masks'"),
        ("threshold", float("nan"), "threshold: nan is not a number"),
        ("threshold", float("inf"), "threshold: inf was given; it goes from 0"),
        ("threshold", -1, "threshold: -1 was given; it goes from 0"),
        ("threshold", "x", "threshold: 'x' is not a number"),
        ("limit", -9, "limit: -9 was given; it goes from -1"),
        ("limit", "a", "limit: 'a' is not a whole number"),
        ("steps", 0, "steps: 0 was given; it goes from 1"),
        ("steps", -3, "steps: -3 was given; it goes from 1"),
        ("steps", 2.5, "steps: 2.5 is not a whole number"),
        ("mask", "10x", "mask: '10x' given; give 1"),
        ("mask", [1, 2], r"mask: \[1, 2\] given; give 1"),
    ],
)
def test_a_setting_that_means_nothing(name: str, value: Any, message: str) -> None:
    settings = step_cache(nn.Linear(2, 2))
    settings.threshold, settings.limit, settings.steps, settings.mask = 0.1, 2, 3, "101"
    with pytest.raises(UsageError, match=message):
        setattr(settings, name, value)
    assert (settings.threshold, settings.limit, settings.steps, settings.mask) == (0.1, 2, 3, [1, 0, 1])
    settings.threshold = settings.limit = settings.steps = settings.mask = None
    assert settings.steps is None


def test_a_model_without_parameters() -> None:
    with pytest.raises(UsageError, match="ReLU has no parameters"):
        step_cache(nn.ReLU())
