"""Stored notebooks hold the outputs of the code beside them, and that code runs from top to bottom."""

import json
import os
import subprocess
import sys

import pytest
from notebook_cells import NOTEBOOKS, cells_of

SOURCES = sorted(NOTEBOOKS.glob("[0-9]_*.py"))

named = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@named
def test_the_stored_notebook_is_of_this_code_run_in_order(source):
    stored = json.loads(source.with_suffix(".ipynb").read_text())
    found = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in stored["cells"]]
    # Make it again with: python notebooks/execute.py
    assert found == cells_of(source)
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    assert source.with_suffix(".ipynb").stat().st_size < 1_500_000


@pytest.mark.slow
@named
def test_the_code_runs_from_top_to_bottom(source):
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(NOTEBOOKS.parent)}
    done = subprocess.run(
        [sys.executable, source.name], cwd=source.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
