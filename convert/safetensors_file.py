"""Read and write `.safetensors`: 8 bytes of header length, a JSON header, then the tensors end to end.

Format: https://github.com/huggingface/safetensors. The library's numpy interface copies every tensor and wants
all of them in memory to write; this reader maps the file, and this writer takes one chunk after another.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError
from convert.tensors import DTYPE_NAMES, DTYPES, Leaf, MappedFile, StoredTensor

# The 14B model needs 0.2 MB. The limit keeps a lying length from filling the memory with JSON.
MAX_HEADER = 16 << 20
MAX_RANK = 8


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(tensors by name, the header's `__metadata__`). Raises CheckpointError for anything the format forbids."""
    file = MappedFile(path)

    def fail(trouble: str) -> CheckpointError:
        return CheckpointError(f"{path}: damaged safetensors file: {trouble}")

    if file.size < 8:
        raise fail(f"{file.size} bytes, too short for a header")
    (length,) = struct.unpack("<Q", file.map[:8])
    if length > min(file.size - 8, MAX_HEADER):
        raise fail(f"its header claims {length} bytes (file: {file.size}, limit: {MAX_HEADER})")
    try:
        header = json.loads(file.map[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise fail(f"its header is not JSON: {_short(error)}") from error
    if not isinstance(header, dict):
        raise fail("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("__metadata__ is not a table of strings")
    start = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _entry(name, entry, fail)
        if not 0 <= begin <= end <= file.size - start:
            raise fail(f"tensor {_short(name)} lies at {begin}..{end}, outside the file's {file.size - start} bytes")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise fail(f"tensor {_short(name)} of shape {list(shape)} cannot fill {end - begin} bytes")
        spans.append((begin, end))
        tensors[name] = StoredTensor(file, start + begin, dtype, shape)
    expected = 0
    for begin, end in sorted(spans):
        if begin != expected:
            raise fail(f"its tensors overlap or leave a hole at byte {min(begin, expected)}")
        expected = end
    if expected != file.size - start:
        raise fail(f"{file.size - start - expected} bytes after the last tensor")
    return tensors, metadata


def _entry(name: str, entry: Any, fail: Callable[[str], CheckpointError]) -> tuple[Any, tuple[int, ...], Any]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"tensor {_short(name)} needs exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise fail(f"tensor {_short(name)} has unknown dtype {_short(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or max(shape, default=0) > 1 << 48:
        raise fail(f"tensor {_short(name)} has an impossible shape {_short(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise fail(f"tensor {_short(name)} has impossible data_offsets {_short(offsets)}")
    return DTYPES[entry["dtype"]], tuple(shape), offsets


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write_safetensors(
    path: Path,
    leaves: Mapping[str, Leaf],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write `path`, chunk by chunk, under a temporary name that is renamed at the end.

    progress: called with the number of bytes just written. Raises CheckpointError for a dtype without a name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    # The widest dtypes first keeps every tensor aligned, as the library's own writer does.
    names = sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))
    for name in names:
        leaf = leaves[name]
        if leaf.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path}: {name} has dtype {leaf.dtype}, which safetensors cannot hold")
        offsets = [position, position + leaf.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": offsets}
        position += leaf.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                for _, rows in leaves[name].chunks():
                    data = rows.tobytes() if not rows.flags.c_contiguous else rows.reshape(-1).view("u1").data
                    file.write(data)
                    progress(len(data))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
