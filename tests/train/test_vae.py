"""Each part of the VAE's training moves what it should and nothing else, and can be cut off and resumed."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from turbojax.checkpoint import load_component
from turbojax.config import VAEConfig
from turbojax.train import data
from turbojax.train import vae as training
from turbojax.train.loop import LoopConfig
from turbojax.train.vae import Phase, TrainVAEConfig, VAEStage, phase_of, train_vae, training_batch
from turbojax.train.vae_measure import measure, psnr

# The whole depth (the codec fixes 8x in space, 4x in time), as narrow as it goes.
MODEL = VAEConfig(
    base_dim=2, z_dim=4, num_res_blocks=1, dim_mult=(1, 1, 1, 1), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
)
SMALL = (Phase(1.0, 2, 5, 32),)


def config(part, out, **changes) -> TrainVAEConfig:
    settings = {"model": MODEL, "steps": 4, "warmup": 1, "phases": SMALL, "pca_clips": 4, "eval_clips": 1}
    return TrainVAEConfig(part, out, **settings | {"eval_every": 100} | changes)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    out = tmp_path_factory.mktemp("codec")
    report = train_vae(config("pca", out))
    # Four components of 768: blurred, but a picture.
    assert 15 < report["pca"]["psnr"] < 40
    return training.PCALatents.load(out / "pca.npz"), out / "pca.npz"


def moved(before, after) -> set[str]:
    """The top-level parts of the VAE that differ between two parameter trees."""
    pairs = zip(nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True)
    return {path[0] for (path, a), (_, b) in pairs if np.abs(np.asarray(a[...] - b[...])).max() > 0}


@pytest.mark.parametrize(
    ("part", "parts"),
    [
        ("decoder", {"decoder", "post_quant_conv"}),
        ("encoder", {"encoder", "quant_conv"}),
        pytest.param(
            "joint", {"encoder", "quant_conv", "decoder", "post_quant_conv"}, marks=pytest.mark.slow, id="joint"
        ),
        pytest.param("polish", {"decoder", "post_quant_conv"}, marks=pytest.mark.slow, id="polish"),
    ],
)
def test_each_part_moves_its_own_parameters_downhill(codec, tmp_path, part, parts):
    stage = VAEStage(config(part, tmp_path, latent_noise=0.0, learning_rate=0.02, steps=12), codec[0])
    state = start = stage.init()
    step = jax.jit(stage.step)
    losses = []
    for _ in range(6):  # the same batch each time: the loss must fall
        state, metrics = step(state, jnp.asarray(stage.batch(0)), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert moved(start.params, state.params) == parts
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.slow
def test_a_run_cut_off_and_resumed_equals_one_that_was_not(codec, tmp_path, monkeypatch):
    whole = train_vae(config("decoder", tmp_path / "whole", pca=codec[1]))

    def cut(stage, step, taken=VAEStage.batch):
        if step == 2:
            raise KeyboardInterrupt
        return taken(stage, step)

    again = config("decoder", tmp_path / "cut", pca=codec[1])
    with monkeypatch.context() as patch:
        patch.setattr(VAEStage, "batch", cut)
        patch.setattr(training.loop, "LoopConfig", partial(LoopConfig, checkpoint_every=0.0))
        with pytest.raises(KeyboardInterrupt):
            train_vae(again)
    assert train_vae(again) == whole
    lines = [json.loads(x) for x in (tmp_path / "cut/decoder/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert np.asarray(Image.open(tmp_path / "cut/decoder/sheet.png")).shape == (3 * 128, 6 * 128, 3)
    assert load_component(tmp_path / "cut/decoder/vae").config == MODEL
    # The joint part starts where this one ended, and takes from it only what it trained.
    joint = VAEStage(config("joint", tmp_path / "cut", pca=codec[1]), codec[0])
    assert moved(joint.init().params, joint._params) == {"decoder", "post_quant_conv"}


def test_a_batch_follows_from_seed_and_step_and_shows_a_shape():
    phase = Phase(1.0, 6, 5, 64)
    batch = training_batch(0, 7, phase)
    assert batch.shape == (6, 5, 64, 64, 3)
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch, training_batch(0, 7, phase))
    for other in (training_batch(0, 8, phase), training_batch(1, 7, phase)):
        assert (other != batch).mean() > 0.2
    coloured = np.ptp(batch.astype(int), axis=-1) > 60  # backgrounds are grey
    assert (coloured.mean(axis=(1, 2, 3)) > 0.03).all()


def test_phases_take_their_shares_in_turn():
    phases = (Phase(0.5, 4, 5, 64), Phase(0.25, 2, 9, 64), Phase(0.25, 1, 17, 128))
    taken = [phases.index(phase_of(phases, step, 8)) for step in range(8)]
    assert taken == [0, 0, 0, 0, 1, 1, 2, 2]


def test_psnr_against_its_definition():
    true = np.full((2, 5, 16, 16, 3), 100, np.uint8)
    off = true.copy()
    off[1, 0, 0] += 10  # the first frame's top row
    assert psnr(true + np.uint8(1), true)[0] == pytest.approx(20 * np.log10(255), abs=1e-3)
    found = measure(off[1:], true[1:])
    first = 10 * np.log10(255**2 / (100 * 16 / 256))
    assert found["psnr_first"] == pytest.approx(first, abs=1e-3)
    assert found["psnr"] == pytest.approx(first + 10 * np.log10(5), abs=1e-3)
    # 192 of 256 pixels lie within 4 of the border.
    assert found["psnr_first_border"] == pytest.approx(first + 10 * np.log10(192 / 256), abs=1e-3)
    assert found["psnr_last"] > 80


def test_unseen_clips_are_of_every_combination():
    clips = training.unseen_clips(3)
    assert clips.shape == (3, data.FRAMES, data.SIZE, data.SIZE, 3)
    assert not any(np.array_equal(a, b) for a, b in ((clips[0], clips[1]), (clips[1], clips[2])))
