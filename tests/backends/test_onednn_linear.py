"""Frozen linear layers go to oneDNN in what we compile, and stay Inductor's own elsewhere."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

MODEL = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def compiled(backend, x=X, **more):
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True, freezing=True):
        function = torch.compile(MODEL, backend=backend, **more)
        made, code = run_and_get_code(function, x)
        again = function(x)
    assert torch.equal(made, again)
    return made, "\n".join(code)


@pytest.mark.parametrize("batch", [2, 32])
def test_linear_layers_are_onednns(batch):
    made, code = compiled("hasten", X[:batch])
    assert "_linear_pointwise" in code
    assert "_mkl_linear" not in code
    with torch.no_grad():
        assert torch.allclose(made, MODEL(X[:batch]), atol=1e-5)


@pytest.mark.skipif(not torch._C.has_mkl, reason="this torch has no MKL")
def test_inductors_own_choice_stays_outside():
    compiled("hasten")
    _, code = compiled("inductor")
    assert "_mkl_linear" in code


def test_sizes_that_change():
    made, code = compiled("hasten", dynamic=True)
    assert "_mkl_linear" not in code
    with torch.no_grad():
        assert torch.allclose(made, MODEL(X), atol=1e-5)
