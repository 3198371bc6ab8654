"""SLA fine-tuning: where it starts, what may move, and that the loss is the distance to the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turbojax.attention import AttentionConfig
from turbojax.config import DiTConfig
from turbojax.models.dit import WanDiT
from turbojax.train import sla
from turbojax.train.student import AdamConfig, Drawn, Networks
from turbojax.train.trigflow import LogNormal

CONFIG = DiTConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8)
WHOLE, SPARSE = (AttentionConfig("sla", topk=k, block_q=4, block_k=2) for k in (1.0, 0.25))


def networks(attention):
    teacher = WanDiT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    # Wan starts with a head of zeros: nothing would reach the loss.
    teacher.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), teacher.head.kernel.shape)
    return Networks(teacher, attention)


class Stub:
    """Clips of noise."""

    empty = np.zeros((1, 4, 8), np.float32)

    def draw(self, step, count):
        rng = np.random.default_rng(step)
        latents = rng.standard_normal((count, 2, 4, 4, 16), np.float32)
        return Drawn(latents, rng.standard_normal((count, 4, 8), np.float32))


def stage(attention=SPARSE, **changes):
    config = sla.SLAConfig(steps=8, batch=2, attention=attention, optimizer=AdamConfig(1e-3, warmup=1), **changes)
    return sla.SLAStage(config, networks(attention), Stub())


def test_student_of_all_blocks_starts_as_its_teacher():
    def distance(it):
        return np.asarray(jax.jit(it.losses)(it.init().params, it.batch(0), jax.random.key(0)))

    np.testing.assert_allclose(distance(stage(WHOLE)), 0, atol=1e-9)
    assert (distance(stage()) > 1e-6).all()


def test_white_box_loss_is_the_mean_squared_distance():
    x = jnp.ones((3, 1, 2, 2, 4))
    losses = sla.white_box_losses(lambda x, t: 2 * x, lambda x, t: 5 * x, x, x, jnp.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(losses, 9.0, rtol=1e-6)


@pytest.mark.parametrize(("what", "moves"), [("attention", "self_attn"), ("proj_l", "proj_l")])
def test_only_what_is_named_moves(what, moves):
    it = stage(trained=what)
    before = it.init()
    step = jax.jit(it.step)
    state, _ = step(before, it.batch(0), jax.random.key(0))
    state, _ = step(state, it.batch(1), jax.random.key(1))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before.params), jax.tree.leaves(state.params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        # A bias of keys shifts every score alike and never has a gradient; weight decay leaves zeros alone.
        if "['k']['bias']" not in name and "['q']['bias']" not in name:
            assert bool(np.any(old != new)) == (moves in name), name


@pytest.mark.parametrize("loss", ["white_box", "black_box"])
def test_fine_tuning_brings_the_loss_down(loss):
    it = stage(loss=loss, guidance=3.0, times=LogNormal(0.0, 1.0))
    step, state = jax.jit(it.step), it.init()
    seen = []
    for _ in range(8):  # the same batch and noise: a descent direction must descend
        state, metrics = step(state, it.batch(0), jax.random.key(0))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0]
