"""Components on disk: a folder with `config.json` and the parameters, as Orbax or as safetensors.

    FOLDER/config.json          to_json(config), and under "storage" how the parameters are kept
    FOLDER/params/              Orbax, one zarr array a parameter, split by layers   (the large models)
    FOLDER/params.safetensors   flat dotted names                                    (the small models: no Orbax import)

And the states of a training run, `Checkpoints`: FOLDER/STEP/, Orbax again, each array at once.

The only module that touches Orbax, and it does so late: importing Orbax takes 1.4 s.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from convert.lora import apply_lora
from convert.safetensors_file import read_safetensors, write_safetensors
from convert.tensors import Leaf
from turbojax import config as configs
from turbojax.component import Component
from turbojax.config import ComponentConfig, DiTConfig, UMT5Config, VAEConfig
from turbojax.errors import UserError

Format = Literal["orbax", "safetensors"]
Sharding = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]

_FILES: Mapping[str, str] = {"orbax": "params", "safetensors": "params.safetensors"}
# config -> (module, class, a parameter whose dtype is the module's compute dtype)
_MODULES: Mapping[type, tuple[str, str, str]] = {
    DiTConfig: ("turbojax.models.dit", "WanDiT", "patch_embedding.kernel"),
    VAEConfig: ("turbojax.models.vae", "WanVAE", "quant_conv.kernel"),
    UMT5Config: ("turbojax.models.umt5", "UMT5Encoder", "token_embedding.embedding"),
}


def save_component(
    directory: str | Path,
    component: nnx.Module | Component | tuple[ComponentConfig, Mapping[str, Any]],
    *,
    format: Format = "orbax",
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write a component folder under a temporary name and rename it when it is whole.

    component: a module, a `Component`, or (config, parameters) with parameters nested or by dotted path.
    progress: called with the number of bytes just written.
    Raises UserError when `directory` is there already (unless `overwrite`), or cannot be written.
    """
    component = _as_component(component)
    if format not in _FILES:
        raise UserError(f"unknown format {format!r}; known: {', '.join(_FILES)}")
    with new_folder(directory, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(_config_text(component), encoding="utf-8")
        if format == "orbax":
            _write_orbax(folder / _FILES[format], component.leaves, progress)
        else:
            write_safetensors(folder / _FILES[format], component.leaves, progress=progress)


def load_component(
    directory: str | Path,
    dtype: DTypeLike | None = None,
    *,
    sharding: Sharding | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
) -> Any:
    """Read a component folder into its module: WanDiT, WanVAE or UMT5Encoder, by the kind in `config.json`.

    dtype: compute dtype, and that of the parameters that do not always stay float32; None: as it was saved, or the
        module's own default after a conversion. sharding: of all arrays, or a function of (path, shape and dtype);
        None: the default device. lora: (file, strength) pairs to merge on the way, in float32.
    Raises UserError for a folder that is missing, is no component, or does not fit its own config.
    """
    folder = Path(directory)
    component = open_component(folder)
    dtype = component.dtype if dtype is None else dtype
    saved = component.leaves
    graph, state = nnx.split(abstract_module(component.config, dtype, quantized_layout(saved)))
    flat = {path_name(path): variable for path, variable in nnx.to_flat_state(state)}
    _check_fit(folder, {path: tuple(v.shape) for path, v in flat.items()}, saved)
    wanted = {path: _placed(path, v, sharding) for path, v in flat.items()}
    changed = _with_loras(component, lora).leaves
    arrays = {path: _to_device(changed[path], wanted[path]) for path in wanted if changed[path] is not saved[path]}
    rest = {path: spec for path, spec in wanted.items() if path not in arrays}
    if (folder / _FILES["safetensors"]).is_file():
        arrays |= {path: _to_device(saved[path], spec) for path, spec in rest.items()}
    elif rest:
        arrays |= _restore_orbax(folder / _FILES["orbax"], rest)
    filled = [(path, v.replace(arrays[path_name(path)])) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def open_component(directory: str | Path) -> Component:
    """The component in `directory`, its parameters left on disk until they are read. Raises UserError."""
    folder = Path(directory)
    config, storage = _read_config(folder)
    return Component(config, _open(folder), storage.get("dtype"))


def abstract_module(
    config: ComponentConfig, dtype: DTypeLike | None = None, quantized: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """The module of `config` with shapes and dtypes but no arrays.

    quantized: linear layers that hold int8 weights, path -> "block" (scales of 128 x 128 blocks) or "channel".
    """
    module_name, class_name, _ = _MODULES[type(config)]
    cls = getattr(importlib.import_module(module_name), class_name)

    def make() -> Any:
        module = cls(config, rngs=nnx.Rngs(0), dtype=dtype)
        if not quantized:
            return module
        from turbojax.quant import quantize_linears

        return quantize_linears(module, quantized)

    return nnx.eval_shape(make)


def abstract_leaves(
    config: ComponentConfig, dtype: DTypeLike | None = None, quantized: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of `abstract_module`, by dotted path."""
    state = nnx.state(abstract_module(config, dtype, quantized))
    return {path_name(path): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in nnx.to_flat_state(state)}


def quantized_layout(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers hold int8 weights, and how their scales lie: path -> "block" or "channel"."""
    layout: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if path.endswith(".weight_q"):
            layer = path.removesuffix(".weight_q")
            scale = leaves.get(f"{layer}.weight_scale")
            if scale is not None:
                layout[layer] = "block" if len(scale.shape) == len(leaf.shape) else "channel"
    return layout


def path_name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


@contextlib.contextmanager
def new_folder(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the name `directory` when the block ends well and vanishes when it does not.

    A link is followed. Raises UserError when `directory` is a file, or a folder with something in it (unless
    `overwrite`), or the disk refuses.
    """
    target = Path(os.path.realpath(directory))
    if not target.name:
        raise UserError(f"{directory} is there already; choose another folder")
    partial, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    try:
        if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
            raise UserError(f"{directory} is there already; remove it or choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.replace(old)
        partial.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{directory} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _as_component(source: Any) -> Component:
    if isinstance(source, Component):
        return source
    if isinstance(source, nnx.Module):
        config: Any = getattr(source, "config", None)
        flat = {path_name(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(source))}
    else:
        config, parameters = source
        flat = {path_name(path): v for path, v in _flatten(parameters)}
    if type(config) not in _MODULES:
        raise UserError(f"a {type(config).__name__} is no component's config; known: DiTConfig, VAEConfig, UMT5Config")
    leaves = {path: v if isinstance(v, Leaf) else Leaf.of(v) for path, v in flat.items()}
    main = leaves.get(_MODULES[type(config)][2])
    return Component(config, leaves, None if main is None else str(main.dtype))


def _flatten(tree: Mapping[Any, Any], prefix: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _config_text(component: Component) -> str:
    storage = {"dtype": component.dtype, "quantized": quantized_layout(component.leaves)}
    fields = json.loads(configs.to_json(component.config)) | {"storage": storage}
    return json.dumps(fields, indent=2) + "\n"


def _read_config(folder: Path) -> tuple[ComponentConfig, dict[str, Any]]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `turbojax convert SOURCE --out {folder}` makes one")
    if (folder / "pipeline.json").is_file():
        raise UserError(f"{folder} is a whole pipeline; use Pipeline.load, or load one part such as {folder / 'dit'}")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: not a component; `turbojax convert` makes one")
    try:
        text = path.read_text(encoding="utf-8")
        config, storage = configs.from_json(text), json.loads(text).get("storage") or {}
        if storage.get("dtype") is not None:
            jax.numpy.dtype(storage["dtype"])
        return config, storage
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _with_loras(component: Component, loras: Sequence[tuple[str | Path, float]]) -> Component:
    for file, strength in loras:
        component = apply_lora(component, file, strength)
    return component


def _open(folder: Path) -> dict[str, Leaf]:
    """The parameters on disk, unread."""
    if (folder / _FILES["safetensors"]).is_file():
        tensors, _ = read_safetensors(folder / _FILES["safetensors"])
        return {path: Leaf.of_stored(tensor) for path, tensor in tensors.items()}
    root = folder / _FILES["orbax"]
    if not (root / "_METADATA").is_file():
        raise UserError(f"{folder} holds no parameters (params/ or params.safetensors); convert it again")
    paths = sorted(array.parent.name for array in root.glob("*/.zarray"))
    return {path: _zarr_leaf(root / path) for path in paths}


def _check_fit(folder: Path, expected: Mapping[str, tuple[int, ...]], saved: Mapping[str, Leaf]) -> None:
    troubles = [f"{path} is missing" for path in sorted(expected.keys() - saved.keys())]
    troubles += [f"{path} is unknown" for path in sorted(saved.keys() - expected.keys())]
    troubles += [
        f"{path} is {list(saved[path].shape)}, not {list(shape)}"
        for path, shape in sorted(expected.items())
        if path in saved and saved[path].shape != shape
    ]
    if troubles:
        more = f" and {len(troubles) - 4} more" if len(troubles) > 4 else ""
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(troubles[:4])}{more}; convert it again")


def _placed(path: str, variable: Any, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    spec = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    if sharding is None:
        placement: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        placement = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(path, spec)
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placement)


def _to_device(leaf: Leaf, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Each device reads its own part of the mapped file; only a change of dtype makes a copy on the host."""
    view = leaf.array()

    def part(index: Any) -> np.ndarray:
        return np.require(view[index].astype(spec.dtype, copy=False), requirements=["C", "A"])

    assert spec.sharding is not None
    return jax.make_array_from_callback(spec.shape, spec.sharding, part)


class Checkpoints:
    """The newest `keep` states of a training run, FOLDER/STEP each: written behind the run's back, whole or not at all.

    A state is a flat {name: jax.Array}. Use it as a context: leaving waits for what is still being written.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """Opens FOLDER, made if need be; what a killed run had half written is removed. Raises UserError."""
        if keep < 1:
            raise UserError(f"a run must keep at least one checkpoint, not {keep}")
        self.folder = Path(folder).absolute()
        with _orbax() as ocp:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
            try:
                self._manager = ocp.CheckpointManager(
                    self.folder, options=options, item_handlers=ocp.PyTreeCheckpointHandler()
                )
            except OSError as error:
                raise UserError(f"{folder} cannot hold checkpoints: {error.strerror or error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        with _orbax():
            self._manager.close()

    def newest(self) -> int | None:
        """The step of the newest whole state; None in a new folder."""
        return self._manager.latest_step()

    def save(self, step: int, state: Mapping[str, jax.Array]) -> None:
        """Take a copy of the state and write it in the background; waits only for the save before this one."""
        with _orbax() as ocp:
            self._manager.save(step, args=ocp.args.PyTreeSave(dict(state)))

    def shapes(self, step: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array of a state. Raises UserError for one that is damaged."""
        with self._reading(step):
            found = self._manager.item_metadata(step)
            tree = getattr(found, "tree", found)
            return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in tree.items()}

    def restore(self, step: int, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Read a state onto the devices where `like` lies. Raises UserError for one that is damaged."""
        wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in like.items()}
        with self._reading(step) as ocp:
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            return self._manager.restore(step, args=ocp.args.PyTreeRestore(wanted, restore_args))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Any]:
        with _orbax() as ocp:
            try:
                yield ocp
            except (ValueError, OSError) as error:
                reason = str(error).splitlines()[0][:200]
                raise UserError(
                    f"{self.folder / str(step)} is damaged ({reason}); delete it to go on from an older one"
                ) from error


# Orbax. One zarr array a parameter and no OCDBT: rows can then be written, and read back, one layer at a time.


def _zarr_leaf(folder: Path) -> Leaf:
    """The array in `folder`, unread. Raises UserError when a file of it is missing or has the wrong size."""
    try:
        meta = json.loads((folder / ".zarray").read_text())
        shape, chunk, dtype = tuple(meta["shape"]), tuple(meta["chunks"]), np.dtype(meta["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / '.zarray'} cannot be read: {error}; convert it again") from error
    grid = [range(-(-n // c)) for n, c in zip(shape, chunk, strict=True)]
    for index in itertools.product(*grid):
        file, expected = folder / ".".join(map(str, index)), math.prod(chunk) * dtype.itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != expected and meta["compressor"] is None:
            raise UserError(f"{file} has {size} of {expected} bytes: the checkpoint is incomplete; convert it again")

    def read(start: int, stop: int) -> np.ndarray:
        import tensorstore as ts

        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
        return ts.open(spec, open=True).result()[start:stop].read().result()

    return Leaf(shape, dtype, read)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax, imported late; its warnings about its own insides are not the caller's to heed."""
    from absl import logging

    verbosity = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp

        logging.set_verbosity(logging.ERROR)
        try:
            yield ocp
        finally:
            logging.set_verbosity(verbosity)


def _write_orbax(path: Path, leaves: Mapping[str, Leaf], progress: Callable[[int], object]) -> None:
    with _orbax() as ocp:
        registry = ocp.type_handlers.create_type_handler_registry((Leaf, _leaf_handler(ocp, progress)))
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(configs.nested(leaves)))


def _leaf_handler(ocp: Any, progress: Callable[[int], object]) -> Any:
    class LeafHandler(ocp.type_handlers.NumpyHandler):
        """Writes what Orbax will read as a numpy array, chunk by chunk, never holding more than two."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            await infos[0].await_path_creation()
            with ThreadPoolExecutor(1) as writer:
                pending = None
                largest = max(leaf.chunk_bytes for leaf in values)
                buffers = itertools.cycle([np.empty(largest, np.uint8) for _ in range(2)])
                for leaf, info in zip(values, infos, strict=True):
                    folder = Path(str(info.path))
                    folder.mkdir()
                    (folder / ".zarray").write_text(json.dumps(_zarr_metadata(leaf)))
                    for start, rows in leaf.chunks(buffers):
                        if pending is not None:
                            progress(pending.result())
                        pending = writer.submit(_write_chunk, folder, leaf, start, rows)
                if pending is not None:
                    progress(pending.result())
            return []

    return LeafHandler()


def _zarr_metadata(leaf: Leaf) -> dict[str, Any]:
    """A plain zarr array: weights do not compress, so none are."""
    return {
        "zarr_format": 2,
        "shape": leaf.shape,
        "chunks": (leaf.chunk_rows, *leaf.shape[1:]),
        "dtype": "bfloat16" if leaf.dtype == ml_dtypes.bfloat16 else leaf.dtype.str,
        "order": "C",
        "dimension_separator": ".",
        "fill_value": None,
        "compressor": None,
        "filters": None,
    }


def _write_chunk(folder: Path, leaf: Leaf, start: int, rows: np.ndarray) -> int:
    """The raw bytes of a chunk; the last one is as long as the others. tensorstore would copy them twice."""
    index = [start // leaf.chunk_rows, *[0] * (len(leaf.shape) - 1)]
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    with (folder / ".".join(map(str, index))).open("wb") as file:
        file.write(data)
        file.truncate(leaf.chunk_bytes)
    return len(data)


def _restore_orbax(path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    with _orbax() as ocp:
        tree = configs.nested(wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            try:
                restored = checkpointer.restore(path.absolute(), args=args)
            except Exception as error:
                # Orbax has no error of its own for what it cannot read.
                if type(error) not in (Exception, ValueError, FileNotFoundError):
                    raise
                reason = str(error).splitlines()[0][:200]
                raise UserError(f"{path} is damaged or incomplete: {reason}; convert it again") from error
    return {path_name(key): value for key, value in _flatten(restored)}
