"""A run of a small regression, as a program: what the tests of resuming start, kill and start again.

python tests/train/toy_run.py OUT STEPS SECONDS_PER_STEP
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.train import loop

WIDTH = 512


class Toy:
    """Momentum descent on noisy targets; large enough that a checkpoint takes a while to write."""

    def __init__(self, pause: float = 0.0):
        self.pause = pause

    def init(self):
        return {"weights": jnp.zeros((WIDTH, WIDTH)), "momentum": jnp.zeros((WIDTH, WIDTH)), "count": jnp.int32(0)}

    def batch(self, step):
        time.sleep(self.pause)
        return np.random.default_rng(step).standard_normal((8, WIDTH)).astype(np.float32)

    def step(self, state, batch, key):
        target = batch + jax.random.normal(key, batch.shape)
        loss, gradient = jax.value_and_grad(lambda w: jnp.mean((batch @ w - target) ** 2))(state["weights"])
        momentum = 0.9 * state["momentum"] + gradient
        weights = state["weights"] - 0.1 * momentum
        return {"weights": weights, "momentum": momentum, "count": state["count"] + 1}, {"loss": loss}


def run(out, steps, pause=0.0):
    return loop.run(Toy(pause), loop.LoopConfig(steps, str(out), seed=3, log_every=1, checkpoint_every=0.0))


if __name__ == "__main__":
    final = run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    np.savez(f"{sys.argv[1]}/final.npz", **{k: np.asarray(v) for k, v in final.items()})
