"""Whole experiments: what they plan, write and find again."""

import dataclasses
import functools
import json
from types import SimpleNamespace
from typing import Any

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
from experiments.clips import describe, read, requests
from turbojax.pipeline import Pipeline
from turbojax.train import data, i2v_evaluate
from turbojax.video import Video

pytestmark = pytest.mark.filterwarnings("ignore:.*never learned the words")


@pytest.fixture(autouse=True)
def plain_jax(monkeypatch):
    """The scripts' main functions without the process-wide settings of a program."""
    monkeypatch.setattr("experiments.command.use_compilation_cache", lambda: None)
    monkeypatch.setattr("experiments.command.keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def loaded():
    """Models as the first run that asked for them left them: with the programs that it compiled."""
    return functools.cache(Pipeline.load)


@pytest.fixture(autouse=True)
def load_once(monkeypatch, loaded):
    monkeypatch.setattr(Pipeline, "load", loaded)


class Painter:
    """In a pipeline's place: draws what it is asked for, with grain where attention leaves keys out."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, seed, batch_size, attention, steps, **_):
        self.asked.append((steps, attention.topk, tuple(seed)))
        clips = []
        for prompt, number in zip(prompts, seed, strict=True):
            _, colour, shape, _, motion = prompt.split()
            (scene,) = data.clips(number, 1, [(colour, shape, motion)])
            grain = 20 * (1 - attention.topk) * np.random.default_rng(number).standard_normal((17, 128, 128, 1))
            frames = np.clip(data.render(scene) + grain, 0, 255).astype(np.uint8)
            clips.append(Video(frames, fps=8, timings={"dit": 0.1 * batch_size, "vae": 0.2 * batch_size}))
        return clips


def test_a_sweep_writes_rows_a_table_and_pictures_and_goes_on_where_it_stopped(monkeypatch, tmp_path):
    painter = Painter()
    monkeypatch.setattr(Pipeline, "load", lambda model: painter)
    grid = ["--out", str(tmp_path), "--steps", "1", "--clips", "3", "--batch-size", "2"]
    sparsity_steps.main([*grid, "--topk", "1"])
    first = (tmp_path / "results.jsonl").read_text()
    sparsity_steps.main([*grid, "--topk", "0.5,1"])
    text = (tmp_path / "results.jsonl").read_text()
    assert text.startswith(first)
    assert [(topk, len(seeds)) for _, topk, seeds in painter.asked] == [(1.0, 2), (1.0, 1), (0.5, 2), (0.5, 1)]
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(r["topk"], r["clip"]) for r in rows] == [(t, i) for t in (1.0, 0.5) for i in range(3)]
    assert [r["prompt"] for r in rows[:3]] == [r["prompt"] for r in rows[3:]]
    assert all(r["colour"] and r["shape"] and r["motion"] for r in rows[:3])
    assert all(
        26 < r["psnr"] < 30 for r in rows[3:]
    )  # grain of 10 levels is 28 dB, a little less of it clipped at black
    table = (tmp_path / "table.md").read_text()
    assert "| 1 | 1.0 | 100% [44, 100] |" in table
    assert table.count("\n| 1 | ") == 2
    assert "| 0.1 | 0.2 |" in table  # seconds a clip
    assert {p.name for p in tmp_path.glob("*.png")} == {"grid.png", "clips.png"}


def test_a_model_that_takes_a_picture_is_asked_with_drawn_ones():
    spec: Any = SimpleNamespace(takes_image=True)
    scenes = [scene for w in i2v_evaluate.wanted(3) for _, scene in w.clips]
    for request, scene in zip(requests(spec, 3), scenes, strict=True):
        row = read(data.render(scene), request)  # the clip that was wanted
        assert (row["colour"], row["shape"], row["motion"]) == (1, 1, 1)
        assert row["first frame"] > 40
        assert row["prompt"] == request.prompt


@pytest.mark.slow
def test_a_sweep_of_a_model_that_takes_a_picture(tmp_path):
    dit = dataclasses.replace(small_pipeline.DIT, in_channels=12)
    sampling = {"sampler": "rcm-sde", "guidance": (1.0, 1.0), "size": (32, 32)}
    model = small_pipeline.save(small_pipeline.pipeline(dit, **sampling), tmp_path / "model")
    grid = ["--steps", "1", "--topk", "1", "--clips", "2", "--out", str(tmp_path / "out"), "--model", str(model)]
    sparsity_steps.main(grid)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["first frame"] > 0 for row in rows)


def test_arms_start_from_the_models_own_sampler_and_none_is_made_twice():
    own = small_pipeline.config(sampler="rcm-sde", mid_times=sampler.MID_TIMES["paper"])
    planned = sampler.arms((1, 4), (40.0, 80.0), own)
    assert planned[0] == sampler.Arm("rcm-sde", 1, own.mid_times, own.sigma_max)
    assert len(set(planned)) == len(planned)
    assert {arm.mid_times for arm in planned if arm.steps == 4} == set(sampler.MID_TIMES.values())
    assert {arm.sigma_max for arm in planned} == {40.0, 80.0}


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
