"""The dynamic shift of flows: levels are moved the further to the noisy end, the larger the picture is (FLUX, LTX).

``mu``, which the shift is made of, lies on a line through two points, given by the number of image tokens
(black-forest-labs/flux, ``sampling.py``: ``get_lin_function``; diffusers: ``calculate_shift`` of the pipelines).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError

EXPONENTIAL, LINEAR = "exponential", "linear"
TIME_SHIFTS = (EXPONENTIAL, LINEAR)
"""What mu means: ``shift = e^mu``, or mu itself."""


@dataclass(frozen=True)
class DynamicShift:
    """``mu`` at ``low_tokens`` and at ``high_tokens`` image tokens, and what it means (`TIME_SHIFTS`).

    In diffusers' configurations: ``base_shift``, ``max_shift``, ``base_image_seq_len``, ``max_image_seq_len`` and
    ``time_shift_type``. ``mu`` is the one to take where the sampler is told none.
    """

    low: float = 0.5
    high: float = 1.15
    low_tokens: int = 256
    high_tokens: int = 4096
    time_shift: str = EXPONENTIAL
    mu: float | None = None

    def __post_init__(self) -> None:
        if self.low_tokens == self.high_tokens:
            raise UsageError(
                f"process: the dynamic shift is a line through two numbers of image tokens, and base_image_seq_len and "
                f"max_image_seq_len are both {self.low_tokens}"
            )

    def at(self, tokens: int) -> float:
        """Mu for a picture of ``tokens`` image tokens: for FLUX, a sixteenth of the latents' height times width."""
        slope = (self.high - self.low) / (self.high_tokens - self.low_tokens)
        return self.low + slope * (tokens - self.low_tokens)


def moved(dynamic: DynamicShift | None, own: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """``shift``, ``mu`` and ``time_shift`` of a grid, from a solver's options of these names and ``tokens``.

    ``own`` is the model's fixed shift, which holds where nothing else is said and the shift is not ``dynamic``.
    `UsageError` where it is and nobody said how far.
    """
    shift, mu, tokens = options["shift"], options["mu"], options["tokens"]
    kind = options["time_shift"] or (EXPONENTIAL if dynamic is None else dynamic.time_shift)
    if tokens is not None and mu is not None:
        raise UsageError("both mu and tokens were given, and tokens is what mu is found from; give one of them")
    if tokens is not None:
        if dynamic is None:
            raise UsageError(
                "tokens is for models whose shift depends on the picture's size (use_dynamic_shifting), and this "
                "model's does not; give shift or mu, or leave it out"
            )
        mu = dynamic.at(tokens)
    elif mu is None and shift is None and dynamic is not None:
        mu = dynamic.mu
        if mu is None:
            raise UsageError(
                "this model's shift depends on the picture's size (use_dynamic_shifting), and nothing says how far it "
                "goes; give it as an option of the solver, the number of image tokens (tokens=4096) or mu itself "
                "(mu=1.15), as in flow-euler:tokens=4096"
            )
    return {"shift": own if shift is None else shift, "mu": mu, "time_shift": kind}
