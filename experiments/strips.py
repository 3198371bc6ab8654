"""Contact sheets with words beside the rows: the same clips under every setting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from turbojax.video import contact_sheet

GAP = 8
# More rows than this stand in two columns: a screen is wider than it is high.
TALL = 12


def rows(clips: Mapping[str, UInt8[np.ndarray, "T H W 3"]], columns: int = 8) -> Image.Image:
    """One row a clip, its name to the left; `columns` frames evenly spaced from the first to the last."""
    return sheet({(name, ""): contact_sheet([frames], columns) for name, frames in clips.items()})


def sheet(
    strips: Mapping[tuple[str, str], UInt8[np.ndarray, "h w 3"]], title: str = "", scale: float = 1.0
) -> Image.Image:
    """Strips of frames, all of one size, by (row, column) label. scale: of the strips; words keep their size."""
    names, columns = list(dict.fromkeys(row for row, _ in strips)), list(dict.fromkeys(column for _, column in strips))
    h, w = (round(n * scale) for n in next(iter(strips.values())).shape[:2])
    lines = -(-len(names) // 2) if columns == [""] and len(names) > TALL else len(names)
    font = ImageFont.load_default(12)
    left = GAP + max(round(font.getlength(name)) for name in names) + GAP
    top = (24 if title else 0) + (18 if columns != [""] else 0)
    block = left + len(columns) * (w + GAP)
    width = max(-(-len(names) // lines) * block, round(font.getlength(title)) + 2 * GAP)
    page = Image.new("RGB", (width, top + lines * (h + GAP)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 5), title, "black", font)
    for j, column in enumerate(columns):
        draw.text((left + j * (w + GAP), top - 18), column, "black", font)
    for i, name in enumerate(names):
        x, y = i // lines * block, top + i % lines * (h + GAP)
        draw.text((x + GAP, y + h // 2), name, "black", font, anchor="lm")
        for j, column in enumerate(columns):
            if (name, column) in strips:
                strip = Image.fromarray(strips[name, column])
                strip = strip if strip.size == (w, h) else strip.resize((w, h), Image.Resampling.LANCZOS)
                page.paste(strip, (x + left + j * (w + GAP), y))
    return page
