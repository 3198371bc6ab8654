"""Checkpoints in, folders that `turbojax.load` and `Pipeline.load` read out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from convert.assemble import read_component
from convert.errors import CheckpointError
from convert.lora import apply_lora
from convert.merge import merge
from convert.progress import byte_progress
from convert.tokenizer import convert_tokenizer
from turbojax.checkpoint import Format, new_folder, quantized_layout, save_component
from turbojax.component import Component
from turbojax.config import PRESETS, DiTConfig, UMT5Config, VAEConfig
from turbojax.pipeline_config import PipelineConfig

Loras = Sequence[tuple[str | Path, float]]


def convert_checkpoint(
    source: str | Path,
    out_dir: str | Path,
    *,
    model: str | None = None,
    prefix: str | None = None,
    dtype: DTypeLike | None = None,
    lora: Loras = (),
    format: Format = "orbax",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Component:
    """Convert one component: a file, a folder of shards, or a converted folder that is to change.

    Kind and config are inferred from names and shapes; `model` names the preset that overrides them. prefix: which
    of several models in one file. dtype: cast to it what does not always stay float32; None keeps the file's
    precision, and a load then casts to the module's. lora: (file, strength) pairs to merge.
    progress: show a bar; None: only on a terminal. Nothing is left at `out_dir` unless all went well.
    Raises CheckpointError, or UserError when `out_dir` cannot be written.
    """
    component = _prepared(source, model, prefix, dtype, lora)
    with byte_progress(component.nbytes, Path(source).name, progress) as done:
        save_component(out_dir, component, format=format, overwrite=overwrite, progress=done)
    return component


def merge_checkpoints(
    base: str | Path,
    target_base: str | Path,
    target: str | Path,
    out_dir: str | Path,
    *,
    weight: float = 1.0,
    format: Format = "orbax",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Component:
    """Write base + weight * (target - target_base); each is a converted folder or a checkpoint. See `convert.merge`."""
    component = merge(*(read_component(path) for path in (base, target_base, target)), weight=weight)
    with byte_progress(component.nbytes, Path(out_dir).name, progress) as done:
        save_component(out_dir, component, format=format, overwrite=overwrite, progress=done)
    return component


def convert_pipeline(
    *,
    dit: str | Path,
    vae: str | Path,
    text_encoder: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    dit_low: str | Path | None = None,
    model: str | None = None,
    dtype: DTypeLike | None = None,
    lora: Loras = (),
    lora_low: Loras = (),
    format: Format = "orbax",
    overwrite: bool = False,
    progress: bool | None = None,
) -> PipelineConfig:
    """Convert every part of a model into one folder that `Pipeline.load` reads.

    dit_low: the low-noise expert of the two-expert models. model: the preset; None: the one whose DiT has the
    shape of `dit`. lora, lora_low: (file, strength) pairs for each expert. Raises as `convert_checkpoint`.
    """
    parts: dict[str, tuple[Any, type, Loras]] = {"dit": (dit, DiTConfig, lora)}
    if dit_low is not None:
        parts["dit_low"] = (dit_low, DiTConfig, lora_low)
    parts |= {"vae": (vae, VAEConfig, ()), "text_encoder": (text_encoder, UMT5Config, ())}
    components: dict[str, Component] = {}
    for part, (source, kind, loras) in parts.items():
        components[part] = _prepared(source, None, None, dtype, loras)
        if type(components[part].config) is not kind:
            raise CheckpointError(f"{source}: holds a {type(components[part].config).__name__}, not the {part}")
    config = _pipeline_config(components, model)
    with new_folder(out, overwrite=overwrite) as folder:
        total = sum(component.nbytes for component in components.values())
        with byte_progress(total, Path(out).name, progress) as done:
            words = convert_tokenizer(tokenizer, folder / "tokenizer")
            words.check_fits(components["text_encoder"].config)
            for part, component in components.items():
                save_component(folder / part, component, format=format, progress=done)
        (folder / "pipeline.json").write_text(config.to_json(), encoding="utf-8")
    return config


def _prepared(source: str | Path, model: str | None, prefix: str | None, dtype: Any, lora: Loras) -> Component:
    component = read_component(source, model=model, prefix=prefix, dtype=dtype)
    for file, strength in lora:
        component = apply_lora(component, file, strength)
    return component


def _pipeline_config(components: dict[str, Component], model: str | None) -> PipelineConfig:
    dit = components["dit"].config
    assert isinstance(dit, DiTConfig)
    if "dit_low" in components and components["dit_low"].config != dit:
        raise CheckpointError("the two experts differ in shape: --dit and --dit-low belong to different models")
    experts = "dit_low" in components
    plain = dataclasses.replace(dit, linear_branch=False)
    if model is None:
        fitting = [n for n, p in PRESETS.items() if p.dit == plain and (p.boundary is not None) == experts]
        if not fitting:
            raise CheckpointError(
                f"no preset has a DiT of this shape with {'two experts' if experts else 'one expert'}: {plain}; "
                f"name the closest with --model ({', '.join(PRESETS)})"
            )
        model = fitting[0]
    elif model not in PRESETS:
        raise CheckpointError(f"unknown model {model!r}; known: {', '.join(PRESETS)}")
    if (PRESETS[model].boundary is not None) != experts:
        raise CheckpointError(
            f"{model} has {'one expert' if experts else 'two experts: name the other with --dit-low'}"
        )
    # Weights that are int8 already cannot run in any other way.
    quant = "w8a8" if quantized_layout(components["dit"].leaves) else "none"
    if not dit.linear_branch:
        return PipelineConfig.from_preset(model, quant=quant)
    # A TurboDiffusion checkpoint: distilled to few steps without guidance, trained with sparse-linear attention.
    return PipelineConfig.from_preset(
        model, sampler="rcm-sde", steps=4, guidance=(1.0, 1.0), attention="sagesla", round_timestep=True, quant=quant
    )
