"""The pickle of a state dict, read by a small machine that can build dicts, lists and tensors and call nothing.

Python's own unpickler imports and calls what the file names. This one knows the few names that torch.save
writes for a state dict and treats each as a symbol; any other name is refused before anything is done with it.
Sources: torch/_utils.py (_rebuild_*), torch/serialization.py (persistent ids), the opcodes in pickletools.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.errors import CheckpointError

# 14B with its optimizer takes 0.4 million instructions and 2 MB.
MAX_INSTRUCTIONS = 4_000_000
MAX_BYTES = 32 << 20

TORCH_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip


class Symbol(NamedTuple):
    """A name of the allow-list, standing for itself."""

    name: str


class Storage(NamedTuple):
    """A tensor's bytes: the record `key` of the archive. dtype None: counted in bytes."""

    dtype: np.dtype | None
    key: str
    count: int


class PickledTensor(NamedTuple):
    """What `_rebuild_tensor_v2` was to make: a view of a storage, offset and strides in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """The pickle asks for something that a state dict does not need."""


class _Mark:
    pass


def read_state_pickle(data: bytes, path: Any) -> Any:
    """Nested dicts, lists and tuples of scalars and `PickledTensor`. Raises CheckpointError naming `path`."""
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{path}: its pickle has {len(data)} bytes; a state dict needs less than {MAX_BYTES}")
    try:
        return _run(data)
    except _Refused as error:
        raise CheckpointError(
            f"{path}: refused: {error}, which a state dict does not need and which could run code; "
            "save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:
        # Whatever a damaged pickle trips over, in pickletools or below, is the file's fault.
        raise CheckpointError(f"{path}: damaged pickle: {type(error).__name__}: {str(error)[:120]}") from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    for count, (opcode, arg, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if count > MAX_INSTRUCTIONS:
            raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            (result,) = stack
            return result
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _SCALARS:
            if isinstance(arg, int) and not -(2**63) <= arg < 2**64:
                raise ValueError("an integer of more than 64 bits")
            stack.append(arg)
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            above_mark()
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(str(arg))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(str(arg))])
        elif name in _TUPLES:
            n = _TUPLES[name]
            items = tuple(stack[len(stack) - n :])
            if len(items) != n or _Mark in items:
                raise ValueError("a tuple of too few items")
            stack[len(stack) - n :] = [items]
        elif name == "TUPLE":
            stack.append(tuple(above_mark()))
        elif name == "LIST":
            stack.append(above_mark())
        elif name == "DICT":
            stack.append(_filled({}, above_mark()))
        elif name == "APPEND":
            item = stack.pop()
            _as(list, stack[-1]).append(item)
        elif name == "APPENDS":
            items = above_mark()
            _as(list, stack[-1]).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _filled(_as(dict, stack[-1]), [key, value])
        elif name == "SETITEMS":
            items = above_mark()
            _filled(_as(dict, stack[-1]), items)
        elif name == "GLOBAL":
            stack.append(_symbol(str(arg).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_symbol(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            args, function = _as(tuple, stack.pop()), stack.pop()
            stack.append(_reduce(function, args))
        elif name == "BUILD":
            # Attributes of a dict or tensor (`_metadata`, a parameter's flags): not needed.
            stack.pop()
            if not isinstance(stack[-1], (dict, PickledTensor)):
                raise _Refused(f"its pickle sets the state of a {type(stack[-1]).__name__}")
        else:
            raise _Refused(f"its pickle uses {name}")
    raise ValueError("no STOP")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list,
}  # fmt: skip
_SCALARS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _filled(table: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Add [key, value, key, value...]. Keys are scalars: the hash of a nested tuple can take for ever."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise ValueError(f"a {type(key).__name__} as a key")
        table[key] = value
    return table


# What may be called, with what it becomes here.


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    flat = [x for pair in pairs for x in _pair(pair)]
    return _filled({}, flat)


def _pair(pair: Any) -> Any:
    if type(pair) not in (list, tuple) or len(pair) != 2:
        raise ValueError("a dict of something else than pairs")
    return pair


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any = None, hooks: Any = None, *rest: Any
) -> PickledTensor:
    """`_rebuild_tensor_v2`, and v3, whose seventh argument is the dtype that the storage does not tell."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    dtype = storage.dtype
    if rest and isinstance(rest[0], Symbol):
        dtype = TORCH_DTYPES.get(rest[0].name.removeprefix("torch."))
    if dtype is None:
        raise ValueError("a tensor without a dtype")
    shape, strides = _whole_numbers(shape), _whole_numbers(strides)
    (offset,) = _whole_numbers((offset,))
    if len(shape) != len(strides):
        raise ValueError(f"a shape of {len(shape)} and strides of {len(strides)} dimensions")
    return PickledTensor(storage, dtype, offset, shape, strides)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > 16 or not all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        raise ValueError("a shape, stride or offset that is none")
    return values


def _parameter(tensor: Any, *_: Any) -> PickledTensor:
    return _as(PickledTensor, tensor)


def _from_type(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """`_rebuild_from_type_v2`: a tensor with attributes of its own, which are dropped."""
    if not isinstance(kind, Symbol):
        raise ValueError("a type that is none")
    return _reduce(function, _as(tuple, args))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda sizes=(): tuple(_as(tuple, sizes)),
    "torch.device": lambda *place: None,
    "builtins.set": lambda items=(): list(_as(list, items)),
    "__builtin__.set": lambda items=(): list(_as(list, items)),
}
_NAMES = {
    *(f"torch.{name}" for name in TORCH_DTYPES),
    *(f"torch.{name}" for name in _STORAGES),
    "torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage",
    "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("list", "dict", "int", "float", "str")),
}  # fmt: skip


def _symbol(name: str) -> Symbol:
    if name not in _CALLS and name not in _NAMES:
        raise _Refused(f"its pickle asks for {name[:80]!r}")
    return Symbol(name)


def _reduce(function: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(function, Symbol) or function.name not in _CALLS:
        raise _Refused(f"its pickle calls {getattr(function, 'name', type(function).__name__)!r}")
    return _CALLS[function.name](*args)


def _storage(identity: Any) -> Storage:
    """('storage', type, key, device, count), as torch's `persistent_id` writes it."""
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("an unknown persistent id")
    _, kind, key, _, count = identity
    if not isinstance(kind, Symbol) or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a storage that is none")
    name = kind.name.rpartition(".")[2]
    if name.endswith("UntypedStorage"):
        return Storage(None, key, count)
    if name not in _STORAGES:
        raise ValueError(f"a storage of type {kind.name}")
    return Storage(np.dtype(TORCH_DTYPES[_STORAGES[name]]), key, count)
