"""`turbojax evaluate`: models side by side on the same noise, and intervals that mean what they say."""

import dataclasses
import json

import numpy as np
import pytest
import small_pipeline

from turbojax.cli import main
from turbojax.cli_evaluate import read_prompts, subject
from turbojax.errors import UserError
from turbojax.train import data
from turbojax.train.evaluate import Score, bootstrap, compare, score, summarise


@pytest.fixture(scope="module")
def scores():
    """Every prompt as an ideal clip shows it."""
    rng = np.random.default_rng(0)
    return [score(data.render(data.sample_scene(rng, c)), c, seed=0) for c in data.COMBINATIONS]


def test_the_bootstrap_covers_the_mean_as_often_as_it_should():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        sample = rng.standard_normal(80)
        low, high = bootstrap(80, lambda rows, sample=sample: float(sample[rows].mean()), draws=200)
        hits += low <= 0.0 <= high
    assert 0.89 < hits / 200 < 0.99  # 95%, three standard errors of 200 trials


def test_a_model_compared_with_itself_differs_by_nothing(scores):
    same = compare(scores, scores)
    assert same["shape"] == same["fit"] == 0.0
    assert same["shape_interval"] == [0.0, 0.0]
    assert same["diversity"] == 1.0


def test_a_worse_model_is_told_by_how_much_and_with_its_interval(scores):
    worse = [dataclasses.replace(s, shape=i % 4 > 0, fit=s.fit - 2.0) for i, s in enumerate(scores)]
    found = compare(worse, scores)
    assert found["shape"] == -25.0
    assert found["shape_interval"][0] < -25.0 < found["shape_interval"][1] < 0.0
    # Two dB everywhere: pairing leaves no width.
    assert found["fit_interval"] == [found["fit"]] * 2 == [-2.0, -2.0]
    stuck = [dataclasses.replace(s, place=(64.0, 64.0, 20.0, 2.0, 30.0)) for s in scores]
    assert compare(stuck, scores)["diversity"] == 0.0
    with pytest.raises(ValueError, match="same prompts"):
        compare(scores[1:], scores[:-1])


def test_summary_has_an_interval_for_every_figure(scores):
    report = summarise(scores, [30.0 + i % 3 for i in range(len(scores))])
    for name in ("colour", "shape", "motion", "held_out_shape", "fit", "overlap", "agreement", "diversity"):
        low, high = report[name + "_interval"]
        assert low <= report[name] <= high, name
    assert report["agreement"] == 31.0


def test_a_clip_without_a_shape_counts_as_a_miss_but_not_as_variety(scores):
    unread = Score(scores[0].prompt, 9, False, False, False, False, 0.0, 0.0, None)
    assert summarise([*scores, unread])["diversity"] == summarise(scores)["diversity"]
    assert summarise([*scores, unread])["colour"] < 1.0


def test_settings_of_a_model_go_before_the_flags():
    assert subject("tiny:steps=2,quant=none", {"steps": 4, "topk": 0.1}).options == {
        "steps": 2, "quant": "none", "topk": 0.1,
    }  # fmt: skip
    assert subject("tiny", {"steps": 4}).options == {"steps": 4}
    for text, told in {"tiny:stepz=2": "stepz=2", "tiny:steps=two": "cannot be 'two'"}.items():
        with pytest.raises(UserError, match=told):
            subject(text, {})


def test_prompts_may_be_worded_freely_but_must_say_all_three(tmp_path):
    (tmp_path / "p.txt").write_text("Look: a red circle, moving right!\n\n")
    assert read_prompts(tmp_path / "p.txt") == {"Look: a red circle, moving right!": ("red", "circle", "right")}
    (tmp_path / "p.txt").write_text("a red circle\n")
    with pytest.raises(UserError, match="must name one colour"):
        read_prompts(tmp_path / "p.txt")
    assert len(read_prompts(None)) == 48


def test_models_stand_side_by_side_on_the_same_noise(tmp_path, capsys):
    folder = small_pipeline.save(small_pipeline.pipeline(size=(32, 32)), tmp_path / "small")
    (tmp_path / "p.txt").write_text("a red circle moving right\na blue square moving left\n")
    command = ["evaluate", "--out", str(tmp_path / "out"), "--seeds", "2", "--prompts", str(tmp_path / "p.txt")]
    command += [
        "--batch-size",
        "2",
        "--reference",
        str(folder),
        "--model",
        str(folder),
        "--model",
        f"{folder}:guidance=1",
    ]
    assert main(command) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    first, second = summary["models"]
    assert summary["reference"] == first["model"] == str(folder)
    assert "agreement" not in first
    assert second["clips"] == 4
    assert second["settings"]["guidance"] == [1.0, 1.0]
    assert set(second["compared"]) >= {"colour", "fit", "diversity_interval"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["seed"]) for r in rows[::2]] == [(r["prompt"], r["seed"]) for r in rows[1::2]]
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n") == 4
    assert (tmp_path / "out" / "sheet-1.png").exists()
