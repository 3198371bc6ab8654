"""The cells of a notebook that is kept as a script, and what runs them as Jupyter does.

python tests/notebook_cells.py FILE        one cell after the other; what each shows last is drawn, as text or pixels
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SHOWN_AS = ("_repr_html_", "_repr_png_")


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


def run(source: Path) -> None:
    """Run the code cells in one namespace. What a cell ends with is shown: drawn, and printed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, (kind, text) in enumerate(cells_of(source)):
        if kind != "code":
            continue
        tree = ast.parse(text, f"{source.name}, cell {number}")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{source.name}, cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"{source.name}, cell {number}", "eval"), names)
            for method in SHOWN_AS:
                getattr(value, method, lambda: None)()
            print(repr(value)[:200])


if __name__ == "__main__":
    run(Path(sys.argv[1]))
