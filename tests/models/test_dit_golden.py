"""The DiT computes what Wan's own code and diffusers compute, every parameter random, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import seeded
from golden.modules import module_with, relative

from turbojax.attention import AttentionConfig
from turbojax.config import DiTConfig
from turbojax.models.dit import WanDiT
from turbojax.samplers import rcm

# Names inside Wan's block, for our own.
LINEARS = {
    **{f"{a}.{x}": f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"},
    "ffn.0": "ffn.up",
    "ffn.2": "ffn.down",
    "self_attn.attn_op.local_attn.proj_l": "self_attn.proj_l",  # SLA's, where there is one
}
NORMS = {f"{a}.{n}": f"{a}.{n}" for a in ("self_attn", "cross_attn") for n in ("norm_q", "norm_k")} | {
    "norm3": "cross_norm"
}
OUTER = {
    "text_embedding.0": "text_embedding.linear_1",
    "text_embedding.2": "text_embedding.linear_2",
    "time_embedding.0": "time_embedding.linear_1",
    "time_embedding.2": "time_embedding.linear_2",
    "time_projection.1": "time_projection",
    "head.head": "head",
    "patch_embedding": "patch_embedding",
}


def from_wan(weights: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Our flat names: (out, in) turned to (in, out), layers stacked, the patch convolution flattened."""

    def linear(theirs: str, ours: str) -> dict[str, np.ndarray]:
        weight = weights[f"{theirs}.weight"]
        return {f"{ours}.kernel": weight.reshape(weight.shape[0], -1).T, f"{ours}.bias": weights[f"{theirs}.bias"]}

    def block(i: int) -> dict[str, np.ndarray]:
        found = {"modulation": weights[f"blocks.{i}.modulation"][0]}
        for theirs, ours in LINEARS.items():
            if f"blocks.{i}.{theirs}.weight" in weights:
                found |= linear(f"blocks.{i}.{theirs}", ours)
        for theirs, ours in NORMS.items():
            found[f"{ours}.scale"] = weights[f"blocks.{i}.{theirs}.weight"]
        return found | {"cross_norm.bias": weights[f"blocks.{i}.norm3.bias"]}

    blocks = [block(i) for i in range(layers)]
    flat = {f"blocks.{k}": np.stack([b[k] for b in blocks]) for k in blocks[0]}
    for theirs, ours in OUTER.items():
        flat |= linear(theirs, ours)
    return flat | {"head_modulation": weights["head.modulation"][0]}


def load(name: str, dim: int, channels: int, *, sla: bool = False) -> tuple[WanDiT, dict[str, np.ndarray]]:
    shapes, golden = seeded.load(name)
    config = DiTConfig(
        dim=dim, ffn_dim=160, num_heads=2, num_layers=2, in_channels=channels, text_dim=32, linear_branch=sla
    )
    return module_with(config, from_wan(seeded.weights(shapes), config.num_layers)), golden


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -4, -1)


@pytest.mark.parametrize(("case", "dim", "channels"), [("t2v_48", 96, 16), ("t2v_128", 256, 16), ("i2v_48", 96, 36)])
def test_equals_wan_and_diffusers(case, dim, channels):
    model, golden = load(f"dit_{case}", dim, channels)
    latents = channels_last(seeded.uniform(f"{case}/latents", (2, channels, 3, 8, 12)))
    context = seeded.uniform(f"{case}/context", (2, 24, 32))
    out = jax.jit(lambda *args: model(*args))(latents, golden["timesteps"], context)
    assert out.dtype == jnp.float32
    # Float32 sums in another order.
    assert relative(out, channels_last(golden["wan"])) < 1e-5
    # diffusers forms the angles of the time embedding in float32, which is worth 3e-6 here.
    assert relative(out, channels_last(golden["diffusers"])) < 2e-5


@pytest.mark.parametrize("mode", rcm.MODES)
def test_rcm_walks_turbodiffusions_states_through_its_own_network(mode):
    model, golden = load("rcm_dit", 256, 16)
    noise = channels_last(seeded.uniform("rcm/noise", (1, 16, 3, 8, 8)))
    context = jnp.asarray(seeded.uniform("rcm/context", (1, 24, 32)))
    states = []

    @jax.jit
    def velocity(x, timestep):
        return model(x, timestep, context)

    rcm.sample(
        lambda x, s: velocity(x, jnp.full((1,), 1000 * s, jnp.float32)),
        noise,
        channels_last(golden["step_noise"]) if mode == "sde" else None,
        num_steps=4,
        sigma_max=80.0,
        mode=mode,
        on_step=lambda i, x: states.append(x),
    )
    theirs = golden["sde"][1:] if mode == "sde" else golden["ode"][None]
    for ours, reference in zip(states[-len(theirs) :], theirs, strict=True):
        # Their rotary tables are float32 and their state is float64.
        assert relative(ours, channels_last(reference)) < 5e-5


def test_sparse_linear_attention_equals_turbodiffusions_network():
    """Routing, both branches and the projection between them, inside the whole network."""
    model, golden = load("dit_sla", 256, 16, sla=True)
    latents = channels_last(seeded.uniform("dit_sla/latents", (1, 16, 3, 16, 24)))
    context = seeded.uniform("dit_sla/context", (1, 24, 32))
    config = AttentionConfig(kind="sla", topk=0.5, block_q=64, block_k=64)
    out = jax.jit(lambda *args: model(*args, attention=config))(latents, np.array([640.5], np.float32), context)
    # Float32 on both sides, their kernel with an online softmax; a different block would show at 1e-2.
    assert relative(out, channels_last(golden["output"])) < 2e-5
