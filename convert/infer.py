"""The shape of a model, from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from convert.errors import CheckpointError
from convert.source import Source
from convert.tables import DIT, SLA, UMT5, Naming
from convert.tensors import StoredTensor
from turbojax import config as configs
from turbojax.config import (
    PRESETS,
    WAN_LATENTS_MEAN,
    WAN_LATENTS_STD,
    ComponentConfig,
    ComponentKind,
    DiTConfig,
    UMT5Config,
    VAEConfig,
)

Tensors = Mapping[str, StoredTensor]
# Written into the header of what turbojax exports: what shapes alone do not tell.
METADATA_KEY = "turbojax.config"
_HEAD_DIM = 128  # of every released Wan model


def infer_config(
    kind: ComponentKind, naming: Naming, tensors: Tensors, source: Source, model: str | None = None
) -> ComponentConfig:
    """The config of a recognised checkpoint; `model` names the preset to take it from instead."""
    if model is not None:
        preset = PRESETS[model]
        return _like(preset, kind, naming, tensors)
    exported = _exported(source)
    if exported is not None and type(exported) is _TYPES[kind]:
        return exported
    return _INFER[kind](naming, tensors, source)


_TYPES: Mapping[str, type] = {"dit": DiTConfig, "vae": VAEConfig, "umt5": UMT5Config}


def _like(preset: configs.Preset, kind: ComponentKind, naming: Naming, tensors: Tensors) -> ComponentConfig:
    if kind == "dit":
        return dataclasses.replace(preset.dit, linear_branch=_has_sla(naming, tensors))
    return preset.vae if kind == "vae" else preset.text_encoder


def _exported(source: Source) -> ComponentConfig | None:
    text = source.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        return configs.from_json(text)
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{source.path}: its {METADATA_KEY} metadata is damaged: {str(error)[:80]}") from error


def _shape_of(tensors: Tensors, source: Source) -> Callable[[str, int], tuple[int, ...]]:
    """(name, rank) -> shape; CheckpointError when it is not there or of another rank."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{source.path}: lacks {name}, without which the model's shape cannot be told")
        found = tensors[name].shape
        if len(found) != rank or 0 in found:
            raise CheckpointError(f"{source.path}: {name} has shape {list(found)}, not {rank} dimensions")
        return found

    return shape


def _layers(pattern: str, tensors: Tensors, source: Source) -> int:
    """Layers are numbered 0 .. n-1 without a gap."""
    regex = re.compile(pattern)
    numbers = {int(match[1]) for name in tensors if (match := regex.match(name))}
    if len(numbers) != max(numbers, default=-1) + 1:
        missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
        raise CheckpointError(f"{source.path}: layer {missing} is missing of {max(numbers) + 1}")
    return len(numbers)


def _has_sla(naming: Naming, tensors: Tensors) -> bool:
    return naming == "wan" and f"{SLA.wan.replace('{i}', '0')}.weight" in tensors


def _dit(naming: Naming, tensors: Tensors, source: Source) -> DiTConfig:
    shape = _shape_of(tensors, source)
    name = {row.ours: str(getattr(row, naming)).replace("{i}", "0") for row in DIT}
    (dim,) = shape(f"{name['patch_embedding']}.bias", 1)
    patch = tensors.get(f"{name['patch_embedding']}.weight")
    if patch is not None and len(patch.shape) == 5:
        in_channels, patch_size = patch.shape[1], patch.shape[2:]
    else:
        features = shape(f"{name['patch_embedding']}.weight", 2)[1]
        in_channels, patch_size = features // 4, (1, 2, 2)
    linear_branch = _has_sla(naming, tensors)
    head_dim = shape(f"{SLA.wan.replace('{i}', '0')}.weight", 2)[0] if linear_branch else None
    volume = patch_size[0] * patch_size[1] * patch_size[2]
    return _made(
        source,
        lambda: DiTConfig(
            dim=dim,
            ffn_dim=shape(f"{name['blocks.ffn.up']}.bias", 1)[0],
            num_heads=_heads(dim, head_dim, source),
            num_layers=_layers(r"blocks\.(\d{1,4})\.", tensors, source),
            in_channels=in_channels,
            out_channels=shape(f"{name['head']}.bias", 1)[0] // max(1, volume),
            text_dim=shape(f"{name['text_embedding.linear_1']}.weight", 2)[1],
            freq_dim=shape(f"{name['time_embedding.linear_1']}.weight", 2)[1],
            patch_size=patch_size,
            linear_branch=linear_branch,
        ),
    )


