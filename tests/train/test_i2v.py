"""Image to video for the small model: what it learns from, where it starts, and how it is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_modules import random_module

from turbojax.config import DiTConfig, VAEConfig
from turbojax.models.dit import WanDiT
from turbojax.programs import image_condition
from turbojax.train import data, i2v, i2v_data, i2v_evaluate
from turbojax.train.student import Networks

CONFIG = DiTConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, in_channels=4, out_channels=4, text_dim=8)
VAE = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
RNG = np.random.default_rng(0)


def draw(step, count):
    rng = np.random.default_rng(step)

    def normal(*shape):
        return rng.standard_normal((count, *shape), np.float32)

    return i2v.Drawn(normal(2, 8, 8, 4), normal(4, 8), normal(2, 8, 8, 8))


class Stub:
    """Clips of noise."""

    empty = np.zeros((1, 4, 8), np.float32)
    draw = staticmethod(draw)


def stage(**changes):
    config = i2v.I2VConfig(**{"part": "high", "steps": 8, "batch": 2, **changes})
    grown = i2v.grow(random_module(CONFIG, "float32"))
    assert isinstance(grown, WanDiT)
    return i2v.I2VStage(config, Networks(grown, config.attention), Stub())


def test_the_grown_network_does_not_look_at_the_picture_yet():
    teacher = random_module(CONFIG, "float32")
    grown = i2v.grow(teacher)
    assert grown.config == dataclasses.replace(CONFIG, in_channels=12)
    drawn = draw(0, 2)
    inputs = np.concatenate([drawn.latents, drawn.condition], -1)
    t = np.array([900.0, 10.0], np.float32)
    ours, theirs = grown(inputs, t, drawn.context), teacher(drawn.latents, t, drawn.context)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda state: jnp.sum(nnx.merge(nnx.graphdef(grown), state)(inputs, t, drawn.context) ** 2))(
        nnx.state(grown)
    )
    assert np.abs(grads["patch_embedding"]["kernel"][...][16:]).max() > 0  # but it can learn to


@pytest.mark.parametrize("changes", [{}, {"distil": True, "guidance": 2.0, "part": "low"}])
def test_training_brings_the_loss_down_and_reads_the_picture(changes):
    it = stage(**changes)
    step, state = jax.jit(it.step), it.init()
    seen = []
    for _ in range(8):  # the same batch and noise: a descent direction must descend
        state, metrics = step(state, it.batch(0), jax.random.key(0))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0]
    batch = it.batch(0)
    other = batch._replace(condition=batch.condition[::-1])
    losses = [float(step(state, b, jax.random.key(0))[1]["loss"]) for b in (batch, other)]
    assert losses[0] != losses[1]


def test_each_expert_learns_its_side_of_the_boundary():
    keys = jax.random.split(jax.random.key(0), 2)
    s = {part: np.asarray(i2v.rf_time(i2v.TIMES[part].draw(keys[0], 4000))) for part in ("shared", "high", "low")}
    assert s["high"].min() >= i2v.BOUNDARY - 1e-6
    assert s["low"].max() <= i2v.BOUNDARY + 1e-6
    # Together they see what one network would: the same density of levels on either side.
    middle = s["shared"][s["shared"] < i2v.BOUNDARY]
    assert abs(np.median(middle) - np.median(s["low"])) < 0.03
    assert s["high"].max() > 0.999


def test_every_clip_of_a_picture_starts_with_it_and_stays_in_the_frame():
    drawn = i2v_data.pictures(3, 40)
    assert {c.motion for p in drawn for c in p.clips} == set(data.MOTIONS)
    assert max(len(p.clips) for p in drawn) >= 3
    for picture in drawn:
        assert not i2v_data.is_new_place(picture.scene)
        image = picture.render()
        assert len({clip.motion for clip in picture.clips}) == len(picture.clips)
        for clip in picture.clips:
            assert (clip.colour, clip.shape, clip.motion) not in data.HELD_OUT
            video = data.render(clip)
            np.testing.assert_array_equal(video[0], image)
            assert (video[:, [0, -1]] == clip.background).all()
            assert (video[:, :, [0, -1]] == clip.background).all()
            assert i2v_data.TRAVEL[0] <= clip.speed * (data.FRAMES - 1) <= i2v_data.TRAVEL[1] + 1e-6


def test_pictures_are_encoded_as_the_pipeline_does_and_a_second_run_reads_them(tmp_path, monkeypatch):
    vae = random_module(VAE, "float32")
    monkeypatch.setattr(data, "FRAMES", 5)
    monkeypatch.setattr(i2v_data, "SHARD", 2)
    drawn = i2v_data.pictures(4, 4)
    encoded = i2v_data.encode_pictures(drawn, vae, tmp_path, whole=3, batch=2)
    exact = np.asarray(image_condition(vae, jnp.stack([p.render() for p in drawn]), 5))
    np.testing.assert_allclose(encoded[:3], exact[:3], atol=2e-3)  # float16
    np.testing.assert_allclose(encoded[3, 0], exact[3, 0], atol=2e-3)
    assert any(np.array_equal(encoded[3, 1:], other) for other in encoded[:3, 1:])
    monkeypatch.setattr(i2v_data, "image_condition", None)
    np.testing.assert_array_equal(i2v_data.encode_pictures(drawn, vae, tmp_path, whole=3, batch=2), encoded)


def test_evaluation_asks_for_what_training_never_saw():
    requests = i2v_evaluate.wanted(60, seed=1)
    assert sum(len(r.clips) for r in requests) == 60
    for request in requests:
        scene = request.picture.scene
        assert i2v_data.is_new_place(scene) == (request.kind == "new place")
        radius = scene.radius / (0.85 if scene.shape == "triangle" else 1.0)
        trained = i2v_data.RADIUS[0] <= radius <= i2v_data.RADIUS[1]
        assert trained == (request.kind != "new size")
        for prompt, clip in request.clips:
            assert clip.motion in prompt.split()
    prompts = [prompt for r in requests for prompt, _ in r.clips]
    assert any(prompt.startswith("the circle moves") for prompt in prompts)


def test_scores_tell_right_clips_from_wrong_ones():
    request = next(r for r in i2v_evaluate.wanted(20) if len(r.clips) == 2)
    image = request.picture.render()
    (prompt, asked), (_, other) = request.clips

    def score(frames):
        return i2v_evaluate.score(frames, image, asked, prompt, 0, request.kind)

    right, wrong = score(data.render(asked)), score(data.render(other))
    assert (right.colour, right.shape, right.motion) == (True, True, True)
    assert right.first_frame > 50
    assert wrong.colour
    assert not wrong.motion
    shifted = score(np.roll(data.render(asked), 12, axis=1))
    assert shifted.first_frame < 25
    summary = i2v_evaluate.summarise([right, wrong])
    assert (summary["clips"], summary["colour"], summary["motion"]) == (2, 1.0, 0.5)
