"""A component back into the torch world: one `.safetensors` in the original's names or in diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from convert.assemble import read_component
from convert.errors import CheckpointError
from convert.infer import METADATA_KEY
from convert.progress import byte_progress
from convert.safetensors_file import write_safetensors
from convert.tables import Entry, Naming, entries
from convert.tensors import Leaf, copy_into
from convert.transforms import TRANSFORMS, Shape
from turbojax import config as configs
from turbojax.checkpoint import quantized_layout
from turbojax.component import Component
from turbojax.config import DiTConfig

Format = Literal["wan", "diffusers", "turbodiffusion"]
# format -> names. TurboDiffusion's are Wan's, but its patch embedding is a Linear where Wan's is a Conv3d.
FORMATS: Mapping[str, Naming] = {"wan": "wan", "diffusers": "diffusers", "turbodiffusion": "wan"}
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: Format = "wan",
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Write a converted component, or any checkpoint that can be converted, as OUT.safetensors.

    format: "wan", "diffusers" or "turbodiffusion" (whose DiT has its patch embedding as a matrix; so has "wan" for a
    model with SLA or int8 weights, which only TurboDiffusion can hold).
    dtype: of all float tensors; None: as they are kept, which gives back the very bits that were converted.
    The config goes into the header, so that converting the file again needs no guess.
    Raises CheckpointError for what the format has no name for, or an `out` that is there already.
    """
    out = Path(out)
    if format not in FORMATS:
        raise CheckpointError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: exports are safetensors files; call it {out.name}.safetensors")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} is there already; remove it or choose another name")
    if dtype is not None and dtype not in _DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    component = read_component(source)
    leaves = exported(component, format, source)
    if dtype is not None:
        leaves = {name: _cast(leaf, _DTYPES[dtype]) for name, leaf in leaves.items()}
    metadata = {"format": "pt", METADATA_KEY: configs.to_json(component.config)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with byte_progress(sum(leaf.nbytes for leaf in leaves.values()), out.name, progress) as done:
            write_safetensors(out, leaves, metadata, done)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error.strerror or error}") from error


def exported(component: Component, format: Format, source: str | Path = "component") -> dict[str, Leaf]:
    """Every tensor of the format, each made when it is read."""
    layout = quantized_layout(component.leaves)
    if format == "diffusers" and layout:
        raise CheckpointError(
            f"{source}: has int8 weights, for which diffusers has no names; use --format turbodiffusion"
        )
    if "channel" in layout.values():
        raise CheckpointError(
            f"{source}: its int8 weights have one scale a channel; TurboDiffusion's files have one a 128 x 128 block"
        )
    config = component.config
    patch = config.patch_size if isinstance(config, DiTConfig) else ()
    try:
        table = list(entries(config, FORMATS[format], layout))
    except KeyError as error:
        raise CheckpointError(
            f"{source}: {format} has no name for {error.args[0]}, which SLA needs; use --format turbodiffusion"
        ) from error
    turbo = format == "turbodiffusion" or bool(layout) or (isinstance(config, DiTConfig) and config.linear_branch)
    return {entry.source: _leaf(component.leaves[entry.target], entry, patch, turbo) for entry in table}


def _leaf(leaf: Leaf, entry: Entry, patch: Shape, turbo: bool) -> Leaf:
    transform = TRANSFORMS[entry.transform]
    here = leaf.shape if entry.layer is None else leaf.shape[1:]
    shape = transform.source_shapes(here, patch)[-1 if turbo and entry.transform == "patch" else 0]
    if entry.layer is None and entry.transform == "same":
        return leaf  # as it is, and in chunks

    def read(start: int, stop: int) -> np.ndarray:
        values = leaf.array() if entry.layer is None else leaf.read(entry.layer, entry.layer + 1)[0]
        out = np.empty(shape, leaf.dtype)
        copy_into(out, transform.inverse(values, shape))
        return out[start:stop]

    return Leaf(shape, leaf.dtype, read, whole=True)


def _cast(leaf: Leaf, dtype: np.dtype) -> Leaf:
    if leaf.dtype.kind == "i" or leaf.dtype == dtype:
        return leaf
    return Leaf(leaf.shape, dtype, lambda start, stop: leaf.read(start, stop).astype(dtype), whole=leaf.whole)
