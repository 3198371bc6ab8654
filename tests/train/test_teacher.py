"""The loop resumes exactly, the stage learns, and a state of another run is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.config import DiTConfig
from turbojax.tokenizer import Tokenizer
from turbojax.train import data, launch, loop
from turbojax.train.flow import add_noise, sample_noise_levels, velocity_errors
from turbojax.train.optimizer import OptimizerConfig, schedule
from turbojax.train.teacher import SHIPPED_TOKENIZER, Teacher, TeacherConfig, export

SMALL = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64)


@pytest.fixture(scope="module")
def stage():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((12, 2, 4, 4, 16)).astype(np.float16)
    combinations = [data.TRAINED[i] for i in range(12)]
    config = TeacherConfig(steps=6, batch=4, dit=SMALL, optimizer=OptimizerConfig(warmup=2))
    return Teacher(config, latents, combinations, Tokenizer.load(SHIPPED_TOKENIZER, 8))


def test_a_killed_run_ends_with_the_same_bits(stage, tmp_path):
    whole = loop.run(stage, loop.LoopConfig(steps=6, out=str(tmp_path / "whole"), log_every=2))
    loop.run(stage, loop.LoopConfig(steps=3, out=str(tmp_path / "parts"), log_every=2))
    resumed = loop.run(stage, loop.LoopConfig(steps=6, out=str(tmp_path / "parts"), log_every=2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_every_clip_is_seen_once_an_epoch(stage):
    epoch = [stage.batch(step).latents for step in range(3)]
    first_numbers = sorted(float(z[0, 0, 0, 0]) for batch in epoch for z in batch)
    assert first_numbers == sorted(float(z[0, 0, 0, 0]) for z in stage.latents)


def test_captions_are_dropped_as_often_as_asked(stage):
    rng = np.random.default_rng(0)
    empty = len(stage.captions.ids) - 1
    drawn = [stage.captions.draw(rng, data.TRAINED[0], 0.25) for _ in range(800)]
    assert np.mean(np.asarray(drawn) == empty) == pytest.approx(0.25, abs=0.05)  # 3 standard errors
    ids, mask = stage.tokenizer("")
    np.testing.assert_array_equal(stage.captions.ids[empty], ids[0])
    assert mask.sum() == 1


def test_a_step_whose_gradients_are_not_finite_changes_nothing(stage):
    state = stage.init()
    batch = stage.batch(0)
    broken = batch._replace(latents=np.full_like(batch.latents, np.inf))
    after, metrics = jax.jit(stage.step)(state, broken, jax.random.key(0))
    assert int(metrics["skipped"]) == 1
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_perfect_velocity_has_no_error_and_the_noise_levels_are_shifted():
    key = jax.random.key(0)
    latents, noise = jax.random.normal(key, (2, 8, 1, 2, 2, 3))
    s = sample_noise_levels(key, 8, 3.0)
    assert ((s > 0) & (s < 1)).all()
    # Stratified: one level in each eighth of the unshifted range.
    even = s / (3.0 - 2.0 * s)
    assert (jnp.floor(even * 8) == jnp.arange(8)).all()
    np.testing.assert_allclose(velocity_errors(lambda x, t: noise - latents, latents, noise, s), 0.0)
    np.testing.assert_allclose(add_noise(latents, noise, jnp.ones(8)), noise)


def test_the_learning_rate_warms_up_holds_and_ends_at_zero():
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup=10, hold=0.5), 100)
    assert float(rate(0)) == 0.0
    assert float(rate(10)) == float(rate(49)) == 1.0
    assert float(rate(75)) == pytest.approx(0.5, abs=0.01)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-6)


def test_a_second_run_starts_from_the_average_of_the_first(stage, tmp_path):
    first = loop.run(stage, loop.LoopConfig(steps=2, out=str(tmp_path / "first")))
    for a, b in zip(
        jax.tree.leaves(launch._earlier_teacher(tmp_path / "first", stage)), jax.tree.leaves(first.ema), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # Exported, they are rounded to what the model keeps.
    export(stage, first, tmp_path / "exported")
    exported = launch._earlier_teacher(tmp_path / "exported", stage)
    assert jax.tree.structure(exported) == jax.tree.structure(first.ema)
    np.testing.assert_allclose(
        exported["dit"]["blocks"]["ffn"]["up"]["kernel"].astype(jnp.float32),
        first.ema["dit"]["blocks"]["ffn"]["up"]["kernel"],
        rtol=2**-8,
    )
