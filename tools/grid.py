"""Labelled rows of pictures as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.tools.files import replace

SCALE, GAP, FONT = 3, 6, 14


def write_rows(rows: Mapping[str, Any], columns: Sequence[str], path: Path) -> None:
    """Write one row of pictures (B, 3, H, W) in [-1, 1] for each label, under the names of the columns."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=FONT)
    pixels = {
        label: ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for label, images in rows.items()
    }
    count, height, width, _ = next(iter(pixels.values())).shape
    cell = (max(width * SCALE, *(int(font.getlength(c)) + GAP for c in columns)) + GAP, height * SCALE + GAP)
    left = max(int(font.getlength(label)) for label in rows) + 2 * GAP
    top = FONT + 2 * GAP
    sheet = Image.new("RGB", (left + count * cell[0], top + len(rows) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((left + column * cell[0], GAP), name, fill="black", font=font)
    for row, (label, images) in enumerate(pixels.items()):
        y = top + row * cell[1]
        draw.text((GAP, y + height * SCALE // 2 - FONT // 2), label, fill="black", font=font)
        for column, picture in enumerate(images):
            enlarged = Image.fromarray(picture).resize((width * SCALE, height * SCALE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * cell[0], y))
    replace(path, lambda partial: sheet.save(partial, format="PNG"))
