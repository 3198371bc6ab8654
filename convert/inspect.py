"""What a file or folder is, and what it would become, from names and shapes alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.assemble import assemble, is_component_folder
from convert.errors import CheckpointError
from convert.lora import read_lora
from convert.recognise import is_lora, recognise
from convert.release import find_parts, is_release
from convert.source import Source, open_source
from turbojax.checkpoint import open_component, quantized_layout
from turbojax.component import Component
from turbojax.config import PRESETS, DiTConfig, UMT5Config, VAEConfig

_NAMES = {DiTConfig: "DiT", VAEConfig: "VAE", UMT5Config: "umT5 encoder"}
_PARTS = ("dit", "dit_low", "vae", "text_encoder")


def inspect(path: str | Path) -> str:
    """A description in a few lines. Raises CheckpointError, or UserError, for what cannot be read or converted."""
    path = Path(path)
    if (path / "pipeline.json").is_file():
        return "\n".join(_pipeline(path))
    if is_release(path):
        return "\n".join(_release(path))
    if is_component_folder(path):
        component = open_component(path)
        return "\n".join([f"{path}: converted {_kind(component)}", *_component(component)])
    source = open_source(path)
    lines = [f"{source.path}: {source.container}, {len(source.tensors)} tensors, {_bytes(source.nbytes)}"]
    lines.append(f"  dtypes: {_dtypes(tensor.dtype for tensor in source.tensors.values())}")
    if is_lora(source):
        return "\n".join([*lines, *_lora(source)])
    found = recognise(source)
    component = assemble(found)
    prefix = f", prefix {found.prefix!r}" if found.prefix else ""
    lines.append(f"  names: {found.naming}{prefix}")
    lines += [f"  left out: {len(names)} tensors, {reason}" for reason, names in found.ignored.items()]
    return "\n".join([*lines, f"would become a {_kind(component)}", *_component(component)])


def _pipeline(folder: Path) -> list[str]:
    from turbojax.pipeline_config import PipelineConfig

    try:
        config = PipelineConfig.from_json((folder / "pipeline.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'pipeline.json'}: cannot be read: {error}") from error
    lines = [f"{folder}: pipeline of preset {config.preset}", f"  samples by {config.sampler}, {config.steps} steps"]
    for part in _PARTS:
        place = folder / config.parts.get(part, part)
        if part == "dit_low" and not place.is_dir():
            continue
        component = open_component(place)
        lines += [f"{part}: {_kind(component)}", *_component(component)]
    return lines


def _release(folder: Path) -> Iterable[str]:
    parts = find_parts(folder)
    yield f"{folder}: a whole model: {', '.join(parts)}"
    for part, place in parts.items():
        if part == "tokenizer":
            yield f"{part}: {place}"
            continue
        component = assemble(recognise(open_source(place)))
        yield f"{part}: {place}: would become a {_kind(component)}"
        yield from _component(component)


def _lora(source: Source) -> Iterable[str]:
    updates = read_lora(source)
    ranks = Counter(update.parts["down"].shape[0] for update in updates if "down" in update.parts)
    whole = sum("diff" in update.parts or "diff_b" in update.parts for update in updates)
    ranked = ", ".join(f"rank {rank}: {count} modules" for rank, count in sorted(ranks.items()))
    yield f"  LoRA: {ranked or 'no products'}; {whole} modules changed in whole"
    yield f"merge it into its base: turbojax convert BASE --lora {source.path} --out DIR"


def _kind(component: Component) -> str:
    name = _NAMES[type(component.config)]
    config: Any = component.config
    if isinstance(config, DiTConfig):
        config = dataclasses.replace(config, linear_branch=False)
        name += " with SLA" if component.config != config else ""
        name += ", int8 weights" if quantized_layout(component.leaves) else ""
    field = {DiTConfig: "dit", VAEConfig: "vae", UMT5Config: "text_encoder"}[type(config)]
    fitting = [preset for preset, p in PRESETS.items() if getattr(p, field) == config]
    return f"{name} ({' or '.join(fitting)})" if fitting else name


def _component(component: Component) -> Iterable[str]:
    count = sum(leaf.size for leaf in component.leaves.values())
    dtypes = _dtypes(leaf.dtype for leaf in component.leaves.values())
    yield f"  {count:,} parameters, {_bytes(component.nbytes)}: {dtypes}"
    fields = dataclasses.asdict(component.config)
    yield "  " + ", ".join(f"{name}={value}" for name, value in fields.items() if not name.startswith("latents_"))


def _dtypes(dtypes: Iterable[Any]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in Counter(map(str, dtypes)).most_common())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise CheckpointError(f"{count} bytes")
