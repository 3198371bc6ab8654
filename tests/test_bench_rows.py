"""The benchmark's random weights are like a trained model's: how fast kernels run depends on what they multiply."""

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.bench_rows import draw


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
