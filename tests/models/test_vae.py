"""The VAE computes what Wan's own code and diffusers compute, whole or streamed, and streams in bounded memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import seeded
from golden.modules import module_with, relative
from random_modules import random_module

from turbojax.config import VAEConfig
from turbojax.models import vae_layers
from turbojax.models.vae import WanVAE

CONFIG = VAEConfig(base_dim=8, z_dim=4, latents_mean=(0.3, -0.2, 0.1, -0.4), latents_std=(1.5, 0.8, 2.0, 1.2))
# Quick to compile: 2x in time and in space.
SHALLOW = dataclasses.replace(CONFIG, base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
# name: (batch, frames, height, width), as in golden/make_vae.py
CASES = {"one": (2, 1, 16, 24), "five": (1, 5, 24, 40), "nine": (1, 9, 16, 24)}


def from_torch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kernels (O, I, *window) -> (*window, I, O); gammas (C, 1, 1, 1) -> (C,)."""
    ours = {}
    for name, w in weights.items():
        if name.endswith(".weight"):
            ours[name.removesuffix("weight") + "kernel"] = np.moveaxis(w, (0, 1), (-1, -2))
        else:
            ours[name] = w.reshape(-1)
    return ours


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def inputs(case: str) -> tuple[np.ndarray, np.ndarray]:
    batch, frames, height, width = CASES[case]
    video = seeded.uniform(f"{case}/video", (batch, 3, frames, height, width), scale=0.5)
    z = seeded.uniform(f"{case}/z", (batch, CONFIG.z_dim, 1 + (frames - 1) // 4, height // 8, width // 8))
    return channels_last(video), channels_last(z)


@pytest.fixture(scope="module")
def golden() -> tuple[WanVAE, dict[str, np.ndarray]]:
    shapes, arrays = seeded.load("vae")
    arrays = {name: channels_last(a) for name, a in arrays.items()}
    return module_with(CONFIG, from_torch(seeded.weights(shapes))), arrays


@pytest.mark.parametrize("case", CASES)
def test_equals_wan_and_diffusers(golden, case):
    vae, arrays = golden
    video, z = inputs(case)
    encoded, decoded = vae.encode(video), vae.decode(z, clamp=False)
    clamped = jnp.clip(decoded, -1, 1)
    # Float32 sums in another order, through forty layers.
    assert relative(encoded, arrays[f"{case}/encoded_wan"]) < 2e-5
    assert relative(encoded, arrays[f"{case}/encoded_diffusers"]) < 2e-5
    assert relative(decoded, arrays[f"{case}/decoded_wan"]) < 2e-5
    assert relative(clamped, arrays[f"{case}/decoded_diffusers"]) < 2e-5


def test_streams_give_the_references_result_too(golden):
    vae, arrays = golden
    video, z = inputs("nine")
    assert relative(vae.encode_streamed(video), arrays["nine/encoded_wan"]) < 2e-5
    # The default clamps, as diffusers does; this case has pixels beyond the range.
    assert np.abs(arrays["nine/decoded_wan"]).max() > 1.05
    assert relative(vae.decode_streamed(z), arrays["nine/decoded_diffusers"]) < 2e-5


def test_streamed_equals_whole_over_many_chunks():
    vae = random_module(SHALLOW)
    video = np.random.default_rng(0).uniform(-1, 1, (2, 13, 16, 8, 3)).astype(np.float32)
    z = np.asarray(vae.encode(video))
    assert z.shape == (2, 7, 8, 4, 4)
    np.testing.assert_allclose(vae.encode_streamed(video), z, atol=1e-5, rtol=0)
    whole = np.asarray(vae.decode(z, clamp=False))
    assert whole.shape == video.shape
    assert np.std(whole) > 1e-2
    np.testing.assert_allclose(vae.decode_streamed(z, clamp=False), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_streamed_memory_does_not_grow_with_frames(direction):
    vae = random_module(SHALLOW)
    graphdef, state = nnx.split(vae)

    def working_bytes(method: str, chunks: int) -> int:
        """Everything the compiled program holds beside its input and output."""
        shape = (1, 1 + 2 * chunks, 32, 32, 3) if direction == "encode" else (1, 1 + chunks, 16, 16, 4)
        run = jax.jit(lambda state, x: getattr(nnx.merge(graphdef, state), method)(x))
        compiled = run.lower(state, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (working_bytes(f"{direction}_streamed", n) for n in (3, 12))
    out_growth = 9 * 16 * 16 * 4 * 4 if direction == "encode" else 18 * 32 * 32 * 3 * 4
    # The loop may hold its output once more while it is written.
    assert many - few <= 1.1 * out_growth
    whole_few, whole_many = (working_bytes(direction, n) for n in (3, 12))
    assert whole_many > 2 * whole_few
    assert many < whole_many / 2


def test_bfloat16_keeps_norms_in_float32_and_follows_the_dtype_of_its_input():
    vae32, vae16 = random_module(SHALLOW), random_module(SHALLOW, "bfloat16")
    kinds = {path[-1]: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(vae16))}
    assert kinds == {"gamma": jnp.float32, "kernel": jnp.bfloat16, "bias": jnp.bfloat16}
    video = np.random.default_rng(0).uniform(-1, 1, (1, 3, 8, 8, 3)).astype(np.float32)
    z32, z16 = vae32.encode(video), vae16.encode(video)
    assert z16.dtype == jnp.float32
    half = jax.ShapeDtypeStruct(video.shape, jnp.bfloat16)
    assert jax.eval_shape(vae16.encode_streamed, half).dtype == jnp.bfloat16
    # 8 bits of mantissa at each of a dozen layers.
    assert 0 < relative(z16, z32) < 0.05


def test_attention_over_frames_one_at_a_time_changes_nothing(monkeypatch):
    layer = vae_layers.Attention(6, rngs=nnx.Rngs(0), dtype=jnp.float32)
    layer.norm.gamma[...] = jnp.linspace(0.5, 1.5, 6)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4, 5, 6)), jnp.float32)
    at_once = layer(x)[0]
    assert np.abs(np.asarray(at_once - x)).max() > 0.1
    for most in (1, 2 * 20**2):  # one frame, two frames at a time
        monkeypatch.setattr(vae_layers, "_MAX_SCORES", most)
        np.testing.assert_allclose(layer(x)[0], at_once, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 16, 16, 3), r"4 frames: the VAE takes 4n \+ 1"),
        ((1, 5, 12, 16, 3), "size 16x12: width and height must be multiples of 8"),
        ((1, 5, 16, 16, 4), r"expected video \[B, T, H, W, 3\], got shape \(1, 5, 16, 16, 4\)"),
        ((5, 16, 16, 3), r"expected video .* got shape \(5, 16, 16, 3\)"),
        ((0, 5, 16, 16, 3), "expected video"),
    ],
)
def test_a_video_that_does_not_fit_is_named(golden, shape, message):
    for encode in (golden[0].encode, golden[0].encode_streamed):
        with pytest.raises(ValueError, match=message):
            encode(np.zeros(shape, np.float32))


@pytest.mark.usefixtures("unchecked")
def test_latents_and_pixels_of_the_wrong_kind_are_named(golden):
    vae = golden[0]
    with pytest.raises(ValueError, match=r"expected latents \[B, t, h, w, 4\], got shape \(1, 2, 2, 2, 16\)"):
        vae.decode(np.zeros((1, 2, 2, 2, 16), np.float32))
    with pytest.raises(ValueError, match=r"got uint8; map uint8 to x / 127.5 - 1"):
        vae.encode(np.zeros((1, 1, 8, 8, 3), np.uint8))
