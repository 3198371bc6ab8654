"""Whole models as they are published, Wan's own folders and diffusers', and which of their files is which part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError

# The first that is there; the high-noise expert is `dit`.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "dit": ("high_noise_model", "transformer", "diffusion_pytorch_model*.index.json", "diffusion_pytorch_model*"),
    "dit_low": ("low_noise_model", "transformer_2"),
    "vae": ("vae", "Wan2.1_VAE.*"),
    "text_encoder": ("text_encoder", "models_t5_umt5*"),
    "tokenizer": ("tokenizer", "google/umt5-xxl"),
}
_EXPERTS = {"high_noise_model": "low_noise_model", "transformer": "transformer_2"}


def is_release(folder: Path) -> bool:
    """True for a folder that holds a whole model, or two experts of one."""
    if any((folder / name).is_dir() for name in _EXPERTS) or (folder / "model_index.json").is_file():
        return True
    return _find(folder, "dit") is not None and _find(folder, "text_encoder") is not None


def complete(given: Mapping[str, Any], release: Path | None) -> dict[str, Any]:
    """`given` parts (None where there is none), completed by those of a release; a given `dit` brings its own partner.

    A `dit` that is itself the folder of a release stands for its DiT, both experts where there are two.
    """
    parts = {name: path for name, path in given.items() if path is not None}
    if "dit" in parts and "dit_low" not in parts and is_release(Path(parts["dit"])):
        found = find_parts(Path(parts["dit"]))
        parts |= {name: found[name] for name in ("dit", "dit_low") if name in found}
    found = {} if release is None else find_parts(release)
    if "dit" in parts:
        found.pop("dit_low", None)
    return {**dict.fromkeys(given), **found, **parts}


def find_parts(folder: Path) -> dict[str, Path]:
    """The parts of a release by the names that `convert_pipeline` takes, as many as there are.

    Raises CheckpointError when one of two experts is missing.
    """
    parts = {part: path for part in _NAMES if (path := _find(folder, part)) is not None}
    present = {"dit", "dit_low"} & parts.keys()
    if len(present) == 1 and _wants_two(folder):
        high = next(name for name in _EXPERTS if (folder / name).is_dir() or (folder / _EXPERTS[name]).is_dir())
        has, lacks = (high, _EXPERTS[high]) if "dit" in present else (_EXPERTS[high], high)
        raise CheckpointError(f"{folder}: has {has}/ but not {lacks}/: the model is a pair; download the rest")
    return parts


def _wants_two(folder: Path) -> bool:
    if any((folder / name).is_dir() for name in ("high_noise_model", "low_noise_model")):
        return True
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return any(index.get("transformer_2") or [])
    except (OSError, ValueError, AttributeError, TypeError):
        return (folder / "transformer_2").is_dir()


def _find(folder: Path, part: str) -> Path | None:
    for pattern in _NAMES[part]:
        if found := sorted(folder.glob(pattern)):
            # Several files without an index: `open_source` tells what is wrong with their folder.
            return found[0] if len(found) == 1 else folder
    return None
