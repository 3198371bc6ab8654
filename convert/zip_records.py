"""Where each file of an uncompressed zip archive lies: what torch.save writes, and nothing wider.

Layout: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (sections 4.3.7, 4.3.12, 4.3.14-16). Python's
zipfile would do, but it reads the whole directory before one can look at its size, and tells no data offsets.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from convert.errors import CheckpointError
from convert.tensors import MappedFile

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_UNKNOWN16, _UNKNOWN32 = 0xFFFF, 0xFFFFFFFF
# 14B has 1,100 records and a directory of 0.1 MB.
MAX_DIRECTORY = 64 << 20


class Record(NamedTuple):
    """Bytes [offset, offset + size) of the archive; plain: as they were, neither compressed nor encrypted."""

    offset: int
    size: int
    plain: bool


def zip_records(file: MappedFile) -> dict[str, Record]:
    """Every record by name; nothing is ever decompressed. Raises CheckpointError for what is damaged or overlaps."""

    def fail(trouble: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: damaged or unusual zip archive: {trouble}")

    try:
        position, size, count = _directory(file)
        if size > MAX_DIRECTORY or position + size > file.size:
            raise fail(f"its directory claims {size} bytes at {position}, in a file of {file.size}")
        directory = file.map[position : position + size]
        entries = list(_entries(directory, count))
        records: dict[str, Record] = {}
        for name, flags, method, packed, plain, local in entries:
            if name in records:
                raise fail(f"{name!r} occurs twice")
            offset = _data_offset(file, name, local, packed, limit=position)
            records[name] = Record(offset, packed, plain=method == 0 and packed == plain and not flags & 1)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise fail(str(error)) from error
    end = 0
    for name, record in sorted(records.items(), key=lambda item: item[1]):
        if record.offset < end:
            raise fail(f"{name!r} overlaps another record")
        end = record.offset + record.size
    return records


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """(offset, bytes, entries) of the central directory."""
    tail_start = max(0, file.size - (1 << 16) - 22)
    found = file.map.rfind(_END, tail_start)
    if found < 0:
        raise ValueError("it has no end record: the file is cut short, or no zip")
    count, size, position = struct.unpack("<HII", file.map[found + 10 : found + 20])
    if count == _UNKNOWN16 or size == _UNKNOWN32 or position == _UNKNOWN32:
        signature, _, end64, _ = struct.unpack("<4sIQI", file.map[max(0, found - 20) : found])
        if signature != _LOCATOR64 or file.map[end64 : end64 + 4] != _END64:
            raise ValueError("its zip64 end record is missing")
        count, size, position = struct.unpack("<QQQ", file.map[end64 + 32 : end64 + 56])
    return position, size, count


def _entries(directory: bytes, count: int):
    """(name, flags, method, packed size, plain size, offset of the local header) of each entry."""
    position = 0
    for _ in range(min(count, len(directory))):
        header = struct.unpack("<4s6H3I5H2I", directory[position : position + 46])
        if header[0] != _ENTRY:
            raise ValueError("its directory is out of step")
        flags, method = header[3], header[4]
        packed, plain, name_length, extra_length, comment_length = header[8:13]
        local = header[16]
        start = position + 46
        name = directory[start : start + name_length].decode("utf-8")
        extra = directory[start + name_length : start + name_length + extra_length]
        plain, packed, local = _widened(extra, plain, packed, local)
        yield name, flags, method, packed, plain, local
        position = start + name_length + extra_length + comment_length
    if position != len(directory):
        raise ValueError(f"its directory does not hold {count} entries")


def _widened(extra: bytes, *narrow: int) -> list[int]:
    """Replace the 32-bit numbers that say "see the zip64 field" by those found there, in order."""
    position, wide = 0, b""
    while position + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[position : position + 4])
        if kind == 1:
            wide = extra[position + 4 : position + 4 + length]
        position += 4 + length
    values = []
    for value in narrow:
        if value == _UNKNOWN32:
            (value,) = struct.unpack("<Q", wide[:8])
            wide = wide[8:]
        values.append(value)
    return values


def _data_offset(file: MappedFile, name: str, local: int, size: int, limit: int) -> int:
    """Where the bytes of a record start: behind its local header, whose padding is not the directory's."""
    if local + 30 > limit:
        raise ValueError(f"{name!r} starts at {local}, outside the file")
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.map[local : local + 30])
    if signature != _LOCAL or file.map[local + 30 : local + 30 + name_length] != name.encode():
        raise ValueError(f"{name!r} is not where the directory says")
    offset = local + 30 + name_length + extra_length
    if offset + size > limit:
        raise ValueError(f"{name!r} claims {size} bytes at {offset}, in a file of {file.size}")
    return offset
