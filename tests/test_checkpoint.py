"""A component folder gives back exactly what was saved, and says in one line what is wrong with a broken one."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from random_modules import flat, random_module

import turbojax
from convert.tensors import Leaf
from turbojax.checkpoint import load_component, open_component, save_component
from turbojax.component import Component
from turbojax.config import DiTConfig, UMT5Config, VAEConfig
from turbojax.errors import UserError
from turbojax.models.dit import WanDiT
from turbojax.models.umt5 import UMT5Encoder
from turbojax.models.vae import WanVAE
from turbojax.quant import QuantizedLinear, quantize_dit

DIT = DiTConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=3, text_dim=8, freq_dim=8, linear_branch=True)
VAE = VAEConfig(base_dim=4, z_dim=2, latents_mean=(0.5, -1.0), latents_std=(2.0, 3.0))
UMT5 = UMT5Config(vocab_size=11, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=2)
MODULES = [(WanDiT, DIT), (WanVAE, VAE), (UMT5Encoder, UMT5)]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert a[path].tobytes() == b[path].tobytes(), path


def dit(**kwargs) -> Any:
    return random_module(DIT, **kwargs)


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
@pytest.mark.parametrize(("cls", "config"), MODULES, ids=["dit", "vae", "umt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(tmp_path, cls, config, dtype, format):
    module = random_module(config, dtype)
    save_component(tmp_path / "out", module, format=format)
    loaded = turbojax.load(tmp_path / "out")
    assert type(loaded) is cls
    assert loaded.config == config
    assert_same(flat(loaded), flat(module))


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_dtype_casts_all_but_the_parts_kept_in_float32(tmp_path, format):
    save_component(tmp_path / "out", dit(dtype="float32"), format=format)
    loaded = flat(load_component(tmp_path / "out", dtype="bfloat16"))
    assert loaded["blocks.ffn.up.kernel"].dtype == ml_dtypes.bfloat16
    assert loaded["blocks.modulation"].dtype == np.float32
    original = flat(dit(dtype="float32"))
    assert np.array_equal(loaded["blocks.ffn.up.kernel"], original["blocks.ffn.up.kernel"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_parameters_may_come_as_a_tree_and_have_no_dtype_of_their_own(tmp_path, format):
    module = dit()
    tree = nnx.to_pure_dict(nnx.state(module))
    save_component(tmp_path / "tree", (DIT, tree), format=format)
    assert_same(flat(load_component(tmp_path / "tree")), flat(module))
    leaves = {path: Leaf.of(value.astype(np.float32)) for path, value in flat(module).items()}
    save_component(tmp_path / "leaves", Component(DIT, leaves), format=format)
    assert flat(load_component(tmp_path / "leaves"))["blocks.ffn.up.kernel"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_int8_weights_stay_int8(tmp_path, format, granularity):
    module = quantize_dit(dit(), granularity)
    save_component(tmp_path / "out", module, format=format)
    loaded = load_component(tmp_path / "out")
    assert isinstance(loaded.blocks.ffn.up, QuantizedLinear)
    assert loaded.blocks.ffn.up.weight_q.dtype == np.int8
    assert_same(flat(loaded), flat(module))
    storage = json.loads((tmp_path / "out" / "config.json").read_text())["storage"]
    assert storage["quantized"]["blocks.self_attn.o"] == granularity


def test_a_parameter_larger_than_a_chunk_is_written_and_read_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.tensors.CHUNK_BYTES", 256)
    seen = []
    original = flat(dit())

    def watched(path: str) -> Leaf:
        def read(start: int, stop: int) -> np.ndarray:
            seen.append((path, stop - start))
            return original[path][start:stop]

        return Leaf(original[path].shape, original[path].dtype, read)

    save_component(tmp_path / "out", Component(DIT, {path: watched(path) for path in original}))
    assert max(rows for path, rows in seen if path == "blocks.ffn.up.kernel") == 1
    assert_same(flat(load_component(tmp_path / "out")), original)
    opened = open_component(tmp_path / "out")
    assert np.array_equal(opened.leaves["blocks.ffn.up.kernel"].read(1, 3), original["blocks.ffn.up.kernel"][1:3])


def test_orbax_itself_reads_the_parameters(tmp_path):
    import orbax.checkpoint as ocp

    save_component(tmp_path / "out", dit())
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "out" / "params")
    assert np.array_equal(tree["blocks"]["ffn"]["up"]["kernel"], flat(dit())["blocks.ffn.up.kernel"])


def test_progress_counts_every_byte(tmp_path):
    for format in ("orbax", "safetensors"):
        counted = []
        save_component(tmp_path / format, dit(), format=format, progress=counted.append)
        assert sum(counted) == sum(v.nbytes for v in flat(dit()).values())


_SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from turbojax.checkpoint import load_component
assert len(jax.devices()) == 2
saved = bytes.fromhex(sys.argv[1])
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def rule(path, spec):
    return NamedSharding(mesh, P(None, "x") if path == "blocks.ffn.up.kernel" else P())
for folder in sys.argv[2:]:
    kernel = load_component(folder, sharding=rule).blocks.ffn.up.kernel[...]
    print([s.data.shape for s in kernel.addressable_shards], np.asarray(kernel).tobytes() == saved)
"""


