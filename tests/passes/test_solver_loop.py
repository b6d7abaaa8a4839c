"""The loop around networks of other shapes than the usual one, written in FX (run in eager) and in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hasten.backends.manifest import TensorSpec
from hasten.backends.sampling import Looping, Sampling
from hasten.passes.fx.solver_loop import SolverLoop
from hasten.passes.fx.to_onnx import onnx_from_graph
from hasten.passes.solvers import catalog, loop
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample

PROCESS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 4
SHAPE = (2, 3, 4, 4)


class Embedded(nn.Module):
    """Distilled: the guidance scale is an input. Positions are the same for all pictures."""

    def forward(self, sample: Tensor, timestep: Tensor, guidance: Tensor, positions: Tensor) -> tuple[Tensor]:
        told = (timestep / 1000 + guidance / 10)[:, None, None, None]
        return (torch.sin(sample + told) + positions,)


class LearnedVariance(nn.Module):
    """Six channels for three, and one time for all pictures, a whole number."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (torch.cat([torch.cos(sample) * (1 + timestep.float() / 1000), sample * 100], dim=1),)


class Half(nn.Module):
    """A network in half precision whose prediction is nothing at all."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (sample * 0 * timestep.to(torch.float16)[:, None, None, None],)


def specs(given: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in given.items()]


def both(net: nn.Module, examples: dict[str, Tensor], fed: dict[str, Tensor], **options: Any) -> list[np.ndarray]:
    """Latents of four DDIM steps, of the loop in FX and in ONNX."""
    made = specs({"out": net(*examples.values())[0]})
    looping = Looping.of(Sampling("ddim", STEPS, process=PROCESS, **options), specs(examples), made)
    module = SolverLoop(net, looping.plan, list(examples), ["out"])
    table = catalog.build("ddim", Process.of(PROCESS), STEPS)
    columns = loop.padded(table, looping.plan.rows, looping.plan.history)._asdict()
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    state = torch.stack([unit, *(torch.zeros_like(unit) for _ in range(looping.plan.history - 1))])
    given = {"state": state, "first": torch.tensor(0), "stop": torch.tensor(STEPS), **fed}
    given |= {loop.PREFIX + name: torch.from_numpy(column) for name, column in columns.items()}
    given = {s.name: given[s.name] for s in module.inputs}
    with torch.no_grad():
        in_fx = module(*given.values())[0].numpy()
    program = torch.export.export(net, tuple(examples.values()))
    model = onnx_from_graph(program.module(check_guards=False), tuple(examples.values()), 22)
    for value, name in zip(model.graph.input, examples, strict=True):
        for node in model.graph.node:
            node.input[:] = [name if i == value.name else i for i in node.input]
        value.name = name
    wrapped = looping.around(model)
    session = onnxruntime.InferenceSession(wrapped.SerializeToString(), providers=["CPUExecutionProvider"])
    in_onnx = session.run(["latents"], {name: t.numpy() for name, t in given.items()})[0]
    return [in_fx, in_onnx]


def expected(denoise: Any) -> np.ndarray:
    unit = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    made: np.ndarray = sample(denoise, catalog.build("ddim", Process.of(PROCESS), STEPS), unit).numpy()
    return made


def test_an_embedded_scale_is_an_input_of_the_loop() -> None:
    positions = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    examples = {
        "sample": torch.zeros(SHAPE),
        "timestep": torch.zeros(2),
        "guidance": torch.zeros(2),
        "positions": positions,
    }
    fed = {"guidance_scale": torch.tensor(3.5), "positions": positions}
    wanted = expected(lambda x, t: torch.sin(x + t / 1000 + 0.35) + positions)
    for made in both(Embedded(), examples, fed, guidance=3.5):
        np.testing.assert_allclose(made, wanted, rtol=2e-5, atol=2e-5)


def test_a_learned_variance_is_left_out_and_one_time_is_enough() -> None:
    examples = {"sample": torch.zeros(SHAPE), "timestep": torch.tensor(1)}
    wanted = expected(lambda x, t: torch.cos(x) * (1 + t / 1000))
    for made in both(LearnedVariance(), examples, {}):
        np.testing.assert_allclose(made, wanted, rtol=2e-5, atol=2e-5)


def test_the_state_is_float32_around_a_network_of_half_precision() -> None:
    examples = {"sample": torch.zeros(SHAPE, dtype=torch.float16), "timestep": torch.zeros(2)}
    wanted = expected(lambda x, t: x * 0)
    for made in both(Half(), examples, {}):
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, wanted, rtol=1e-6)  # half precision would be off by 5e-4


@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_leave_the_state_alone(rows: int) -> None:
    net, examples = LearnedVariance(), {"sample": torch.zeros(SHAPE), "timestep": torch.tensor(1)}
    looping = Looping.of(
        Sampling("ddim", STEPS, process=PROCESS), specs(examples), specs({"out": net(*examples.values())[0]})
    )
    module = SolverLoop(net, looping.plan, list(examples), ["out"])
    given = [torch.zeros([int(n) for n in s.shape], dtype=getattr(torch, s.dtype)) for s in module.inputs]
    given[0] += 1.0
    given[2] += rows
    state = module(*given)[2]
    assert bool((state == (1.0 if rows == 0 else 0.0)).all())  # rows of zeros make nothing of everything
