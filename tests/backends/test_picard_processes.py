"""Picard sampling over processes: two agree with one, and a lost one is reported."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hasten.backends.picard_processes import picard_processes
from hasten.errors import UsageError
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.picard import picard

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

WORKER = """
import os, sys, time
import torch
import torch.distributed as dist
from hasten.backends.picard_processes import picard_processes
from hasten.errors import HastenError
from hasten.passes.solvers.ddim import ddim

rank, mode, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
calls = []

def denoise(y, t):
    calls.append(len(y))
    if mode != "well" and rank == 1 and len(calls) == 3:
        if mode == "lost":
            os._exit(9)
        time.sleep(30)
    return torch.sin(y) * (0.5 + 4e-4 * t[:, None])

table = ddim(12, eta=1.0)
torch.manual_seed(rank)  # the processes draw apart; what the first draws counts
x, noise = torch.randn(3, 2), list(torch.randn(len(table.noisy), 3, 2))
start = time.monotonic()
try:
    seconds = 60 if mode == "well" else 2
    got = picard_processes(denoise, table, x, window=5, tolerance=0.05, noise=noise, timeout=seconds)
except HastenError as error:
    print(f"{time.monotonic() - start:.1f} {error}", flush=True)
    os._exit(1)
torch.save((tuple(got), calls), f"{folder}/{rank}")
dist.destroy_process_group()
"""


def start(folder, mode):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), mode, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]


def test_two_processes_agree_with_one(tmp_path):
    for worker in start(tmp_path, "well"):
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
    (first, first_calls), (second, second_calls) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    table = ddim(12, eta=1.0)
    torch.manual_seed(0)
    x, noise = torch.randn(3, 2), list(torch.randn(len(table.noisy), 3, 2))
    alone = picard(
        lambda y, t: torch.sin(y) * (0.5 + 4e-4 * t[:, None]), table, x, window=5, tolerance=0.05, noise=noise
    )
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], alone.result, rtol=1e-6, atol=1e-6)
    assert first[1:] == second[1:] == alone[1:]
    assert first_calls[0] == 8  # of 15: five rows of three samples
    assert second_calls[0] == 7
    assert sum(first_calls) + sum(second_calls) == 3 * alone.evaluations


@pytest.mark.parametrize(
    ("mode", "message"),
    [("lost", "process 0 lost the connection to another"), ("late", "process 0 had no answer from another within 2 s")],
)
def test_a_process_that_stops_is_reported(tmp_path, mode, message):
    first, second = start(tmp_path, mode)
    try:
        out, err = first.communicate(timeout=60)
        assert first.returncode == 1, err
        seconds, _, said = out.partition(" ")
        assert message in said
        assert said.count("\n") == 1
        assert float(seconds) < 20
    finally:
        second.kill()
        second.communicate()


def test_refusals():
    call = {"window": 2, "tolerance": 0.1}
    with pytest.raises(UsageError, match="needs a process group and there is none"):
        picard_processes(torch.sin, ddim(4), torch.ones(1, 2), **call)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": np.ones((1, 2))}, "x is a ndarray; it must be a torch.Tensor"),
        ({"timeout": 0.0}, "the timeout is 0 s; it is positive"),
        ({"denoise": lambda y, t: y[:1]}, r"was given \(2, 2\) and answered \(1, 2\)"),
        ({"window": 0}, "the window is 0"),
    ],
)
def test_refusals_in_a_group(tmp_path, given, message):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    call = {"denoise": lambda y, t: y, "x": torch.ones(1, 2), "window": 2, "tolerance": 0.1, **given}
    try:
        with pytest.raises(UsageError, match=message):
            picard_processes(call.pop("denoise"), ddim(4), call.pop("x"), **call)
    finally:
        torch.distributed.destroy_process_group()
