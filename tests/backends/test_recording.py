"""The instrumented graph: what it tells of a run is what the run's tensors say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hasten.backends.program import FlatProgram, flatten
from hasten.backends.recording import Recorder, watch
from hasten.backends.region import find_cut
from hasten.errors import HastenError
from hasten.passes.steps.catalog import parse

STEPS, DISTANCE = 7, 3
Call = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.feed = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.feed(self.norm(x))


class Net(nn.Module):
    """Four blocks of one stream; tells what the tests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.time = nn.Linear(4, 16), nn.Linear(1, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.out = nn.Linear(16, 4)

    def begin(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.into(x) + self.time(timestep[:, None])[:, None]

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.begin(x, timestep)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    def values(self, x: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        before = self.begin(x, timestep)
        after = before
        probe = self.blocks[0](before) - before
        for block in self.blocks:
            after = block(after)
        return {
            "input": x,
            "output": self.out(after),
            "value": after,
            "signal": self.blocks[0].norm(before),
            "stack": after - before,
            "tail": after - self.blocks[0](before),
            "probe": probe,
        }


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def flat(net: Net) -> FlatProgram:
    program = torch.export.export(net, (torch.randn(2, 5, 4), torch.rand(2)))
    return flatten(program.module(check_guards=False), program)


@pytest.fixture(scope="module")
def inputs() -> list[Call]:
    torch.manual_seed(1)
    noise = torch.randn(STEPS, 2, 5, 4).cumsum(0)
    return [(x, torch.full((2,), 1 - n / STEPS)) for n, x in enumerate(noise)]


def record(flat: FlatProgram, text: str, inputs: list[Call], distance: int = DISTANCE) -> Recorder:
    policy = parse(text)
    recorder = Recorder(flat.module, watch(flat.module, find_cut(flat.module, policy), policy), distance)
    for x in inputs:
        recorder(*x)
    return recorder


def size(value: torch.Tensor) -> float:
    return float(value.abs().mean())


@pytest.mark.parametrize(
    ("text", "residual", "signal"),
    [
        ("teacache:coefficients=1/0,threshold=1", "stack", "signal"),
        ("first-block", "tail", "probe"),
        ("magcache:model=flux", "stack", None),
    ],
)
def test_sizes_and_differences_of_everything_watched(net, flat, inputs, text, residual, signal):
    sample = record(flat, text, inputs).sample(3, "a square")
    truth = [net.values(*x) for x in inputs]
    names = {"input": "input", "output": "output", "value": "value", "residual": residual}
    names |= {"signal": signal} if signal is not None else {}
    assert set(sample.values) == set(names)
    for name, source in names.items():
        moves = sample.values[name]
        assert moves.moves.shape == (DISTANCE, STEPS)
        np.testing.assert_allclose(moves.size, [size(t[source]) for t in truth], rtol=1e-5)
        for apart in range(1, DISTANCE + 1):
            wanted = [size(truth[n][source] - truth[n - apart][source]) if n >= apart else np.nan for n in range(STEPS)]
            np.testing.assert_allclose(moves.moves[apart - 1], wanted, rtol=1e-4, err_msg=f"{name}, {apart}")


def test_ratios_are_means_over_tokens_of_norms(net, flat, inputs):
    sample = record(flat, "magcache:model=flux", inputs).sample(0, "")
    residuals = [net.values(*x)["stack"] for x in inputs]
    assert sample.ratios[0] == 1
    for n in range(1, STEPS):
        wanted = (residuals[n].norm(dim=-1) / residuals[n - 1].norm(dim=-1)).mean()
        assert sample.ratios[n] == pytest.approx(float(wanted), rel=1e-4)


def test_the_model_computes_what_it_did(net, flat, inputs):
    policy = parse("first-block")
    recorder = Recorder(flat.module, watch(flat.module, find_cut(flat.module, policy), policy), DISTANCE)
    for x in inputs:
        torch.testing.assert_close(recorder(*x), net(*x), rtol=1e-6, atol=1e-6)


def test_another_run_knows_nothing_of_the_one_before(flat, inputs):
    recorder = record(flat, "first-block", inputs[::-1])
    recorder.restart()
    for x in inputs:
        recorder(*x)
    again, once = recorder.sample(0, ""), record(flat, "first-block", inputs).sample(0, "")
    for name, moves in once.values.items():
        np.testing.assert_array_equal(again.values[name].moves, moves.moves)
        np.testing.assert_array_equal(again.values[name].size, moves.size)
    np.testing.assert_array_equal(again.ratios, once.ratios)


def test_a_run_shorter_than_the_distance(flat, inputs):
    sample = record(flat, "first-block", inputs[:2], distance=5).sample(0, "")
    assert np.isfinite(sample.values["signal"].moves).sum() == 1


def test_a_run_with_nan_is_refused(flat, inputs):
    broken = [(x.clone(), t) for x, t in inputs]
    broken[4][0][0, 0, 0] = float("nan")
    recorder = record(flat, "first-block", broken)
    with pytest.raises(HastenError, match="recording of seed 8, a disc: input is nan at step 4"):
        recorder.sample(8, "a disc")


def test_it_keeps_so_many_copies_and_no_more(flat, inputs):
    recorder = record(flat, "first-block", inputs * 3)
    assert {len(past) for past in recorder._past.values()} == {DISTANCE}


def test_errors_of_modules_are_means_over_the_modules_of_a_kind(net, flat, inputs):
    sample = record(flat, "smoothcache:schedule=1001", inputs).sample(0, "")
    assert set(sample.errors) == {"feed"}
    outputs = []
    for x, timestep in inputs:
        stream, made = net.begin(x, timestep), []
        for block in net.blocks:
            made.append(block.feed(block.norm(stream)))
            stream = stream + made[-1]
        outputs.append(made)
    for apart in range(1, DISTANCE + 1):
        wanted = np.full(STEPS, np.nan)
        for n in range(STEPS - apart):
            pairs = zip(outputs[n], outputs[n + apart], strict=True)
            wanted[n] = np.mean([size(now - later) / size(later) for now, later in pairs])
        np.testing.assert_allclose(sample.errors["feed"][apart - 1], wanted, rtol=1e-4)
