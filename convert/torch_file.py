"""Read torch's `.pth`, `.pt` and `.ckpt` without torch: a zip of one pickle and the storages, never executed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError
from convert.state_pickle import PickledTensor, read_state_pickle
from convert.tensors import MappedFile, StoredTensor
from convert.zip_records import Record, zip_records

MAX_NODES = 1_000_000
MAX_DEPTH = 8
# A view with stride 0 can be larger than its storage; beyond this it is no parameter.
MAX_EXPANDED_BYTES = 16 << 20


def read_torch(source: Path | MappedFile) -> dict[str, StoredTensor]:
    """Every tensor by dotted name; nested dicts (`{"state_dict": {...}}`) give "state_dict.NAME", a bare one "tensor".

    Raises CheckpointError for files of torch before 1.6, TorchScript, and anything damaged or hostile.
    """
    file = MappedFile(source) if isinstance(source, Path) else source
    path = file.path
    start = file.map[:4]
    if start[:1] == b"\x80":
        raise CheckpointError(
            f"{path}: a pickle in the format of torch before 1.6; save it again with a newer torch: "
            "torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    if start[:2] != b"PK":
        raise CheckpointError(f"{path}: no torch file: neither a zip archive nor a pickle")
    records = zip_records(file)
    if any(name.split("/")[1:2] == ["code"] for name in records):
        raise CheckpointError(f"{path}: a TorchScript program; save its state dict instead: module.state_dict()")
    if packed := next((name for name, record in records.items() if not record.plain), None):
        raise CheckpointError(f"{path}: {packed!r} is compressed, as torch.save never does; unzip it and save it again")
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip archive without one data.pkl: not written by torch.save")
    archive = pickles[0].removesuffix("data.pkl")
    big_endian = _text(file, records.get(f"{archive}byteorder")) == "big"
    record = records[pickles[0]]
    tree = read_state_pickle(file.map[record.offset : record.offset + record.size], path)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in _tensors(tree, path):
        if name in tensors:
            raise CheckpointError(f"{path}: two tensors are called {name[:80]!r}")
        tensors[name] = _stored(file, name, tensor, records.get(f"{archive}data/{tensor.storage.key}"), big_endian)
    return tensors


def _text(file: MappedFile, record: Record | None) -> str:
    return "" if record is None else file.map[record.offset : record.offset + min(record.size, 16)].decode("latin-1")


def _tensors(tree: Any, path: Path) -> Iterator[tuple[str, PickledTensor]]:
    """Tensors in nested dicts, lists and tuples, by dotted name."""
    waiting, seen = [("", tree, 0)], 0
    while waiting:
        name, node, depth = waiting.pop()
        seen += 1
        if seen > MAX_NODES or depth > MAX_DEPTH:
            # A few lists that hold each other can describe more entries than there are atoms.
            raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} or wider than {MAX_NODES} entries")
        if isinstance(node, PickledTensor):
            yield name or "tensor", node
        elif isinstance(node, dict | list | tuple):
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            seen += len(items)
            waiting.extend((f"{name}.{key}" if name else str(key), value, depth + 1) for key, value in reversed(items))


def _stored(
    file: MappedFile, name: str, tensor: PickledTensor, record: Record | None, big_endian: bool
) -> StoredTensor:
    def fail(trouble: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {name[:80]!r} {trouble}")

    storage, size = tensor.storage, tensor.dtype.itemsize
    if record is None:
        raise fail(f"has no data: the archive lacks record {storage.key[:40]!r}")
    if storage.count * (1 if storage.dtype is None else size) > record.size:
        raise fail(f"claims {storage.count} elements, but its record has {record.size} bytes")
    count = 1
    for n in tensor.shape:
        count *= n
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) if count else 0
    if (tensor.offset + extent) * size > record.size:
        raise fail(f"of shape {list(tensor.shape)} reaches outside its {record.size} bytes")
    if count * size > max(record.size, MAX_EXPANDED_BYTES):
        raise fail(f"of shape {list(tensor.shape)} repeats itself beyond {MAX_EXPANDED_BYTES} bytes")
    strides, expected = None, 1
    for n, s in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if n != 1 and s != expected:
            strides = tensor.strides
            break
        expected *= n
    offset = record.offset + tensor.offset * size
    return StoredTensor(file, offset, tensor.dtype, tensor.shape, strides, big_endian)
