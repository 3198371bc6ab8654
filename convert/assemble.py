"""A recognised checkpoint as a `Component`: every tensor in its place, nothing read yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from convert.errors import CheckpointError
from convert.recognise import Recognised, recognise
from convert.source import open_source
from convert.tables import Entry, entries, modules
from convert.tensors import Leaf, StoredTensor, copy_into
from convert.transforms import TRANSFORMS, Shape
from turbojax.checkpoint import abstract_leaves, open_component, quantized_layout
from turbojax.component import Component
from turbojax.config import DiTConfig

_INT8_SUFFIX = ".int8_weight"
# Kept as they are; float8 and float64 become their neighbours, exactly and to float32's precision.
_FLOATS = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


def read_component(
    path: str | Path, *, model: str | None = None, prefix: str | None = None, dtype: DTypeLike | None = None
) -> Component:
    """A component from a converted folder or from any checkpoint that `recognise` knows, its parameters unread.

    dtype: cast to it what does not always stay float32 (None: as the file has it).
    Raises CheckpointError, or UserError for a converted folder that is incomplete.
    """
    path = Path(path)
    if is_component_folder(path):
        if model is not None or prefix is not None:
            option, value = ("model", model) if model is not None else ("prefix", prefix)
            raise CheckpointError(f"{path}: is converted already, so {option} {value!r} has nothing to choose")
        return cast(open_component(path), dtype)
    return cast(assemble(recognise(open_source(path), model=model, prefix=prefix)), dtype)


def is_component_folder(path: Path) -> bool:
    """True for what `turbojax convert` wrote, whole or not."""
    if not (path / "config.json").is_file():
        return False
    return (path / "params").is_dir() or (path / "params.safetensors").is_file()


def assemble(found: Recognised) -> Component:
    """Map every tensor. Raises CheckpointError that lists all that are missing, unmapped or of the wrong shape."""
    quantized = _quantized(found)
    try:
        table = list(entries(found.config, found.naming, quantized))
    except KeyError as error:
        raise CheckpointError(f"{found.source.path}: {found.naming} has no name for {error.args[0]}") from error
    layout = dict.fromkeys(quantized, "block")
    wanted = abstract_leaves(found.config, quantized=layout)
    tensors = dict(found.tensors)
    patch = found.config.patch_size if isinstance(found.config, DiTConfig) else ()
    rows: dict[str, list[tuple[Entry, StoredTensor]]] = defaultdict(list)
    troubles: list[str] = []
    for entry in table:
        tensor = tensors.pop(entry.source, None)
        if tensor is None:
            troubles.append(f"{entry.source} is missing")
            continue
        shape = wanted[entry.target].shape
        shape = shape if entry.layer is None else shape[1:]
        accepted = TRANSFORMS[entry.transform].source_shapes(shape, patch)
        if tensor.shape not in accepted:
            troubles.append(f"{entry.source} is {list(tensor.shape)}, not {list(accepted[0])}")
        elif (trouble := _dtype_trouble(entry, tensor)) is not None:
            troubles.append(trouble)
        rows[entry.target].append((entry, tensor))
    troubles += [f"{name} is unknown" for name in tensors]
    if troubles:
        more = f"; and {len(troubles) - 8} more" if len(troubles) > 8 else ""
        raise CheckpointError(
            f"{found.source.path}: {len(troubles)} tensors do not fit a {found.kind} in {found.naming} names: "
            f"{'; '.join(troubles[:8])}{more}"
        )
    leaves = {target: _leaf(rows[target], tuple(spec.shape)) for target, spec in wanted.items()}
    return Component(found.config, leaves)


def cast(component: Component, dtype: DTypeLike | None) -> Component:
    """The same parameters in the dtypes that a module of compute dtype `dtype` gives them."""
    if dtype is None:
        return component
    wanted = abstract_leaves(component.config, dtype, quantized_layout(component.leaves))
    leaves = {path: _cast_leaf(leaf, np.dtype(wanted[path].dtype)) for path, leaf in component.leaves.items()}
    return Component(component.config, leaves, str(np.dtype(dtype)))


def _cast_leaf(leaf: Leaf, dtype: np.dtype) -> Leaf:
    return Leaf(leaf.shape, dtype, lambda start, stop: leaf.read(start, stop).astype(dtype, copy=False))


def _quantized(found: Recognised) -> list[str]:
    """Layers here whose weights the file holds as int8."""
    names = {row.wan.replace("{i}", "0"): row.ours for row in modules(found.config) if row.kind == "linear"}
    first = (n.removesuffix(_INT8_SUFFIX) for n in found.tensors if n.endswith(_INT8_SUFFIX))
    return sorted({names[n] for n in first if n in names}) if found.naming == "wan" else []


def _dtype_trouble(entry: Entry, tensor: StoredTensor) -> str | None:
    if entry.target.endswith(".weight_q"):
        return None if tensor.dtype == np.int8 else f"{entry.source} is {tensor.dtype}, not int8"
    return None if _kept_dtype(tensor.dtype) is not None else f"{entry.source} is {tensor.dtype}, not a float"


def _kept_dtype(dtype: np.dtype) -> np.dtype | None:
    """The dtype that a float is stored in here; None for what is no float."""
    if dtype in _FLOATS or dtype == np.int8:
        return dtype
    if dtype == np.float64:
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16) if dtype.name.startswith("float8") else None


def _leaf(rows: Iterable[tuple[Entry, StoredTensor]], shape: Shape) -> Leaf:
    """The parameter of these tensors: one a layer, or one in all. Layers of different precision take the widest."""
    ordered = sorted(rows, key=lambda row: row[0].layer or 0)
    kept = [_kept_dtype(tensor.dtype) for _, tensor in ordered]
    dtype = np.result_type(*[d for d in kept if d is not None])
    transform = TRANSFORMS[ordered[0][0].transform]
    if ordered[0][0].layer is None:
        return _whole_leaf(ordered[0][1], transform.forward, shape, dtype)

    def fill(start: int, out: np.ndarray) -> None:
        for row, (_, tensor) in zip(out, ordered[start : start + len(out)], strict=True):
            copy_into(row, transform.forward(tensor.array(), shape[1:]))
            tensor.release()

    return Leaf.filled(shape, dtype, fill)


def _whole_leaf(
    tensor: StoredTensor, forward: Callable[[np.ndarray, Shape], np.ndarray], shape: Shape, dtype: np.dtype
) -> Leaf:
    def fill(start: int, out: np.ndarray) -> None:
        copy_into(out, forward(tensor.array(), shape)[start : start + len(out)])
        if start + len(out) == shape[0]:
            tensor.release()

    return Leaf.filled(shape, dtype, fill)
