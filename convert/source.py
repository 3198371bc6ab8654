"""Open whatever a checkpoint comes as: one file, shards with their index, or the folder that holds either."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError
from convert.safetensors_file import read_safetensors
from convert.tensors import StoredTensor
from convert.torch_file import read_torch

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_MAX_JSON = 32 << 20
_MAX_NAME = 255  # bytes of a file name, on Linux and macOS
# What people try, and what to do about it.
_OTHER_FORMATS: Mapping[str, str] = {
    ".gguf": "GGUF files hold weights in blocks of their own; take the .safetensors of the same model",
    ".onnx": "ONNX files hold graphs; take the .safetensors of the same model",
    ".distcp": "a shard of a distributed checkpoint; join it first: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth",
}


@dataclass(frozen=True)
class Source:
    """Tensors by name, unread; metadata: of safetensors headers; config: the JSON files beside the weights."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    container: str = ""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(path: str | Path) -> Source:
    """Find and open a checkpoint. Raises CheckpointError for what is missing, ambiguous or damaged."""
    path = Path(path)
    if path.is_dir():
        file = _file_in(path)
    elif path.is_file():
        file = path
    elif path.exists():
        raise CheckpointError(f"{path}: neither a regular file nor a folder")
    else:
        raise CheckpointError(f"{path}: no such file or folder")
    config = _sibling_config(file)
    if file.name.endswith(".index.json"):
        return _open_shards(file, config)
    if file.suffix in _OTHER_FORMATS:
        raise CheckpointError(f"{file}: {_OTHER_FORMATS[file.suffix]}")
    if _magic(file) == b"version ":
        raise CheckpointError(f"{file}: a Git LFS pointer, not the weights: git lfs pull, or download the file itself")
    if file.suffix == ".safetensors":
        tensors, metadata = read_safetensors(file)
        return _source(file, tensors, metadata, config, "safetensors")
    if file.suffix in _TORCH_SUFFIXES or _magic(file)[:2] == b"PK":
        return _source(file, read_torch(file), {}, config, "torch zip")
    if file.suffix == "":  # blobs of the hub's cache have no suffix
        tensors, metadata = read_safetensors(file)
        return _source(file, tensors, metadata, config, "safetensors")
    raise CheckpointError(f"{file}: unknown suffix {file.suffix!r}; known: .safetensors, {', '.join(_TORCH_SUFFIXES)}")


def _source(path: Path, tensors: Any, metadata: Any, config: Any, container: str) -> Source:
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return Source(path, tensors, metadata, config, container)


def _magic(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would never open
        raise CheckpointError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _file_in(folder: Path) -> Path:
    """The one checkpoint in a folder: an index of shards, else a single file of weights."""
    if (folder / "pipeline.json").is_file():
        parts = ", ".join(sorted(str(p.parent) for p in folder.glob("*/config.json")))
        raise CheckpointError(f"{folder}: a converted pipeline; name its part: {parts}")
    if (folder / "model_index.json").is_file():
        parts = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise CheckpointError(f"{folder}: a whole diffusers pipeline; name its part: {parts}")
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        raise CheckpointError(f"{folder}: a distributed checkpoint: {_OTHER_FORMATS['.distcp']}")
    for patterns in (
        ["*.safetensors.index.json"],
        ["*.safetensors"],
        ["*.bin.index.json"],
        [f"*{s}" for s in _TORCH_SUFFIXES],
    ):
        found = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:6])
            raise CheckpointError(f"{folder}: holds {len(found)} checkpoints ({names}); name one of them")
        if found:
            return found[0]
    raise CheckpointError(f"{folder}: holds no checkpoint (.safetensors, {', '.join(_TORCH_SUFFIXES)})")


def _sibling_config(file: Path) -> dict[str, Any]:
    """`config.json` beside the weights; {} when there is none. What is in it is believed only where it fits.

    Beside an adapter, peft's config instead: without it nobody knows how strong the adapter is.
    """
    adapter = file.with_name("adapter_config.json")
    if file.stem == "adapter_model" and adapter.is_file():
        config = _read_json(adapter)
        if not isinstance(config, dict):
            raise CheckpointError(f"{adapter}: is not a table of fields")
        return config
    path = file.parent / "config.json"
    try:
        config = _read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}
    return config if isinstance(config, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes of JSON, the limit is {_MAX_JSON}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not JSON: {str(error)[:80]}") from error


def _open_shards(index: Path, config: dict[str, Any]) -> Source:
    """Every tensor from the shard that the index names, each shard inside the index's own folder."""
    table = _read_json(index)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    shards: dict[str, Mapping[str, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", "..") or len(os.fsencode(name)) > _MAX_NAME:
            raise CheckpointError(f"{index}: shard {name[:80]!r} is not a plain file name")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: shard {name} is missing; download the rest of the checkpoint")
        if name.endswith(".safetensors"):
            shards[name], header = read_safetensors(index.parent / name)
            metadata |= header
        else:
            shards[name] = read_torch(index.parent / name)
    tensors, troubles = {}, []
    for tensor, name in weight_map.items():
        if tensor in shards[name]:
            tensors[tensor] = shards[name][tensor]
        else:
            troubles.append(f"{tensor} is not in {name}")
    for name, held in shards.items():
        troubles += [f"{tensor} in {name} is not in the index" for tensor in held if weight_map.get(tensor) != name]
    if troubles:
        more = f" and {len(troubles) - 4} more" if len(troubles) > 4 else ""
        raise CheckpointError(f"{index}: {'; '.join(troubles[:4])}{more}")
    return _source(index, tensors, metadata, config, f"{len(shards)} shards")
