"""The linear codec is a projection whose latents mean the same in the first frame as later."""

import dataclasses

import numpy as np
import pytest

from turbojax.train import data
from turbojax.train.pca import PCALatents, fit_pca_latents


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.stack([data.render(s, frames=9) for s in data.clips(3, 24)])


@pytest.fixture(scope="module")
def pca(clips) -> PCALatents:
    return fit_pca_latents(clips)


def test_decode_inverts_encode_on_what_the_codec_can_draw(pca):
    z = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 16)).astype(np.float32)
    video = pca.decode(z)
    assert video.shape == (2, 9, 32, 40, 3)
    np.testing.assert_allclose(pca.encode(video), z, atol=2e-4)


def test_a_still_scene_has_nearly_the_same_latents_in_every_frame(pca, clips):
    still = data.to_float(np.repeat(clips[:, :1], 9, axis=1))
    z = np.asarray(pca.encode(still))
    np.testing.assert_allclose(z[:, 1], z[:, 2], atol=1e-5)
    # The first frame's basis spans other directions, so only most of it can agree: without the rotation between
    # the two bases nothing would, and this would be above 1.
    assert np.square(z[:, 0] - z[:, 1]).sum() < 0.25 * np.square(z[:, 1]).sum()


def test_latents_have_unit_scale_with_faint_channels_left_faint(pca, clips):
    z = np.asarray(pca.encode(data.to_float(clips))).reshape(-1, 16)
    # Float32 sums over the clips that the codec was fitted to.
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-3)
    std = z.std(0)
    assert std.max() == pytest.approx(1, abs=1e-3)
    assert (std <= 1.001).all()
    floored = std < 0.999
    assert floored.any()
    # Where the floor holds, the scale is std_floor times the strongest channel's: pixels per unit agree.
    gain = np.linalg.norm(np.asarray(pca.rest_decode), axis=1)
    np.testing.assert_allclose(gain[floored], 0.2 * gain.max(), rtol=1e-3)


def test_more_channels_draw_better(clips):
    video = data.to_float(clips)
    errors = [
        float(np.square(np.asarray(codec.decode(codec.encode(video))) - video).mean())
        for codec in (fit_pca_latents(clips, channels=c) for c in (4, 16))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_the_file_gives_back_the_codec_and_names_what_it_lacks(pca, tmp_path):
    pca.save(tmp_path / "pca.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["pca.npz"]
    loaded = PCALatents.load(tmp_path / "pca.npz")
    for field in dataclasses.fields(PCALatents):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(pca, field.name))
    np.savez(tmp_path / "other.npz", offset=np.zeros(16))
    with pytest.raises(ValueError, match=r"other.npz: not a PCA codec, it lacks first_centre"):
        PCALatents.load(tmp_path / "other.npz")
