"""The gradient of a classifier as a forward graph: its numbers against autograd in float64, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.errors import HastenError, UsageError
from hasten.passes.fx.gradient import LogProbabilityGradient, forward_graph

X = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIME = torch.tensor([1.0, 500.0, 900.0], dtype=torch.float64)
LABELS = torch.tensor([4, 0, 2])


class Timed(nn.Module):
    """Whatever layers, and a head over five classes that is told the time."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers, self.head = nn.Sequential(*layers), nn.LazyLinear(5)
        self.double().eval()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layers(x).flatten(1) * (1 + time[:, None] / 1000))
        return found


LAYERS = {
    "strides that leave a rest": [nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 6, 2, stride=3)],
    "dilation and groups": [nn.Conv2d(4, 8, 3, dilation=2, groups=2), nn.GELU()],
    "a transposed convolution": [nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Tanh()],
    "GroupNorm": [nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.SiLU()],
    "GroupNorm without weights": [nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8, affine=False), nn.ReLU()],
    "LayerNorm": [nn.Flatten(), nn.LazyLinear(16), nn.LayerNorm(16), nn.GELU("tanh")],
    "pooling": [nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Sigmoid()],
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_what_autograd_says(name: str) -> None:
    classifier = Timed(*LAYERS[name])
    with torch.no_grad():
        classifier(X, TIME)  # sizes of the lazy layers
    gradient = LogProbabilityGradient(classifier, X, TIME)
    wanted = X.clone().requires_grad_(True)
    torch.log_softmax(classifier(wanted, TIME), 1)[torch.arange(3), LABELS].sum().backward()
    assert wanted.grad is not None
    with torch.no_grad():
        found = gradient(X, TIME, LABELS)
    # the logarithm of the probabilities is taken in float32
    torch.testing.assert_close(found, wanted.grad, rtol=2e-5, atol=2e-6 * float(wanted.grad.abs().max()))
    assert found.abs().max() > 1e-4
    named = {str(node.target) for node in gradient.traced.graph.nodes}
    assert not [n for n in named if "backward" in n or "group_norm" in n or "_." in n]


def test_weights_are_held_and_nothing_is_differentiated_at_run_time() -> None:
    classifier = Timed(nn.Conv2d(4, 8, 3), nn.SiLU())
    with torch.no_grad():
        classifier(X, TIME)
    gradient = LogProbabilityGradient(classifier, X, TIME)
    before = gradient(X, TIME, LABELS)
    assert not before.requires_grad
    assert list(gradient.parameters()) == []
    assert len(list(gradient.buffers())) >= 4
    with torch.no_grad():
        classifier.head.weight.zero_()
    assert torch.equal(gradient(X, TIME, LABELS), before)
    assert set(torch.export.export(gradient, (X, TIME, LABELS)).graph_signature.user_inputs) == {
        "sample",
        "timestep",
        "guide_labels",
    }


class Branching(nn.Module):
    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :5] * (2 if x.sum() > 0 else 1)


class Odd(nn.Module):
    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x


def test_messages() -> None:
    with pytest.raises(UsageError, match=r"a classifier of 3 samples returns logits \(3, C\); this one \(3, 4, 9, 9\)"):
        LogProbabilityGradient(Odd(), X, TIME)
    with pytest.raises(HastenError, match=r"cannot be traced: .*; a branch on values must become torch\.where"):
        LogProbabilityGradient(Branching(), X, TIME)

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool2d(x, 2).sum()

    with pytest.raises(HastenError, match=r"needs aten\.max_pool2d_with_indices_backward\.default, which is"):
        forward_graph(torch.func.grad(pooled), (X,))
