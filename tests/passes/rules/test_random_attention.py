"""Random programs around softmax: whatever is fused is equal to eager, whatever is not was left alone for a reason.

A program is a few lines of Python drawn from lists of spellings: layout, grouped heads, scales, masks, casts, products,
and now and then a line that no attention has. The seed is the test's name; ``python tests/passes/rules/
test_random_attention.py FIRST LAST`` runs more of them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from in_eager import clear, hits, relative_error, rewritten, tensors

SCORES = (
    "s = s * 0.3",
    "s = s / 2.5",
    "s = 0.7 * s",
    "s = s * factor",
    "s = s + m",
    "s = m + s",
    "s = s - m.to(s.dtype)",
    "s = s.float()",
    "s = s.to(q.dtype)",
    "s = s.masked_fill(m.bool(), float('-inf'))",
    "s = s.masked_fill(~m.bool(), -1e9)",
    "s = s.masked_fill(m == 0, torch.finfo(s.dtype).min)",
    "s = torch.where(m.bool(), s, float('-inf'))",
    "s = torch.where(m.bool(), -1e5, s)",
    "s = s.masked_fill(m.bool(), -5.0)",
    "s = s - s.amax(-1, keepdim=True)",
    "s = s.clone()",
    "s = s + torch.full(s.shape[-2:], float('-inf'), dtype=s.dtype).triu(1)",
    "s = s + 1",
    "s = -s",
    "s = s + s",
    "s = s * m.to(s.dtype)",
    "s = s.clamp(-3, 3)",
)
SOFTMAX = (
    *("p = s.softmax(-1)",) * 4,
    "p = F.softmax(s, -1, dtype=torch.float32)",
    "p = torch.softmax(s.float(), -1).to(s.dtype)",
    "p = (s - s.amax(-1, keepdim=True)).exp(); p = p / p.sum(-1, keepdim=True)",
    "p = s.exp(); p = p / p.sum(-1, keepdim=True)",
    "p = F.softmax(s, -2)",
)
PROBABILITIES = ("p = F.dropout(p, 0.3, training=False)", "p = p * 2", "p = p.to(v.dtype)", "p = p.float()")


@dataclass(frozen=True)
class Program:
    source: str
    function: Callable[..., object]
    inputs: tuple[torch.Tensor, ...]

    def in_float64(self) -> object:
        """The same lines with every number in float64, those that the program casts included."""
        wide = compiled(self.source.replace(".float()", ".double()"))
        return wide(*(t.double() if t.is_floating_point() else t for t in self.inputs))


def compiled(source: str) -> Callable[..., object]:
    names: dict[str, Callable[..., object]] = {"torch": torch, "F": F}
    exec(source, names)
    return names["function"]


def program(seed: int) -> Program:
    """Lines over q, k, v, a mask ``m`` of any kind and a one-element ``factor``."""
    choose = random.Random(seed)
    batch, heads, rows, keys = (
        choose.choice([1, 2, 3]),
        choose.choice([1, 2, 4]),
        choose.choice([1, 5]),
        choose.choice([1, 6]),
    )
    rows = keys if choose.random() < 0.3 else rows
    width, value_width = choose.choice([1, 4, 8]), choose.choice([1, 4, 8])
    layout = choose.choice(["bhnd", "bnhd", "bnd", "nd"])
    key_heads = choose.choice([heads, heads, heads, 1])
    dtype = choose.choice([*[torch.float32] * 4, torch.float64, torch.bfloat16, torch.float16])
    rng = torch.Generator().manual_seed(seed)

    def draw(h: int, n: int, d: int) -> torch.Tensor:
        shape = {"bhnd": (batch, h, n, d), "bnhd": (batch, n, h, d), "bnd": (batch, n, d), "nd": (n, d)}[layout]
        return torch.randn(shape, generator=rng).to(dtype)

    q, k, v = draw(heads, rows, width), draw(key_heads, keys, width), draw(key_heads, keys, value_width)
    lines, rank, repeated = [], {"bhnd": 4, "bnhd": 4, "bnd": 3, "nd": 2}[layout], key_heads == heads
    if layout == "bnhd":
        lines.append(f"q, k, v = (t.{choose.choice(['transpose(1, 2)', 'permute(0, 2, 1, 3)'])} for t in (q, k, v))")
    if rank == 4 and key_heads != heads and choose.random() < 0.6:
        how = choose.choice(
            [f"repeat_interleave({heads}, 1)", f"expand(-1, {heads}, -1, -1)", f"repeat(1, {heads}, 1, 1)"]
        )
        lines.append(f"k, v = k.{how}, v.{how}")
        repeated = True
    merged = rank == 4 and repeated and choose.random() < 0.25
    if merged:
        lines.append("q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))")
        rank = 3
    if choose.random() < 0.4:
        lines.append(
            choose.choice(["q = q * 0.4", "k = k / 3", "q, k = q.float(), k.float()", "q = q * -0.5", "q = q * factor"])
        )
    lines.append(f"s = {_first_product(choose, rank)}")
    lines += [choose.choice(SCORES) for _ in range(choose.randint(0, 3))]
    lines.append(choose.choice(SOFTMAX))
    if choose.random() < 0.2:
        lines.append(choose.choice(PROBABILITIES))
    lines += ["p = p.to(v.dtype)", f"o = {_second_product(choose, rank)}"]
    if merged and choose.random() < 0.6:
        lines.append(f"o = o.reshape({batch}, {heads}, {rows}, {value_width})")
    lines.append(f"return {choose.choice(['o'] * 8 + ['o, p', 'o, s'])}")
    source = "def function(q, k, v, m, factor):\n    " + "\n    ".join(lines) + "\n"
    return Program(source, compiled(source), (q, k, v, _mask(choose, rng, rows, keys, dtype), torch.tensor(0.8)))


def _first_product(choose: random.Random, rank: int) -> str:
    turned = choose.choice(["k.transpose(-1, -2)", "k.mT", "k.transpose(-2, -1).contiguous()"])
    spelled = [f"q @ {turned}", f"torch.matmul(q, {turned})", "torch.matmul(k, q.transpose(-1, -2)).transpose(-1, -2)"]
    if rank == 4:
        spelled += ["torch.einsum('bhnd,bhmd->bhnm', q, k)", "torch.einsum('bhmd,bhnd->bhnm', k, q)"]
    if rank == 3:
        addend = "torch.full((q.shape[0], q.shape[1], k.shape[1]), 0.5, dtype=q.dtype)"
        beta, alpha = choose.choice([0, 1, 0.5]), choose.choice([1, 0.3])
        spelled += ["torch.einsum('bnd,bmd->bnm', q, k)", f"torch.bmm(q, {turned})"]
        spelled += [f"torch.baddbmm({addend}, q, {turned}, beta={beta}, alpha={alpha})"]
    return choose.choice(spelled)


def _second_product(choose: random.Random, rank: int) -> str:
    spelled = ["p @ v", "torch.matmul(p, v)"]
    if rank == 4:
        spelled += ["torch.einsum('bhnm,bhmd->bhnd', p, v)", "torch.einsum('bhnm,bhmd->bnhd', p, v)"]
    if rank == 3:
        spelled += ["torch.bmm(p, v)", "torch.bmm(v.transpose(1, 2), p.transpose(1, 2)).transpose(1, 2)"]
    return choose.choice(spelled)


def _mask(choose: random.Random, rng: torch.Generator, rows: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    shape = choose.choice([(rows, keys), (1, keys), (rows, 1), (keys,), (1, rows, keys), ()])
    kind = choose.choice(["float", "bool", "all", "int", "infinite"])
    if kind == "float":
        return torch.randn(shape, generator=rng).to(dtype)
    if kind == "infinite":
        return torch.where(torch.rand(shape, generator=rng) > 0.3, 0.0, float("-inf")).to(dtype)
    if kind == "int":
        return torch.randint(0, 3, shape, generator=rng)
    return torch.rand(shape, generator=rng) > (0.4 if kind == "bool" else -1)


def problem(made: Program) -> str | None:
    """What differs from eager. In half precision: by how much more than eager differs from float64."""
    clear()
    with torch.no_grad():
        try:
            want = tensors(made.function(*made.inputs))
            wide = tensors(made.in_float64())
        except (RuntimeError, IndexError):
            return None  # not a program: shapes or types do not fit
        got = tensors(torch.compile(made.function, backend=rewritten, dynamic=False, fullgraph=True)(*made.inputs))
    if [(t.shape, t.dtype) for t in want] != [(t.shape, t.dtype) for t in got]:
        return f"{got} instead of {want}"
    # a row of -inf is NaN where it is spelled out, and 0 in the fused operator
    known = [a.isfinite() & b.isfinite() for a, b in zip(want, wide, strict=True)]
    exact, eager, ours = ([t[k].double() for t, k in zip(ts, known, strict=True)] for ts in (wide, want, got))
    if made.inputs[0].dtype in (torch.bfloat16, torch.float16):
        least, most = relative_error(exact, eager), relative_error(exact, ours)
        return None if most <= 1.3 * least + 2e-3 else f"off by {most:.2g}, eager by {least:.2g}"
    error = relative_error(eager, ours)
    # a filler of -1e5 leaves two digits of what is added to it: there neither is nearer to the other than to float64
    nearer = relative_error(exact, ours) <= 1.3 * relative_error(exact, eager)
    return None if error <= 1e-4 or nearer else f"off by {error:.2g}"


@pytest.mark.parametrize("seeds", [range(first, first + 20) for first in range(0, 200, 20)], ids=lambda s: str(s.start))
def test_random_programs(seeds: range) -> None:
    fired = 0
    for seed in seeds:
        made = program(seed)
        assert problem(made) is None, f"seed {seed}: {problem(made)}\n{made.source}"
        fired += bool(hits())
    assert fired > 0


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        if (why := problem(program(number))) is not None:
            print(f"seed {number}: {why}\n{program(number).source}")
