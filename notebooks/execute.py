"""Run the notebooks and store them with what they showed.

    uv run --extra notebooks python notebooks/execute.py                   # all of them; minutes each on two cores
    uv run --extra notebooks python notebooks/execute.py 1_quickstart

NAME.py (jupytext's percent format) is the source; NAME.ipynb is made from it, run from top to bottom, and replaced
only if every cell ran. Times of day and machine names are left out, so that the same code gives much the same file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext  # pyright: ignore[reportMissingImports] (of the notebooks extra)
import nbformat  # pyright: ignore[reportMissingImports]
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent
LIMIT = 1_500_000


def execute(source: Path, timeout: int = 1800) -> Path:
    """Run a notebook's source and store it. Raises CellExecutionError, or ValueError if it came out too large."""
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            # Warnings and progress are the machine's business.
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                # Frames come as both: a tenth of the bytes shows them as well.
                if "image/jpeg" in output.get("data", {}):
                    output.data.pop("image/png", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    out = source.with_suffix(".ipynb")
    partial = out.with_suffix(".partial")
    partial.write_text(nbformat.writes(notebook) + "\n")
    if partial.stat().st_size > LIMIT:
        partial.unlink()
        raise ValueError(f"{out}: more than {LIMIT} bytes: show fewer or smaller pictures")
    os.replace(partial, out)
    return out


def main(names: list[str]) -> None:
    for source in [HERE / f"{name}.py" for name in names] or sorted(HERE.glob("[0-9]_*.py")):
        print(execute(source), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
