"""The sparse attention that a model is swept with."""

from __future__ import annotations

import math

from turbojax.attention import AttentionConfig
from turbojax.pipeline_config import SAMPLERS, PipelineSpec


def own_attention(spec: PipelineSpec) -> AttentionConfig:
    """What the model samples with, if that is sparse; else SageSLA in blocks that suit the length of its clips.

    128 x 64, the published blocks, would cut a clip of a few hundred tokens into five: 16 x 8 there.
    """
    config = spec.config
    if config.attention in ("sla", "sagesla"):
        return AttentionConfig(
            kind=config.attention,  # pyright: ignore[reportArgumentType] (one of the two)
            topk=config.topk, block_q=config.block_q, block_k=config.block_k,
        )  # fmt: skip
    block_q, block_k = (128, 64) if tokens(spec) > 4096 else (16, 8)
    return AttentionConfig("sagesla", topk=0.25, block_q=block_q, block_k=block_k)


def tokens(spec: PipelineSpec) -> int:
    """Tokens of a clip of the model's default size."""
    (width, height), unit = spec.config.size, spec.size_unit
    frames = (spec.config.frames - 1) // spec.vae.temporal_stride + 1
    return frames // spec.dit.patch_size[0] * math.ceil(width / unit) * math.ceil(height / unit)


def few_steps(spec: PipelineSpec) -> bool:
    """Whether the model was distilled to a few steps."""
    return SAMPLERS[spec.config.sampler].distilled
