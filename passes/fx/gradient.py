"""The gradient that classifier guidance needs, as a forward graph of its own: no autograd where it runs.

``grad_x log p(y | x, t)`` (Dhariwal & Nichol, 2105.05233) is traced once, backward and all, into plain ATen operators,
which every target compiles like any other network. What exists for backward passes alone is written in others: a
convolution's gradient by its input is a transposed convolution with the same weights, and the statistics that a
GroupNorm hands to its own backward pass are means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hasten.errors import HastenError, UsageError

aten = torch.ops.aten


class LogProbabilityGradient(nn.Module):
    """``grad_x log p(y | x, t)`` of a classifier that maps samples (B, ...) and times (B,) to logits (B, C).

    ``sample`` and ``timestep`` are examples, whose sizes the graph keeps. The classes are (B,) int64; ``guide_labels``
    is a name that no denoiser has, for that may be told no class while the guide is told one. Samples of a batch must
    not depend on each other, as they would under a BatchNorm that trains. `UsageError` where the logits have other
    sizes, `HastenError` where the classifier cannot be traced.
    """

    def __init__(self, classifier: nn.Module, sample: Tensor, timestep: Tensor) -> None:
        super().__init__()
        batch = sample.shape[0]
        with torch.no_grad():
            logits = classifier(sample, timestep)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"guide: a classifier of {batch} samples returns logits ({batch}, C); this one {found}")
        self.classes = logits.shape[1]
        labels = torch.arange(batch, device=sample.device) % self.classes

        def log_probability(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            chosen = label[:, None] == torch.arange(self.classes, device=label.device)
            return (torch.log_softmax(classifier(x, time).float(), 1) * chosen).sum()

        self.traced = forward_graph(torch.func.grad(log_probability), (sample, timestep, labels))

    def forward(self, sample: Tensor, timestep: Tensor, guide_labels: Tensor) -> Tensor:
        """The gradient, (B, ...), in the sample's type."""
        found: Tensor = self.traced(sample, timestep, guide_labels)
        return found


def forward_graph(function: Callable[..., Any], examples: Sequence[Tensor]) -> fx.GraphModule:
    """Trace ``function``, with whatever gradients are taken in it, into a flat graph of forward operators.

    Sizes are those of ``examples``; tensors that it reads beside its arguments become attributes of the graph.
    """
    functional = torch.func.functionalize(function, remove="mutations")
    try:
        made = make_fx(functional, decomposition_table=_decompositions())(*examples)
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise HastenError(
            f"the gradient cannot be traced: {first}; a branch on values must become torch.where"
        ) from error
    made.graph.eliminate_dead_code()
    if left := sorted({str(n.target) for n in made.graph.nodes if "backward" in str(n.target)}):
        raise HastenError(
            f"the gradient needs {left[0]}, which is written in no forward operators here; use other layers in the "
            "classifier"
        )
    for name, tensor in [*made.named_parameters(recurse=False), *vars(made).items()]:
        if isinstance(tensor, Tensor):
            held = tensor.detach().clone()
            delattr(made, name)
            made.register_buffer(name, held)
    made.recompile()
    return made


def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    table = dict(torch._decomp.core_aten_decompositions())
    table[aten.convolution_backward.default] = _convolution_backward
    table[aten.native_group_norm.default] = _native_group_norm
    table[aten.empty_permuted.default] = _empty
    return table


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """By the input alone: weights are constants here."""
    if not output_mask[0]:
        return None, None, None
    if transposed:
        found = aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
        return found, None, None
    extra = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, s, p, d, k in zip(
            x.shape[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, extra, groups), None, None


def _native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed tensor, and mean and reciprocal deviation (N, G) in float32."""
    flat = x.reshape(n, groups, c // groups * hw).float()
    mean = flat.mean(2, keepdim=True)
    centred = flat - mean
    rstd = torch.rsqrt((centred * centred).mean(2, keepdim=True) + eps)
    normed = (centred * rstd).reshape(n, c, math.prod(x.shape[2:])).to(x.dtype)
    if weight is not None:
        normed = normed * weight.reshape(1, c, 1)
    if bias is not None:
        normed = normed + bias.reshape(1, c, 1)
    return normed.reshape(x.shape), mean.reshape(n, groups), rstd.reshape(n, groups)


def _empty(size: Sequence[int], order: Sequence[int], *, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    """Nobody reads what is in it, but SiLU's backward fills one, and exporters know no tensor without values."""
    return torch.zeros(size, dtype=dtype, device=kwargs.get("device"))
