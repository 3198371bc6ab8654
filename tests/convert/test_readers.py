"""The readers give torch's own numbers for everything a file can hold, without copies, and refuse the rest by name."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import CheckpointError, convert_checkpoint
from convert.safetensors_file import read_safetensors, write_safetensors
from convert.source import open_source
from convert.tensors import DTYPES, Leaf
from convert.torch_file import read_torch


def test_every_dtype_view_and_nesting_of_a_torch_file(checkpoint, outputs):
    tensors = read_torch(checkpoint("containers/all.pth"))
    expected = {k.removeprefix("container/"): v for k, v in outputs.items() if k.startswith("container/")}
    assert set(tensors) == {f"state_dict.{name}" for name in expected} | {"list.0", "list.1.inner"}
    for name, value in expected.items():
        array = tensors[f"state_dict.{name}"].array()
        assert array.shape == value.shape, name
        assert np.array_equal(array.astype(value.dtype), value), name
        if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            assert array.dtype == np.dtype(getattr(ml_dtypes, name))
        elif name in ("int8", "bool", "uint16", "float64", "complex64"):
            assert array.dtype == np.dtype(name)


def test_tensors_are_views_of_the_map(checkpoint):
    tensors = read_torch(checkpoint("containers/all.pth"))
    array = tensors["state_dict.transposed"].array()
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert array.strides == (4, 24)
    slice_ = tensors["state_dict.slice"]
    assert slice_.file is tensors["state_dict.transposed"].file


def test_big_endian_files_are_swapped(checkpoint, outputs):
    tensors = read_torch(checkpoint("containers/big.pth"))
    assert len(tensors) == 5
    for name, tensor in tensors.items():
        expected = outputs[f"container/{name}"]
        assert np.array_equal(tensor.array().astype(expected.dtype), expected), name


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("legacy.pth", "before 1.6"),
        ("script.pt", "TorchScript"),
        ("module.pth", "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_state_dict_is_refused_with_advice(checkpoint, file, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_torch(checkpoint(f"containers/{file}"))
    assert file in str(caught.value)
    assert "state" in str(caught.value) or "save" in str(caught.value)


# safetensors


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "c": rng.integers(-128, 127, (2, 3, 4), np.int8),
        "d": np.arange(3, dtype=np.int64),
        "e": np.zeros((0, 4), np.float32),
    }


def test_safetensors_agree_with_the_library_in_both_directions(tmp_path):
    save_file(arrays(), tmp_path / "theirs.safetensors", metadata={"x": "y"})
    tensors, metadata = read_safetensors(tmp_path / "theirs.safetensors")
    assert metadata == {"x": "y"}
    for name, value in arrays().items():
        assert tensors[name].array().dtype == value.dtype
        assert np.array_equal(tensors[name].array(), value)
    leaves = {name: Leaf.of(value) for name, value in arrays().items() if value.size}
    write_safetensors(tmp_path / "ours.safetensors", leaves, {"x": "y"})
    for name, value in load_file(tmp_path / "ours.safetensors").items():
        assert np.array_equal(value, arrays()[name])


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}  # type: ignore[call-overload]


LIES = {
    "empty": b"",
    "short": b"1234567",
    "header past the end": struct.pack("<Q", 1 << 60) + b"{}",
    "header of gigabytes": struct.pack("<Q", 17 << 20) + b" " * (17 << 20),
    "no JSON": raw(b"{" * 9),
    "deep JSON": raw(b"[" * 100000),
    "a list": raw([]),
    "not UTF-8": raw(b"\xff\xfe"),
    "twice": raw(b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}", b"1234"),
    "unknown dtype": raw({"a": tensor("F3")}, b"1234"),
    "no dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "huge shape": raw({"a": tensor(shape=[1 << 60, 1 << 60])}, b"1234"),
    "negative shape": raw({"a": tensor(shape=[-1])}, b"1234"),
    "float shape": raw({"a": tensor(shape=[1.0])}, b"1234"),
    "true shape": raw({"a": tensor(shape=[True])}, b"1234"),
    "many dimensions": raw({"a": tensor(shape=[1] * 1000)}, b"1234"),
    "negative offset": raw({"a": tensor(offsets=[-4, 0])}, b"1234"),
    "past the end": raw({"a": tensor(offsets=[4, 8])}, b"1234"),
    "backwards": raw({"a": tensor(offsets=[4, 0])}, b"1234"),
    "wrong size": raw({"a": tensor(shape=[2])}, b"1234"),
    "overlap": raw({"a": tensor(offsets=[0, 4]), "b": tensor(offsets=[0, 4])}, b"1234"),
    "hole": raw({"a": tensor(offsets=[4, 8])}, b"12345678"),
    "rest": raw({"a": tensor()}, b"12345678"),
    "metadata": raw({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_safetensors_header_is_refused(tmp_path, lie):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert "\n" not in str(caught.value)


# Shards and folders


def shards(folder: Path, weight_map: dict[str, str]) -> Path:
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_read_through_their_index(tmp_path):
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert set(open_source(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "plain file name"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "plain file name"),
        ({"a": "one.safetensors", "b": ".."}, "plain file name"),
        ({"a": "one.safetensors", "b": "b" * 300}, "plain file name"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "b is not in one"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "c is not in two"),
        ({"a": 1}, "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, words):
    shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "holds no checkpoint"),
        (["a.safetensors", "b.safetensors"], "name one"),
        (["model_index.json"], "whole diffusers pipeline"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
    ],
)
def test_a_folder_without_one_checkpoint_says_what_to_do(tmp_path, files, words):
    for file in files:
        (tmp_path / file).write_text("")
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx", "model.txt", "nothing.pth"])
def test_other_files_are_named(tmp_path, name):
    if name != "nothing.pth":
        (tmp_path / name).write_text("GGUF")
    with pytest.raises(CheckpointError, match=name):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_pointer_that_git_left_is_told_from_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_source(tmp_path / name)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="neither a regular file nor a folder"):
        open_source(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_source(tmp_path)


def test_names_out_of_a_file_cannot_break_the_line(tmp_path):
    save_file({"a\nb\x1b[31m": np.ones(1, np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out")
    assert r"a\nb\x1b[31m" in str(caught.value)
    assert str(caught.value).isprintable()


def test_every_dtype_has_one_name():
    assert len(set(DTYPES.values())) == len(DTYPES)
