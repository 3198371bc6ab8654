"""Stored notebooks hold the outputs of the code beside them, and that code runs from top to bottom in a kernel."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]_*.py"))
# What stands in a notebook -> what stands there in a test, which wants to know that it runs and not what it shows. Most
# of the time is compilation: clips are made one at a time, in programs that the notebooks share.
SMALL = {
    "1_quickstart": {
        "pairs(8)": "pairs(2)",
        "batch_size=4": "batch_size=1",
        "batch_size=8": "batch_size=1",
        '(("dense", None), ("sage", None), ("sagesla", 0.5), ("sagesla", 0.1))': '(("sage", None),)',
        "(0.05, 0.25, 1.0)": "(0.25,)",
    },
    "2_attention": {"(1.0, 0.25, 0.1, 0.05)": "(0.25,)"},
    "3_steps_and_samplers": {
        "steps=24": "steps=4",
        "((50, 2.0), (12, 2.0), (4, 2.0), (2, 2.0), (4, 1.0))": "((1, 2.0),)",
        "(1, 2, 3, 4)": "(1,)",
        "seed=range(6), batch_size=6": "seed=range(1), steps=1",
    },
    "5_kernel": {
        '    "pallas_kernels.cases_attention:compile_cases": ["sage_attention 777x2x128"],\n': "",
        ', "norm_modulate_quantize_token_1.3b_1536"': "",
    },
    "6_train_a_student": {
        "steps, batch, scenes = 200, 4, 512": "steps, batch, scenes = 4, 2, 16",
        "data.clips(0, 240)": "data.clips(0, 8)",
        "pairs(12)": "pairs(2)",
        "batch_size=6, steps=12": "batch_size=1, steps=1",
    },
    # What a plan takes is compiled in tests/test_plan.py.
    "7_own_weights": {
        "--model wan2.1-t2v-1.3b --device rtx4090": "--help",
        "range(2)": "range(1)",
        '    "W8A8": {"attention": "dense", "quant": "w8a8"},\n': "",
        '    "Sage": {"attention": "sage", "quant": "none"},\n': "",
    },
    "8_animate_a_picture": {"wanted(8)": "wanted(1), batch_size=1", '("left", "right", "up", "down")': '("left",)'},
}

named = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


@named
def test_the_stored_notebook_is_of_this_code_run_in_order(source):
    path = source.with_suffix(".ipynb")
    stored = nbformat.read(path, as_version=4)
    # Make it again with: python notebooks/execute.py
    assert cells(stored) == cells(jupytext.read(source))
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert path.stat().st_size < 1_500_000


def test_every_notebook_is_made_smaller_by_what_it_says():
    for name, changes in SMALL.items():
        text = (NOTEBOOKS / f"{name}.py").read_text()
        assert not [old for old in changes if old not in text], name


@pytest.mark.slow
@named
def test_the_code_runs_from_top_to_bottom(source):
    text = source.read_text()
    for old, new in SMALL.get(source.stem, {}).items():
        text = text.replace(old, new)
    notebook = jupytext.reads(text, fmt="py:percent")
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}})
    client.execute()  # raises what a cell raises


def test_an_ablation_of_ones_own_takes_ten_lines():
    # The slow test above runs them.
    notebook = jupytext.read(NOTEBOOKS / "1_quickstart.py")
    (code,) = [cell.source for cell in notebook.cells if "# An ablation of one's own." in cell.source]
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 10
