"""The sampling loop: namespaces, types, noise, callback."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hasten.errors import UsageError
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.table import SolverTable


def network(y, t):
    return y * y * 0.1 + t * 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_loop_equals_the_response_matrix(eta):
    table = ddim(6, prediction="v_prediction", eta=eta)
    rng = np.random.default_rng(0)
    x, outputs, noise = rng.normal(size=8), rng.normal(size=(6, 8)), rng.normal(size=(len(table.noisy), 8))
    replies, inputs = iter(outputs), []

    def denoise(y, t):
        inputs.append(y)
        return next(replies)

    got = sample(denoise, table, x, noise=noise)
    wanted = table.response() @ np.concatenate([x[None], outputs, noise])
    assert np.allclose([*inputs, got], wanted, rtol=1e-13, atol=1e-13)


def test_numpy_and_torch_agree():
    table, x = flow_euler(9, shift=2.0), np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    from_numpy, from_torch = sample(network, table, x), sample(network, table, torch.from_numpy(x))
    assert isinstance(from_numpy, np.ndarray)
    assert from_numpy.dtype == np.float32
    assert isinstance(from_torch, torch.Tensor)
    assert from_torch.dtype == torch.float32
    np.testing.assert_allclose(from_torch.numpy(), from_numpy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_keeps_its_type_and_the_state_stays_in_float32(dtype):
    seen = []

    def denoise(y, t):
        seen.append(y.dtype)
        return (y * 0).to(dtype)

    table, x = ddim(20), torch.full((1, 4), 0.1).to(dtype)
    got = sample(denoise, table, x)
    assert set(seen) == {dtype}
    assert got.dtype == torch.float32
    exact = table.response()[-1, 0] * x.double()  # a network that says 0: only the scaling of x is left
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_callback_sees_every_evaluation_and_can_stop():
    seen = []
    table = flow_euler(4)
    got = sample(network, table, np.ones(2), callback=lambda i, t, x: seen.append((i, t, x)))
    assert [(i, t) for i, t, _ in seen] == list(enumerate(table.time.tolist()))
    assert np.array_equal(seen[-1][2], got)

    def stop(i, t, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(network, table, np.ones(2), callback=stop)


def test_a_second_latent_carries_the_history():
    rows = 3
    table = SolverTable(
        time=np.arange(rows),
        input=np.tile([1.0, 0.0], (rows, 1)),
        A=np.tile([[1.0, -0.5], [0.0, 0.0]], (rows, 1, 1)),
        B=np.tile([1.5, 1.0], (rows, 1)),
        C=np.zeros((rows, 2)),
        cy=np.zeros(rows),
        cf=np.ones(rows),
        output=np.array([1.0, 0.0]),
        init=2.0,
    )
    got = sample(lambda y, t: np.full_like(y, t + 1), table, np.ones(1))
    assert got.tolist() == [2 + 1 + 2 + 1.5 * 3]


def test_message_counts_the_noise():
    with pytest.raises(UsageError) as caught:
        sample(network, ddim(5, eta=1.0), np.ones(2))
    assert str(caught.value) == "sample: the solver adds noise in 4 of 5 rows; 0 noise arrays were given"


def test_solvers_import_no_torch():
    code = (
        "import sys, hasten.passes.solvers.ddim, hasten.passes.solvers.flow_euler, hasten.passes.solvers.sample;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
