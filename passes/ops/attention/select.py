"""Which attention implementation runs: rules are rows of data, the first row whose conditions all hold decides.

``default`` follows what torch's kernels accept (torch 2.13, ``sdp_utils_cpp.cpp`` and ``cuda/sdp_utils.cpp``).
``ml-drift`` is the rule of the authors of "Speed Is All You Need" (arXiv 2304.11267) as their engine applies it on the
GPUs it lists (ML Drift, ``conv_softmax_conv.cc``): one fused kernel for wide unmasked float16 self-attention with
narrow heads, partially fused softmax for the rest. The lower limit on N that the engine has for partial fusion depends
on the GPU and is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hasten.errors import UsageError, nearest


@dataclass(frozen=True)
class Row:
    """One line of a rule. A condition that is None or empty always holds; one about an unknown size never does."""

    implementation: str
    reason: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    masked: bool | None = None
    equal_widths: bool | None = None  # D == Dv
    max_width: int | None = None  # D and Dv
    min_width_ratio: int | None = None  # the larger of D and Dv over the smaller
    width_multiple_of: int | None = None  # D
    min_queries: int | None = None
    keys_multiple_of: int | None = None
    min_scores: int | None = None  # heads * N * M

    def holds(
        self,
        device: str,
        dtype: str,
        queries: int | None,
        keys: int | None,
        width: int | None,
        value_width: int | None,
        masked: bool,
        heads: int,
    ) -> bool:
        """Whether every condition of this row is met."""
        widths = None if width is None or value_width is None else (min(width, value_width), max(width, value_width))
        scores = None if queries is None or keys is None else heads * queries * keys
        return all(
            (
                not self.devices or device in self.devices,
                not self.dtypes or dtype in self.dtypes,
                self.masked is None or self.masked == masked,
                self.equal_widths is None or (widths is not None and self.equal_widths == (widths[0] == widths[1])),
                self.max_width is None or (widths is not None and widths[1] <= self.max_width),
                self.min_width_ratio is None or (widths is not None and widths[1] >= widths[0] * self.min_width_ratio),
                self.width_multiple_of is None or (width is not None and width % self.width_multiple_of == 0),
                self.min_queries is None or (queries is not None and queries >= self.min_queries),
                self.keys_multiple_of is None or (keys is not None and keys % self.keys_multiple_of == 0),
                self.min_scores is None or (scores is not None and scores >= self.min_scores),
            )
        )


_HALF = ("float16", "bfloat16")

RULES: Mapping[str, tuple[Row, ...]] = MappingProxyType(
    {
        "default": (
            Row("pfsm", "zeros would be most of the flash kernel's work", devices=("cpu",), min_width_ratio=3),
            Row("sdpa", "torch's CPU flash kernel takes every type, width and mask", devices=("cpu",)),
            Row("sdpa", "flash, cuDNN or memory-efficient attention takes it", devices=("cuda",), masked=False),
            Row("sdpa", "memory-efficient attention takes masks", devices=("cuda",), dtypes=_HALF, width_multiple_of=8),
            Row(
                "sdpa",
                "memory-efficient attention takes masks",
                devices=("cuda",),
                dtypes=("float32",),
                width_multiple_of=4,
            ),
            Row(
                "pfsm",
                "torch would write the scores of all heads at once (1 GiB or more of them)",
                devices=("cuda",),
                min_scores=2**28,
            ),
            Row("sdpa", "torch chooses among its kernels"),
        ),
        "ml-drift": (
            Row(
                "sdpa",
                "one fused kernel: float16, no mask, N >= 1024, equal widths <= 40, M a multiple of 4",
                dtypes=("float16",),
                masked=False,
                equal_widths=True,
                max_width=40,
                min_queries=1024,
                keys_multiple_of=4,
            ),
            Row("pfsm", "outside the fused kernel's limits: partially fused softmax"),
        ),
    }
)


def select(
    rule_name: str,
    device: str,
    dtype: object,
    N: int | None,  # noqa: N803  (the letters of the shapes)
    M: int | None,  # noqa: N803
    D: int | None,  # noqa: N803
    Dv: int | None,  # noqa: N803
    masked: bool,
    heads: int,
) -> tuple[str, str]:
    """``(implementation, reason)`` for N queries, M keys, widths D and Dv; None is a size not known before run time.

    ``device`` is a device type ("cpu", "cuda"), ``dtype`` a torch.dtype or its name; ``masked`` includes causal masks.

    >>> select("ml-drift", "cuda", "float16", 4096, 4096, 40, 40, False, 8)[0]
    'sdpa'
    """
    if rule_name not in RULES:
        hint = nearest(rule_name, RULES)
        raise UsageError(f"attention: unknown selection rule {rule_name!r}; use one of {', '.join(RULES)}.{hint}")
    name = str(dtype).removeprefix("torch.")
    row = next(row for row in RULES[rule_name] if row.holds(device, name, N, M, D, Dv, masked, heads))
    return row.implementation, row.reason