def test_load_places_each_shard_on_its_own_device(tmp_path):
    folders = []
    for format in ("orbax", "safetensors"):
        save_component(tmp_path / format, dit(), format=format)
        folders.append(str(tmp_path / format))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    saved = flat(dit())["blocks.ffn.up.kernel"].tobytes().hex()
    result = subprocess.run(
        [sys.executable, "-c", _SHARDED, saved, *folders], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == ["[(3, 8, 24), (3, 8, 24)] True"] * 2


# What is broken is named.


@pytest.fixture(params=["orbax", "safetensors"])
def saved(request, tmp_path):
    save_component(tmp_path / "dit", dit(), format=request.param)
    return tmp_path / "dit"


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_component(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_missing_folder_config_and_parameters_are_named(saved, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    for part in ("params", "params.safetensors"):
        path = saved / part
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    assert "no parameters" in refusal(saved)
    (saved / "config.json").unlink()
    assert "no config.json" in refusal(saved)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "pipeline.json").write_text("{}")
    assert "whole pipeline" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "dit"}', '{"kind": "what"}', '{"kind": "dit", "nonsense": 1}'])
def test_a_broken_config_is_named(saved, text):
    (saved / "config.json").write_text(text)
    assert "config.json" in refusal(saved)


def test_a_config_of_another_shape_is_refused(saved):
    fields = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(fields | {"num_layers": 2, "linear_branch": False}))
    message = refusal(saved)
    assert "does not fit" in message
    assert "proj_l" in message


def test_lost_and_cut_files_are_noticed(tmp_path):
    for damage in ("cut", "lost", "lost array", "metadata"):
        folder = tmp_path / damage.replace(" ", "_")
        save_component(folder, dit())
        array = folder / "params" / "blocks.ffn.up.kernel"
        chunk = array / "0.0.0"
        if damage == "cut":
            chunk.write_bytes(chunk.read_bytes()[:100])
        elif damage == "lost":
            chunk.unlink()
        elif damage == "metadata":
            (array / ".zarray").write_text("{}")
        else:
            shutil.rmtree(array)
        assert "blocks.ffn.up.kernel" in refusal(folder)
    save_component(tmp_path / "st", dit(), format="safetensors")
    path = tmp_path / "st" / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refusal(tmp_path / "st")


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_a_failed_save_leaves_nothing_and_keeps_what_was_there(tmp_path, format):
    save_component(tmp_path / "out", dit(), format=format)
    before = flat(load_component(tmp_path / "out"))

    def broken(start: int, stop: int) -> np.ndarray:
        raise OSError(28, "No space left on device")

    leaves = {path: Leaf.of(value) for path, value in before.items()}
    leaves["head.kernel"] = Leaf(leaves["head.kernel"].shape, leaves["head.kernel"].dtype, broken)
    with pytest.raises(UserError, match="there already"):
        save_component(tmp_path / "out", Component(DIT, leaves), format=format)
    for target, overwrite in (("out", True), ("new", False)):
        with pytest.raises(UserError, match="No space left"):
            save_component(tmp_path / target, Component(DIT, leaves), format=format, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["out"]
    assert_same(flat(load_component(tmp_path / "out")), before)
    save_component(tmp_path / "out", dit(dtype="float32"), format=format, overwrite=True)
    assert flat(load_component(tmp_path / "out"))["head.kernel"].dtype == np.float32
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_is_a_file_is_kept_and_a_link_is_followed(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is there already"):
        save_component(tmp_path / "file", dit(), format="safetensors", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        save_component(tmp_path / "link", dit(), format="safetensors", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "real"]
    assert (tmp_path / "link").is_symlink()
    for place in ("/", "x" * 300, "file/below"):
        with pytest.raises(UserError, match=r"there already|could not be written"):
            save_component(tmp_path / place, dit(), format="safetensors", overwrite=True)
