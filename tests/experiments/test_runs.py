"""Whole experiments on a pipeline of random weights: outputs, resuming, and makers that agree with the pipeline."""

import json

import numpy as np
import pytest
import small_pipeline

from experiments import (
    attention_error,
    attention_mass,
    ladder,
    quantisation,
    sampler,
    sparsity_steps,
    training,
)
from experiments.clips import Clips, describe

pytestmark = pytest.mark.filterwarnings("ignore:.*never learned the words")


@pytest.fixture(autouse=True)
def plain_jax(monkeypatch):
    """The scripts' main functions without the process-wide settings of a program."""
    monkeypatch.setattr("experiments.command.use_compilation_cache", lambda: None)
    monkeypatch.setattr("experiments.command.keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    sampling = {"sampler": "rcm-sde", "steps": 2, "guidance": (1.0, 1.0), "size": (32, 32)}
    return str(small_pipeline.save(small_pipeline.pipeline(**sampling), tmp_path_factory.mktemp("model") / "small"))


def test_a_sweep_writes_rows_a_table_and_pictures_and_goes_on_where_it_stopped(model, tmp_path):
    grid = ["--model", model, "--out", str(tmp_path), "--steps", "1", "--clips", "3", "--batch-size", "2"]
    sparsity_steps.main([*grid, "--topk", "1"])
    first = (tmp_path / "results.jsonl").read_text()
    sparsity_steps.main([*grid, "--topk", "0.5,1"])
    text = (tmp_path / "results.jsonl").read_text()
    assert text.startswith(first)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(r["topk"], r["clip"]) for r in rows] == [(t, i) for t in (1.0, 0.5) for i in range(3)]
    assert [r["prompt"] for r in rows[:3]] == [r["prompt"] for r in rows[3:]]
    assert all(r["psnr"] > 10 for r in rows[3:])  # of the same noise: alike
    assert (tmp_path / "table.md").read_text().count("\n| 1 | ") == 2
    assert {p.name for p in tmp_path.glob("*.png")} == {"grid.png", "clips.png"}


@pytest.mark.slow
def test_a_sampler_with_times_of_its_own_makes_the_pipelines_clips_at_the_pipelines_times(model, tmp_path):
    clips = Clips(tmp_path, model, clips=2, batch_size=2)
    requests = [("a red circle moving right", 1), ("a blue square moving left", 2)]
    arm = sampler.Arm("rcm-sde", 2)
    ours, _, _ = sampler.own_maker(clips, arm)(requests)
    theirs, _, _ = sampler.maker(clips, arm)(requests)
    # One program is fused otherwise than the other: the last bit of a pixel may differ.
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2
    other, _, _ = sampler.own_maker(clips, sampler.Arm("rcm-sde", 2, sampler.LATE))(requests)
    assert np.abs(np.asarray(other, int) - np.asarray(theirs, int)).max() > 2


def test_a_description_compares_clip_by_clip():
    base = {"prompt": "a red circle moving left", "seed": 0, "colour": 1, "shape": 1, "motion": 1, "place": None}
    timed = {"dit": 0.1, "vae": 0.2}
    dense = [{**base, **timed, "fit": fit} for fit in (20.0, 30.0)]
    sparse = [{**base, **timed, "fit": fit, "psnr": 25.0, "shape": 0} for fit in (19.0, 29.0)]
    columns = describe(sparse, dense)
    assert columns["change of fit"] == "-1.0 [-1.0, -1.0]"
    assert columns["all right"].startswith("0%")
    assert columns["agreement, dB"].startswith("25.0")


EXPERIMENTS = (sparsity_steps, ladder, attention_error, attention_mass, quantisation, sampler, training)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda module: module.__name__.split(".")[-1])
def test_a_smoke_run_of_each_with_the_shipped_model(experiment, tmp_path):
    experiment.main(["--quick", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows
    assert (tmp_path / "table.md").read_text().startswith("|")
    assert list(tmp_path.glob("*.png"))
    # A second run finds everything measured and measures nothing.
    experiment.main(["--quick", "--out", str(tmp_path)])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
