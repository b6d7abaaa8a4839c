"""A small conditional denoiser, and the sampler around it in eager: what engines with a loop are compared with."""

from __future__ import annotations

import onnx
import torch
from torch import nn

from hasten.backends.engine import Engine
from hasten.passes.solvers import catalog
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.table import SolverTable

PROCESS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
SHAPE = (2, 4, 8, 8)
NULL = 9
LABELS = torch.tensor([3, 5])
NEGATIVE = torch.full((2,), NULL)


class Net(nn.Module):
    """(B, 4, S, S), times and classes (B,) -> (B, 4, S, S)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.classes, self.time = nn.Embedding(10, 16), nn.Linear(2, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        phase = torch.stack([timestep / 1000, torch.sin(timestep / 100)], dim=1)
        told = self.classes(class_labels) + self.time(phase)
        return self.out(torch.tanh(self.into(sample) + told[:, :, None, None]))


def examples(batch: int) -> dict[str, torch.Tensor]:
    """Inputs of one call of the network."""
    drawn = torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    return {"sample": drawn, "timestep": torch.linspace(100, 900, batch), "class_labels": torch.arange(batch)}


def table(solver: str, steps: int) -> SolverTable:
    """A solver's table for the process above."""
    return catalog.build(solver, Process.of(PROCESS), steps)


def loop_of(engine: Engine) -> tuple[onnx.GraphProto, onnx.NodeProto, onnx.GraphProto]:
    """An ONNX Runtime engine's graph, the loop in it, and that one's body."""
    graph = onnx.load(engine.path / engine.manifest.artifact).graph
    (node,) = (n for n in graph.node if n.op_type == "Loop")
    (body,) = (a.g for a in node.attribute if a.name == "body")
    return graph, node, body


def unit_noise(draws: int) -> list[torch.Tensor]:
    """Unit noise for a start, then for each row that takes some."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator) for _ in range(draws)]


def eager(
    found: SolverTable,
    *,
    scale: float,
    rescale: float = 0.0,
    start: torch.Tensor | None = None,
    noise: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The same sampler as a Python loop, in torch, from `unit_noise` unless told otherwise."""
    net = Net().eval()

    def denoise(x: torch.Tensor, time: float) -> torch.Tensor:
        t = torch.full((len(x),), time)
        told, untold = net(x, t, LABELS), net(x, t, NEGATIVE)
        guided = untold + scale * (told - untold)
        if rescale:
            ratio = told.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided * (rescale * ratio + 1 - rescale)
        return guided

    first, *later = unit_noise(1 + len(found.noisy))
    with torch.no_grad():
        made: torch.Tensor = sample(
            denoise, found, first if start is None else start, noise=later if noise is None else noise
        )
    return made
