"""Stored notebooks hold the outputs of the code beside them, and that code runs from top to bottom."""

import json
import os
import subprocess
import sys

import notebook_cells
import pytest
from notebook_cells import NOTEBOOKS, cells_of

SOURCES = sorted(NOTEBOOKS.glob("[0-9]_*.py"))
# What stands in a notebook -> what stands there in a test, which wants to know that it runs and not what it shows.
SMALL = {
    "1_quickstart": {"pairs(8)": "pairs(2)", "batch_size=8": "batch_size=2", "(0.05, 0.25, 1.0)": "(0.25,)"},
    "2_attention": {"(1.0, 0.25, 0.1, 0.05)": "(0.25,)"},
    "3_steps_and_samplers": {
        "steps=24": "steps=4",
        "(50, 12, 4, 2)": "(2,)",
        "(4, 3, 2, 1)": "(2,)",
        "seed=range(6), batch_size=6": "seed=range(1), steps=2",
    },
    "5_kernel": {
        '    "pallas_kernels.cases_attention:compile_cases": ["sage_attention 777x2x128"],\n': "",
        ', "norm_modulate_quantize_token_1.3b_1536"': "",
    },
    "6_train_a_student": {
        "steps, batch, scenes = 200, 4, 512": "steps, batch, scenes = 4, 2, 16",
        "data.clips(0, 240)": "data.clips(0, 8)",
        "pairs(12)": "pairs(2)",
        "batch_size=6, steps=12": "batch_size=2, steps=2",
    },
    "7_own_weights": {"--model wan2.1-t2v-1.3b": "--model tiny", "832x480": "128x128", "range(2)": "range(1)"},
    "8_animate_a_picture": {"wanted(8)": "wanted(2)", '("left", "right", "up", "down")': '("left",)'},
}

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


def test_every_notebook_is_made_smaller_by_what_it_says():
    for name, changes in SMALL.items():
        text = (NOTEBOOKS / f"{name}.py").read_text()
        assert not [old for old in changes if old not in text], name


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Programs that one notebook compiled, for the next."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@named
def test_the_code_runs_from_top_to_bottom(source, compiled, tmp_path):
    text = source.read_text()
    for old, new in SMALL.get(source.stem, {}).items():
        text = text.replace(old, new)
    (tmp_path / source.name).write_text(text)
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(NOTEBOOKS.parent),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [sys.executable, notebook_cells.__file__, str(tmp_path / source.name)]
    done = subprocess.run(command, cwd=NOTEBOOKS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_ablation_of_ones_own_takes_ten_lines():
    # The slow test above runs them.
    (code,) = [text for _, text in cells_of(NOTEBOOKS / "1_quickstart.py") if "# An ablation of one's own." in text]
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 10
