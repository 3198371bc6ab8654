"""A tokenizer as `tokenizer.json`, from one or from sentencepiece's `spiece.model`.

Format: sentencepiece's `sentencepiece_model.proto` (ModelProto); the translation to `tokenizers` is that of
transformers' `convert_slow_tokenizer.SpmConverter`, with byte fallback where the model was trained with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from convert.errors import CheckpointError
from turbojax.tokenizer import Tokenizer

_NAMES = ("tokenizer.json", "spiece.model", "sentencepiece.model", "tokenizer.model")
_MAX_BYTES = 256 << 20
_UNIGRAM = 1


class _Kind:
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def convert_tokenizer(source: str | Path, out_dir: Path) -> Tokenizer:
    """Write OUT_DIR/tokenizer.json from a file, or from the folder that holds one; returns what it says.

    Raises CheckpointError when there is none or it is damaged, UserError when it lacks <pad> or </s>.
    """
    tokenizer = Tokenizer(read_backend(Path(source)))
    tokenizer.save(out_dir)
    return tokenizer


def read_backend(source: Path) -> tokenizers.Tokenizer:
    """The `tokenizers` object of a `tokenizer.json` or sentencepiece model."""
    file = source
    if source.is_dir():
        found = [source / name for name in _NAMES if (source / name).is_file()]
        if not found:
            raise CheckpointError(f"{source}: holds no tokenizer ({', '.join(_NAMES)})")
        file = found[0]
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; name a tokenizer.json or spiece.model, or their folder")
    if file.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes is no tokenizer")
    try:
        if file.suffix == ".json":
            return tokenizers.Tokenizer.from_file(str(file))
        return _from_sentencepiece(file.read_bytes())
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise CheckpointError(f"{file}: no tokenizer: {str(error)[:120]}") from error


def _from_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
    pieces: list[Piece] = []
    charsmap, model_type, byte_fallback = b"", _UNIGRAM, False
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer = dict(_fields(value))
            model_type, byte_fallback = trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0))
        elif number == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    if model_type != _UNIGRAM:
        raise ValueError(f"sentencepiece model type {model_type}; umT5's is unigram ({_UNIGRAM})")
    unknown = [i for i, piece in enumerate(pieces) if piece.kind == _Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError("a sentencepiece model needs exactly one unknown piece")
    vocabulary = [(piece.text, piece.score) for piece in pieces]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown[0], byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    # "first": text behind a special token starts no new word unless it starts with a blank, as in sentencepiece.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    control = [p.text for p in pieces if p.kind in (_Kind.CONTROL, _Kind.UNKNOWN)]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in control])
    own = [p.text for p in pieces if p.kind == _Kind.USER_DEFINED]
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in own])
    return backend


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, _Kind.NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: int, or bytes still to be read."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
        elif kind in (1, 2, 5):
            length, position = _varint(data, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
            if position + length > len(data):
                raise ValueError("cut short")
            value, position = data[position : position + length], position + length
        else:
            raise ValueError(f"field of unknown wire type {kind}")
        yield tag >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")
