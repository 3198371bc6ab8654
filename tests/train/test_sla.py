"""SLA fine-tuning: where it starts, what may move, and that the loss is the distance to the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.small_students import sla_stage

from turbojax.attention import AttentionConfig
from turbojax.train import sla
from turbojax.train.trigflow import LogNormal

WHOLE, SPARSE = (AttentionConfig("sla", topk=k, block_q=4, block_k=2) for k in (1.0, 0.25))


def stage(attention=SPARSE, **changes):
    return sla_stage(**{"steps": 8, "batch": 2, "attention": attention, **changes})


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
