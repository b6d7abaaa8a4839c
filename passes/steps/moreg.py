"""MoReg: AdaCache's distance, scaled up where there is motion, so that moving content is computed more often.

Motion is how far the tapped residual of one frame is from that of another, over the sum of their sizes: 0 to 1. The
score ``m = (motion / 0.385)^8`` is 1 at a motion of 0.385. The factor is ``m + |10 (m - m_prev) / rate|``.
Kahatapitiya et al., 2411.02397 (whose equation has no absolute value); AdaCache-DiT/AdaCache, which has.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.passes.steps.policy import Array, mean_abs, namespace, ratio

PIVOT, SQUARINGS, SCALE, SPEED = 0.385, 3, 1.0, 10.0
"""The reference's ``h`` is (0.385, 8, 1, 2): pivot, power (2^3), scale, and a number that it does not use. The pivot is
Open-Sora's; in a model whose motion stays far below, every score is nothing, and a pivot of its own tells motion."""


@dataclass(frozen=True)
class Motion:
    """``window``: first and last call, counted from 1, that measure; others have the score 1. ``strides`` in frames.

    ``frames`` F: the tapped tensor is (…, F*S, C), frame by frame; None: it is (…, F, C), as temporal attention sees
    it. ``pivot``: the motion whose score is 1. ``reset``: the previous score starts at 1 in each run; the reference
    carries it into the next.
    """

    window: tuple[int, int]
    strides: tuple[int, ...] = (1,)
    frames: int | None = None
    reset: bool = True
    pivot: float = PIVOT

    def score(self, tap: Array, step: Array) -> Array:
        """The score of a call; ``step`` counts from 0."""
        xp = namespace(tap, step)
        tokens = 1 if self.frames is None else tap.shape[-2] // self.frames
        raw = sum(_motion(tap, stride * tokens) for stride in self.strides) / len(self.strides)
        value = raw / self.pivot
        for _ in range(SQUARINGS):
            value = value * value
        within = (step + 1 >= self.window[0]) & (step + 1 <= self.window[1])
        return xp.where(within, value / SCALE, xp.ones_like(value))

    def factor(self, score: Array, previous: Array, rate: Array) -> Array:
        """What the distance is multiplied by; ``rate`` is the planned distance of computed calls, float32."""
        return score + namespace(score).abs((score - previous) * SPEED / rate)


def _motion(tap: Array, shift: int) -> Array:
    later, earlier = tap[..., shift:, :], tap[..., :-shift, :]
    return ratio(mean_abs(later - earlier), mean_abs(later) + mean_abs(earlier))
