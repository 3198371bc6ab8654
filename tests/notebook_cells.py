"""The cells of a notebook that is kept as a script."""

import re
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def cells_of(source: Path) -> list[tuple[str, str]]:
    """(kind, text) of the cells of a jupytext percent file."""
    text = source.read_text().split("\n# %%", 1)[1]
    cells = []
    for part in ("# %%" + text).split("\n# %%"):
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            cells.append(("markdown", re.sub(r"(?m)^# ?", "", body).strip()))
        else:
            cells.append(("code", body.strip()))
    return cells
