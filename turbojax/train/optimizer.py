"""Muon for the matrices of the transformer blocks, Adam for everything else, with a warm-up and a cosine end."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon


@dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate is held after `warmup` steps until `hold` of `steps`, then falls to zero along a cosine."""

    learning_rate: float = 2e-3
    warmup: int = 100
    hold: float = 0.5
    clip: float = 1.0
    weight_decay: float = 0.01
    # Size of a Muon update relative to Adam's: 0.2 sqrt(width) matches Adam (arXiv:2502.16982); 1.5x was better here.
    muon_scale: float = 0.3
    ema: float = 0.998


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    hold = max(config.warmup, int(config.hold * steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup),
            optax.constant_schedule(config.learning_rate),
            optax.cosine_decay_schedule(config.learning_rate, max(1, steps - hold)),
        ],
        [config.warmup, hold],
    )


def block_matrices(params: PyTree) -> PyTree:
    """Muon's view of a parameter tree: the last two axes of stacked block kernels; None where Adam steps."""

    def dimensions(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = jax.tree_util.keystr(path)
        if "blocks" in names and "kernel" in names and leaf.ndim == 3:
            return MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping, then Muon and Adam; a step whose gradients are not finite is skipped and counted."""
    optimizer = muon(
        schedule(config, steps),
        weight_decay=config.weight_decay,
        adam_b1=0.9,
        adam_b2=0.98,
        consistent_rms=config.muon_scale,
        muon_weight_dimension_numbers=block_matrices,
    )
    return optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(config.clip), optimizer), max_consecutive_errors=100
    )
