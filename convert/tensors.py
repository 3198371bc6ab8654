"""Tensors that stay in their file until someone asks: views of a memory map, and parameters made of them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import CheckpointError

# The bytes of a parameter that are held at once, unless one layer alone is larger.
CHUNK_BYTES = 64 << 20

# Name in a safetensors header -> numpy dtype; torch's names lead to the same dtypes (torch_file.py).
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16), "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64), "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32), "F64": np.dtype(np.float64), "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz), "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class MappedFile:
    """A file mapped read-only. Raises CheckpointError when it cannot be opened, is not a file or is empty.

    content: what is in it, where that has been read already (a member of an archive).
    """

    map: mmap.mmap | bytes

    def __init__(self, path: Path, content: bytes | None = None):
        self.path = path
        if content is not None:
            self.map, self.size = content, len(content)
            return
        try:
            if path.exists() and not path.is_file():
                # Opening a pipe would wait for whoever writes into it.
                raise CheckpointError(f"{path}: not a regular file")
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file") from error
        except (OSError, ValueError) as error:
            reason = "the file is empty" if isinstance(error, ValueError) else error.strerror
            raise CheckpointError(f"{path}: cannot be read: {reason}") from error
        self.size = len(self.map)

    def release(self, offset: int, nbytes: int) -> None:
        """Give the pages wholly inside [offset, offset + nbytes) back; they are read again if needed."""
        page = mmap.PAGESIZE
        start, stop = -(-offset // page) * page, (offset + nbytes) // page * page
        if stop > start and isinstance(self.map, mmap.mmap) and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a mapped file, bounds already checked. strides: in elements, None when contiguous."""

    file: MappedFile
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    big_endian: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements from the first to the last, those between included."""
        if self.strides is None or not self.nbytes:
            return self.nbytes // self.dtype.itemsize
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def array(self) -> np.ndarray:
        """The values, without a copy (a big-endian file is copied into this machine's order)."""
        size, strides = self.dtype.itemsize, self.strides
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        raw = np.dtype(f"u{size}") if size <= 8 else self.dtype
        flat = np.frombuffer(self.file.map, raw, self.extent, self.offset)
        if self.big_endian:
            flat = self._swapped(flat)
        flat = flat.view(self.dtype)
        if strides is None:
            return flat.reshape(self.shape)
        byte_strides = tuple(s * size for s in strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, byte_strides, writeable=False)

    def _swapped(self, flat: np.ndarray) -> np.ndarray:
        if self.dtype.kind == "c":  # each half on its own
            return flat.view(f"u{self.dtype.itemsize // 2}").byteswap()
        return flat.byteswap()

    def release(self) -> None:
        """Let the operating system take back what `array` has touched."""
        self.file.release(self.offset, self.extent * self.dtype.itemsize)


@dataclass(frozen=True)
class Leaf:
    """One parameter of a component, made on demand: read(start, stop) gives those rows of its first axis.

    fill: the same, as fill(start, out), for a reader that can spare an allocation. whole: reading a part costs as
    much as reading all, so it is read at once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    fill: Callable[[int, np.ndarray], None] | None = None
    whole: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def chunk_rows(self) -> int:
        """Rows of one chunk: as many as CHUNK_BYTES hold, at least one."""
        if self.whole:
            return self.shape[0]
        row = max(1, self.nbytes // self.shape[0])
        return max(1, min(self.shape[0], CHUNK_BYTES // row))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk that is not the last."""
        return self.chunk_rows * (self.nbytes // self.shape[0])

    def chunks(self, buffers: Iterator[np.ndarray] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) from the first chunk to the last.

        buffers: uint8 arrays of at least `chunk_bytes` to put the rows into, one after the other: fresh memory costs
        more than the copy that fills it.
        """
        for start in range(0, self.shape[0], self.chunk_rows):
            stop = min(start + self.chunk_rows, self.shape[0])
            if buffers is None or self.fill is None:
                yield start, self.read(start, stop)
                continue
            shape = (stop - start, *self.shape[1:])
            nbytes = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
            out = next(buffers)[:nbytes].view(self.dtype).reshape(shape)
            self.fill(start, out)
            yield start, out

    def array(self) -> np.ndarray:
        """The whole parameter."""
        return self.read(0, self.shape[0])

    @classmethod
    def of(cls, array: Any) -> Leaf:
        """A leaf over an array that is there already (numpy or jax; fetched from its device when read)."""
        return cls(tuple(array.shape), np.dtype(array.dtype), lambda start, stop: np.asarray(array)[start:stop])

    @classmethod
    def of_stored(cls, tensor: StoredTensor) -> Leaf:
        """A leaf over a tensor that stays in its file."""
        return cls(tensor.shape, tensor.dtype, lambda start, stop: tensor.array()[start:stop])

    @classmethod
    def filled(cls, shape: tuple[int, ...], dtype: np.dtype, fill: Callable[[int, np.ndarray], None]) -> Leaf:
        """A leaf that writes its rows wherever it is told to."""

        def read(start: int, stop: int) -> np.ndarray:
            out = np.empty((stop - start, *shape[1:]), dtype)
            fill(start, out)
            return out

        return cls(shape, dtype, read, fill)


def copy_into(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view; a large transposed matrix goes in strips, 2 to 3 times faster than at once."""
    if view.ndim != 2 or view.flags.c_contiguous or view.nbytes < 1 << 20:
        out[...] = view
        return
    for start in range(0, view.shape[1], 64):
        out[:, start : start + 64] = view[:, start : start + 64]
