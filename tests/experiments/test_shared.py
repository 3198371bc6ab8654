"""What the experiments share: rows survive a kill, intervals cover, options have two defaults, pictures stay small."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import report, results
from experiments import strips as strip_sheets
from experiments.command import Command
from experiments.records import Results, name_of
from turbojax.errors import UserError


@pytest.fixture
def plain_jax(monkeypatch):
    """The scripts' main functions without the process-wide settings of a program."""
    monkeypatch.setattr("experiments.command.use_compilation_cache", lambda: None)


def test_rows_are_found_again_by_a_later_run(tmp_path):
    rows = Results(tmp_path / "results.jsonl")
    rows.add([{"topk": 0.1, "times": (1.5, 1.0), "fit": 20.0}, {"topk": 0.5, "times": (1.5, 1.0), "fit": 21.0}])
    again = Results(tmp_path / "results.jsonl")
    assert [r["fit"] for r in again.where(topk=0.5)] == [21.0]
    assert len(again.where(times=(1.5, 1.0))) == 2
    again.drop(topk=0.1)
    assert [r["fit"] for r in Results(tmp_path / "results.jsonl").where()] == [21.0]


def test_half_a_line_is_dropped_and_the_next_row_stands_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"clip": 0}\n{"clip": 1, "fi')
    rows = Results(path)
    rows.add([{"clip": 1}])
    assert [json.loads(line)["clip"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("clip,fit\n0,20\n")
    with pytest.raises(UserError, match="line 1"):
        Results(tmp_path / "results.jsonl")


def test_a_cell_names_a_file():
    assert name_of({"steps": 4, "arm": "a / b"}) == "steps=4,arm=a-_-b"


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low <= 0.0 <= high for low, high in (report.bootstrap(rng.standard_normal(40)) for _ in range(200))]
    # 95% of 200 is 190 with a standard deviation of 3; the percentile bootstrap of 40 values covers a little less.
    assert 178 <= sum(hits) <= 199


def test_a_table_has_its_numbers_on_the_right(tmp_path):
    report.write_table(tmp_path / "table.md", [{"arm": "sde", "steps": 4}, {"arm": "ode", "steps": 2}], "A note.")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[:3] == ["| arm | steps |", "| --- | ---: |", "| sde | 4 |"]
    assert lines[-1] == "A note."


def test_pictures_are_small_and_nothing_half_written_stays(tmp_path):
    fig, axes = report.figure(1, 2)
    labels = {"title": "t", "xlabel": "x", "ylabel": "y"}
    report.heat_map(axes[0, 0], np.arange(6.0).reshape(2, 3), [1, 2], [3, 4, 5], **labels)
    report.save(fig, tmp_path / "grid.png")
    strip = np.zeros((16, 64, 3), np.uint8)
    report.write_sheet(tmp_path / "clips.png", {("a", "x"): strip, ("b", "x"): strip, ("b", "y"): strip}, "sheet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clips.png", "grid.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.mode == "P"
        assert path.stat().st_size < 100_000


def test_a_long_column_of_strips_is_folded_and_every_strip_is_there():
    strips = {(f"row {i}", ""): np.full((20, 60, 3), 10 * i, np.uint8) for i in range(strip_sheets.TALL + 1)}
    page = np.asarray(strip_sheets.sheet(strips))
    assert page.shape[0] < (strip_sheets.TALL + 1) * 20 < 2 * page.shape[0]
    for i in range(len(strips)):
        assert (page == 10 * i).all(-1).sum() >= 20 * 60


def test_options_have_a_full_and_a_quick_default(tmp_path, plain_jax):
    command = Command("doc", "name")
    command.option("topk", (0.1, 0.5), (0.5,), "shares")
    command.option("clips", 48, 4, "clips")
    assert command.parse(["--out", str(tmp_path)]).topk == (0.1, 0.5)
    quick = command.parse(["--out", str(tmp_path), "--quick", "--topk", "0.2,0.3"])
    assert (quick.topk, quick.clips) == ((0.2, 0.3), 4)


def test_a_mistyped_grid_is_told_in_words(tmp_path, plain_jax, capsys):
    command = Command("doc", "name")
    command.option("topk", (0.1, 0.5), (0.5,), "shares")
    with pytest.raises(SystemExit):
        command.parse(["--out", str(tmp_path), "--topk", "0.1;0.5"])
    assert "comma list of float" in capsys.readouterr().err


def test_the_results_page_is_what_the_outputs_and_docstrings_say():
    # Regenerate it with: python -m experiments.results > docs/results.md
    assert (results.PAGE / "results.md").read_text() == results.page()


def test_a_docstring_becomes_a_section(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "PAGE", tmp_path / "docs")
    (tmp_path / "mine.py").write_text('"""A question: why?\n\n    python -m mine\n\nBecause.\n"""\n')
    (tmp_path / "table.md").write_text("| a |\n| --- |\n")
    (tmp_path / "plot.png").write_bytes(b"")
    assert results.section("mine", tmp_path) == (
        "## A question: why?\n\n```\npython -m mine\n```\n\nBecause.\n\n| a |\n| --- |\n\n"
        "![A question: why?: plot](../plot.png)\n"
    )
