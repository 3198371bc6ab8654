"""A whole pipeline of random weights, small enough to run in a test: every parameter drawn, none at its first value."""

import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.checkpoint import abstract_module, save_component
from turbojax.config import DiTConfig, UMT5Config, VAEConfig
from turbojax.pipeline import Pipeline
from turbojax.pipeline_config import PipelineConfig
from turbojax.tokenizer import Tokenizer, train_tiny_tokenizer

DIT = DiTConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16)
VAE = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
TEXT = UMT5Config(vocab_size=16, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1)
DEFAULTS = {"text_len": 8, "size": (32, 48), "frames": 5, "steps": 3, "guidance": (2.0, 2.0)}


def config(**changes: Any) -> PipelineConfig:
    return PipelineConfig.from_preset("tiny", **{**DEFAULTS, **changes})


def module(shape: Any, seed: str, dtype: str = "float32") -> Any:
    """A module of that shape whose parameters are all random, so that none of them can be left out unnoticed."""
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    graph, state = nnx.split(abstract_module(shape, dtype))

    def drawn(path: tuple[Any, ...], spec: Any) -> Any:
        around = 1.0 if path[-1] in ("scale", "gamma") else 0.0
        fan_in = np.prod(spec.shape[1 if path[0] == "blocks" else 0 : -1], initial=1.0)
        values = around + rng.standard_normal(spec.shape) * (0.1 if len(spec.shape) < 2 else fan_in**-0.5)
        return spec.replace(jnp.asarray(values, spec.dtype))

    filled = [(path, drawn(path, spec)) for path, spec in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def tokenizer(text_len: int = DEFAULTS["text_len"]) -> Tokenizer:
    return train_tiny_tokenizer(["a red circle moving right", "a blue square moving left"], text_len)


def pipeline(dit: DiTConfig = DIT, **changes: Any) -> Pipeline:
    settings = config(**changes)
    low = {} if settings.boundary is None else {"dit_low": module(dit, "low")}
    parts = {"vae": module(VAE, "vae"), "text_encoder": module(TEXT, "text"), "tokenizer": tokenizer(settings.text_len)}
    return Pipeline(settings, dit=module(dit, "dit"), **low, **parts, name="small")


def save(pipe: Pipeline, folder: Path) -> Path:
    """The pipeline as `turbojax convert` lays it out."""
    folder.mkdir()
    (folder / "pipeline.json").write_text(pipe.spec.config.to_json())
    for part in ("dit", "dit_low", "vae", "text_encoder"):
        if getattr(pipe, part) is not None:
            save_component(folder / part, getattr(pipe, part), format="safetensors")
    pipe.tokenizer.save(folder / "tokenizer")
    return folder
