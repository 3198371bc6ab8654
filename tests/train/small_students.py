"""Networks and clips small enough that a stage compiles in seconds; shared by the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.attention import AttentionConfig
from turbojax.config import DiTConfig
from turbojax.models.dit import WanDiT
from turbojax.train.sla import SLAConfig, SLAStage
from turbojax.train.student import AdamConfig, Drawn, Networks

DIT = DiTConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8)
SPARSE = AttentionConfig("sla", topk=0.5, block_q=4, block_k=2)
ADAM = AdamConfig(1e-3, warmup=1)


def networks(attention=SPARSE, remat="none", config=DIT):
    teacher = WanDiT(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    # Wan starts with a head of zeros: nothing would reach the losses.
    teacher.head.kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), teacher.head.kernel.shape)
    return Networks(teacher, attention, remat)


class Noise:
    """Clips of noise, of so many latent frames."""

    empty = np.zeros((1, 4, 8), np.float32)

    def __init__(self, frames=2):
        self.frames = frames

    def draw(self, step, count):
        rng = np.random.default_rng(step)
        latents = rng.standard_normal((count, self.frames, 4, 4, 16), np.float32)
        return Drawn(latents, rng.standard_normal((count, 4, 8), np.float32))


def sla_stage(remat="none", **changes):
    config = SLAConfig(**{"steps": 4, "batch": 4, "attention": SPARSE, "optimizer": ADAM, **changes})
    return SLAStage(config, networks(config.attention, remat), Noise())
