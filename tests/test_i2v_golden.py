"""Image to video equals the references: TurboDiffusion's preprocessing, conditioning and 4-step loop over two experts,
and Wan 2.2's guided loop. Weights go the whole way, from files in Wan's names through the conversion."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import seeded
from golden.modules import relative
from safetensors.numpy import save_file

from convert import convert_checkpoint
from turbojax.attention import DENSE
from turbojax.checkpoint import load_component
from turbojax.config import PRESETS
from turbojax.image import adaptive_size, resize_image
from turbojax.pipeline_config import PipelineConfig, PipelineSpec
from turbojax.programs import denoise, encode_image
from turbojax.settings import resolve


@pytest.fixture(scope="module")
def golden():
    return seeded.load("i2v")


@pytest.fixture(scope="module")
def parts(golden, tmp_path_factory):
    """dit, dit_low and vae in float32."""
    folder = tmp_path_factory.mktemp("i2v")
    shapes = golden[0]
    dit = {k: v for k, v in shapes.items() if not k.startswith("vae/")}
    vae = {k.removeprefix("vae/"): v for k, v in shapes.items() if k.startswith("vae/")}
    drawn = {
        "dit": {k.split("/")[1]: v for k, v in seeded.weights({f"high/{k}": v for k, v in dit.items()}).items()},
        "dit_low": {k.split("/")[1]: v for k, v in seeded.weights({f"low/{k}": v for k, v in dit.items()}).items()},
        "vae": seeded.weights(vae),
    }
    modules = {}
    for name, weights in drawn.items():
        save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / f"{name}.safetensors")
        convert_checkpoint(folder / f"{name}.safetensors", folder / name, format="safetensors", progress=False)
        modules[name] = load_component(folder / name, "float32")
    return modules


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), -4, -1)


def sample(parts, condition, steps_noise, **options) -> tuple[np.ndarray, np.ndarray]:
    """(latents, one number of every state on the way) of the pipeline's own program."""
    preset = PRESETS["wan2.2-i2v-a14b"]
    spec = PipelineSpec(
        "i2v", PipelineConfig.from_preset("wan2.2-i2v-a14b"), preset.dit, preset.vae, preset.text_encoder
    )
    settings = resolve(spec, size=(48, 32), frames=5, **options)
    assert (settings.boundary, settings.attention) == (0.9, DENSE)
    graphs, states = zip(*(nnx.split(parts[name]) for name in ("dit", "dit_low")), strict=True)
    context, null = (jnp.asarray(seeded.uniform(f"i2v/{name}", (1, 24, 32))) for name in ("context", "null"))
    noise = channels_last(seeded.uniform("i2v/noise", (1, 16, 2, 4, 6)))
    seen = []
    run = partial(denoise, graphdefs=graphs, settings=settings, tick=lambda x: seen.append(float(x)))
    latents = run(states, context, null if settings.guided else None, condition, noise, steps_noise)
    return np.asarray(latents), np.asarray(seen)


def test_condition_equals_turbodiffusions(parts, golden):
    graph, state = nnx.split(parts["vae"])
    ours = encode_image(state, jnp.asarray(golden[1]["picture"]), graphdef=graph, frames=5, batch=1)
    theirs = channels_last(golden[1]["y"])
    np.testing.assert_array_equal(ours[..., :4], theirs[..., :4])
    assert relative(ours[..., 4:], theirs[..., 4:]) < 2e-5  # float32 sums in another order


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_four_steps_of_two_experts_equal_turbodiffusions(parts, golden, mode):
    arrays = golden[1]
    step_noise = channels_last(arrays["step_noise"]) if mode == "sde" else None
    options = {"sampler": f"rcm-{mode}", "steps": 4, "guidance": 1.0}
    latents, seen = sample(parts, channels_last(arrays["y"]), step_noise, **options)
    # Their rotary tables are float32. The wrong expert in one step would show at 1.
    assert relative(latents, channels_last(arrays[mode][-1])) < 5e-4
    np.testing.assert_allclose(seen, arrays[mode][1:, 0, 0, 0, 0, 0], rtol=2e-3, atol=2e-3)


def test_guided_unipc_of_two_experts_equals_wans(parts, golden):
    arrays = golden[1]
    options = {"steps": 6, "shift": 5.0, "guidance": (3.5, 2.0)}
    latents, seen = sample(parts, channels_last(arrays["y"]), None, **options)
    assert relative(latents, channels_last(arrays["unipc"])) < 2e-4
    assert len(seen) == 6


def test_wans_velocities_along_its_own_path(parts, golden):
    """Each expert alone, with guidance, at the states that Wan 2.2 went through."""
    from turbojax.samplers import flow

    arrays = golden[1]
    solver = flow.unipc_solver(6, 5.0)
    contexts = [jnp.asarray(seeded.uniform(f"i2v/{name}", (1, 24, 32))) for name in ("context", "null")]
    y = channels_last(arrays["y"])
    state = solver.start(jnp.asarray(channels_last(seeded.uniform("i2v/noise", (1, 16, 2, 4, 6)))))
    assert (solver.times >= 0.9).tolist() == [True] * 3 + [False] * 3
    for s, row, theirs in zip(solver.times, solver.table, channels_last(arrays["velocities"]), strict=True):
        dit, guidance = (parts["dit"], 2.0) if s >= 0.9 else (parts["dit_low"], 3.5)
        inputs = jnp.concatenate([state.x, y], axis=-1)
        cond, uncond = (dit(inputs, jnp.full(1, 1000 * s, jnp.float32), c) for c in contexts)
        assert relative(uncond + guidance * (cond - uncond), theirs[None]) < 2e-4
        state = solver.step(state, jnp.asarray(theirs[None]), row)


def test_resizing_equals_torchvisions(golden):
    for name, theirs in golden[1].items():
        if name.startswith("resized"):
            width, height = map(int, name.split("_")[1:])
            ours = resize_image(golden[1]["large"], (width, height)).astype(int)
            assert np.abs(ours - theirs).max() <= 1  # rounded once here, after each of the two passes there
            assert np.abs(ours - theirs).mean() < 0.3


def test_adaptive_sizes_equal_turbodiffusions(golden):
    for *picture, width, height, wanted_width, wanted_height in golden[1]["adaptive"].reshape(-1, 6).tolist():
        assert adaptive_size(tuple(picture), width * height, 16) == (wanted_width, wanted_height)