def _heads(dim: int, head_dim: int | None, source: Source) -> int:
    """Heads leave no trace in the weights, except in SLA's proj_l."""
    if head_dim is not None and dim % head_dim == 0:
        return dim // head_dim
    for key in ("num_heads", "num_attention_heads"):
        heads = source.config.get(key)
        # Wan and diffusers both call other models' heads so: believe it for a model as wide as this one.
        width = source.config.get("dim", None if key == "num_heads" else heads_width(source.config))
        if type(heads) is int and heads > 0 and dim % heads == 0 and width == dim:
            return heads
    if dim % _HEAD_DIM == 0:
        return dim // _HEAD_DIM
    raise CheckpointError(
        f"{source.path}: a width of {dim} is no multiple of {_HEAD_DIM}, so the number of heads cannot be told; "
        "put a config.json with dim and num_heads beside it"
    )


def heads_width(config: Mapping[str, Any]) -> int | None:
    """Width that a diffusers config describes."""
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    return heads * width if type(heads) is int and type(width) is int else None


def _umt5(naming: Naming, tensors: Tensors, source: Source) -> UMT5Config:
    shape = _shape_of(tensors, source)
    name = {row.ours: str(getattr(row, naming)).replace("{i}", "0") for row in UMT5}
    vocab_size, dim = shape(f"{name['token_embedding']}.weight", 2)
    num_buckets, num_heads = shape(f"{name['blocks.position_bias']}.weight", 2)
    layers = r"blocks\.(\d{1,4})\." if naming == "wan" else r"encoder\.block\.(\d{1,4})\."
    return _made(
        source,
        lambda: UMT5Config(
            vocab_size=vocab_size,
            dim=dim,
            dim_attn=shape(f"{name['blocks.attn.q']}.weight", 2)[0],
            dim_ffn=shape(f"{name['blocks.ffn.up']}.weight", 2)[0],
            num_heads=num_heads,
            num_layers=_layers(layers, tensors, source),
            num_buckets=num_buckets,
            max_distance=_whole(source, "relative_attention_max_distance", UMT5Config.max_distance),
        ),
    )


def _whole(source: Source, key: str, default: int) -> int:
    value = source.config.get(key, default)
    return value if type(value) is int else default


def _vae(naming: Naming, tensors: Tensors, source: Source) -> VAEConfig:
    """The encoder's blocks, numbered through: residual blocks until a resampler ends the stage."""
    shape = _shape_of(tensors, source)
    blocks = "encoder.downsamples" if naming == "wan" else "encoder.down_blocks"
    out_conv = "residual.6" if naming == "wan" else "conv2"
    (base_dim,) = shape(f"encoder.{'conv1' if naming == 'wan' else 'conv_in'}.bias", 1)
    (z_dim,) = shape(f"{'conv2' if naming == 'wan' else 'post_quant_conv'}.bias", 1)
    widths, temporal, counts = [0], [], [0]
    for i in range(_layers(rf"{re.escape(blocks)}\.(\d{{1,4}})\.", tensors, source)):
        if f"{blocks}.{i}.resample.1.weight" in tensors:
            temporal.append(f"{blocks}.{i}.time_conv.weight" in tensors)
            widths.append(0)
            counts.append(0)
        else:
            (widths[-1],) = shape(f"{blocks}.{i}.{out_conv}.bias", 1)
            counts[-1] += 1
    if len(set(counts)) != 1 or any(width % base_dim or not width for width in widths):
        raise CheckpointError(f"{source.path}: a VAE whose stages have {counts} blocks of widths {widths} is unknown")
    mean, std = _latent_statistics(z_dim, source)
    return _made(
        source,
        lambda: VAEConfig(
            base_dim=base_dim,
            z_dim=z_dim,
            dim_mult=tuple(width // base_dim for width in widths),
            num_res_blocks=counts[0],
            temporal_downsample=tuple(temporal),
            latents_mean=mean,
            latents_std=std,
        ),
    )


def _latent_statistics(z_dim: int, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found = [source.config.get(key) for key in ("latents_mean", "latents_std")]
    if all(isinstance(v, list) and len(v) == z_dim and all(isinstance(x, int | float) for x in v) for v in found):
        mean, std = (tuple(float(x) for x in values) for values in found)  # pyright: ignore[reportOptionalIterable]
        return mean, std
    if z_dim == len(WAN_LATENTS_MEAN):
        return WAN_LATENTS_MEAN, WAN_LATENTS_STD
    raise CheckpointError(
        f"{source.path}: a VAE of {z_dim} latent channels does not tell their mean and deviation; "
        "put a config.json with latents_mean and latents_std beside it"
    )


def _made(source: Source, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from error


_INFER: Mapping[str, Callable[[Naming, Tensors, Source], ComponentConfig]] = {"dit": _dit, "vae": _vae, "umt5": _umt5}
