"""Where the phases are worth it: rules are rows of data, the first row whose conditions all hold decides.

Measured on a CPU, float32, under Inductor, per call with the taps summed anew: 1280 channels at 8x8 0.4 times as fast
as the two operators, 320 and 640 at 16x16 0.7 to 1.1, 64 at 8x8 and 16x16 1.2 to 1.7, 320 at 32x32 1.6, 256 at 64x64
2.0 to 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the rule. A condition that is None or empty always holds; one about an unknown size never does."""

    implementation: str
    reason: str
    devices: tuple[str, ...] = ()
    max_pixels: int | None = None  # B * H * W of the small map
    min_channels: int | None = None  # the smaller of C and K

    def holds(self, device: str, pixels: int | None, channels: int | None) -> bool:
        """Whether every condition of this row is met."""
        return all(
            (
                not self.devices or device in self.devices,
                self.max_pixels is None or (pixels is not None and pixels <= self.max_pixels),
                self.min_channels is None or (channels is not None and channels >= self.min_channels),
            )
        )


RULE = (
    Row(
        "direct",
        "few pixels: summing and reordering the taps costs more than it saves",
        max_pixels=256,
        min_channels=128,
    ),
    Row("phases", "2.25 times fewer multiplications"),
)


def select(
    device: str, batch: int | None, channels: int | None, outputs: int | None, height: int | None, width: int | None
) -> tuple[str, str]:
    """``(implementation, reason)`` for an input (B, C, H, W) and K outputs; None is a size not yet known."""
    pixels = None if batch is None or height is None or width is None else batch * height * width
    narrow = None if channels is None or outputs is None else min(channels, outputs)
    row = next(row for row in RULE if row.holds(device, pixels, narrow))
    return row.implementation, row.reason
