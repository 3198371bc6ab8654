"""The benchmark's random weights are like a trained model's: how fast kernels run depends on what they multiply."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_pipeline
from flax import nnx

from turbojax import bench_rows
from turbojax.attention import AttentionConfig
from turbojax.bench_rows import ROWS, draw, latent_shape, measure, padded_text, sampler
from turbojax.config import PRESETS

SMALL = dataclasses.replace(
    PRESETS["tiny"], dit=small_pipeline.DIT, vae=small_pipeline.VAE, text_len=512, size=(32, 32), frames=1
)


def test_random_weights_are_like_trained_ones():
    abstract = {
        "up": {"weight_q": jax.ShapeDtypeStruct((2, 96, 256), jnp.int8)},
        "norm_q": {"scale": jax.ShapeDtypeStruct((2, 128), jnp.float32)},
    }
    drawn, other = draw(abstract), draw(abstract, seed=1)
    int8, scale = np.asarray(drawn["up"]["weight_q"], np.float32), np.asarray(drawn["norm_q"]["scale"])
    assert (np.abs(int8).max(axis=-1) == 127).all(), "each row is rounded by its largest"
    # Of 256 Gaussians the largest is 2 to 4.5 deviations out.
    assert 127 / 4.5 < int8.std() < 127 / 2
    assert abs(scale.mean() - 1) < 0.1
    assert (int8 != np.asarray(other["up"]["weight_q"])).any(), "two experts have weights of their own"


@pytest.mark.parametrize("guided", [False, True])
def test_a_folded_prompt_is_the_padded_one(guided):
    """The rungs compute what they would from all 512 rows, to float32 rounding."""
    graphdef, state = nnx.split(small_pipeline.module(SMALL.dit, "dit"))
    run = jax.jit(sampler(SMALL, graphdef, AttentionConfig("dense"), guided, False))
    shape = latent_shape(SMALL, SMALL.size, SMALL.frames)
    noise, *step_noise = np.random.default_rng(0).standard_normal((5, *shape), np.float32)
    text = padded_text(SMALL, 120)
    assert (np.asarray(text[:, 119:], np.float32) == 0).all()
    assert (np.asarray(text[:, :119], np.float32) != 0).any(axis=-1).all()
    whole, folded = (run((state,), noise, jnp.stack(step_noise), text[:, :n], None) for n in (512, 120))
    assert float(jnp.linalg.norm(folded - whole) / jnp.linalg.norm(whole)) < 1e-5


@pytest.mark.parametrize("guided", [False, True])
def test_keys_of_the_text_are_made_once_for_all_steps(guided):
    """Outside of every loop."""
    graphdef, state = nnx.split(small_pipeline.module(SMALL.dit, "dit"))
    noise, *step_noise = np.zeros((5, *latent_shape(SMALL, SMALL.size, SMALL.frames)), np.float32)
    run = sampler(SMALL, graphdef, AttentionConfig("dense"), guided, False)
    program = jax.make_jaxpr(run)((state,), noise, np.stack(step_noise), padded_text(SMALL, 120), None)
    assert [step.params.get("name") for step in program.eqns].count("_text_keys") == 1
    assert str(program).count("name=_text_keys") == 1


def test_rungs_are_given_the_rows_that_are_asked_for_and_the_baseline_all(monkeypatch):
    monkeypatch.setitem(bench_rows.PRESETS, "small", SMALL)
    monkeypatch.setattr(bench_rows, "random_dit", lambda *_: (None, None))
    monkeypatch.setattr(bench_rows, "_rung", lambda *arguments: {"text": arguments[6][2].shape[1]})
    row = bench_rows.Row("small", SMALL.size)
    for options, rows in (({}, 120), ({"text_rows": 512}, 512)):
        found = measure("small", row, {"dense": (AttentionConfig("dense"), False)}, 1, True, **options)
        assert (found["text_rows"], found["baseline"], found["dense"]) == (rows, {"text": 512}, {"text": rows})


@pytest.mark.parametrize("rows", ["0", "513"])
def test_rows_that_the_text_has_not_are_refused(rows, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_rows", "--rows", next(iter(ROWS)), "--text-rows", rows])
    with pytest.raises(SystemExit):
        bench_rows.main()
    assert "--text-rows must be from 1 to 512" in capsys.readouterr().err
