"""What was converted goes back bit for bit, in the original's names and in diffusers'."""

import json

import numpy as np
import pytest
from golden.modules import relative
from random_modules import flat, random_module
from safetensors.numpy import load_file
from test_formats import run_dit

import turbojax
from convert import CheckpointError, convert_checkpoint, export_checkpoint
from convert.recognise import recognise
from convert.source import open_source
from turbojax.checkpoint import load_component, save_component
from turbojax.config import PRESETS, DiTConfig
from turbojax.quant import quantize_dit

# checkpoint -> the format that gives its own tensors back
ROUND_TRIPS = {
    "wan_t2v": "wan",
    "wan_i2v/wan22_i2v.pth": "wan",
    "diffusers_t2v": "diffusers",
    "turbo_merged/merged.pth": "wan",
    "turbo_released/TurboWan.pth": "wan",
    "turbo_quant/TurboWan-quant.pth": "wan",
    # No SLA and no int8: nothing but the format says that the patch embedding is a Linear.
    "turbo_training/iter_7.ckpt": "turbodiffusion",
    "wan_vae/Wan2.1_VAE.pth": "wan",
    "diffusers_vae": "diffusers",
    "wan_umt5/models_t5_umt5-enc-bf16.pth": "wan",
    "diffusers_umt5/st": "diffusers",
}
SMALL = DiTConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, freq_dim=8)


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
@pytest.mark.parametrize(("source", "naming"), ROUND_TRIPS.items(), ids=ROUND_TRIPS)
def test_round_trip_gives_the_very_bits_names_and_shapes(checkpoint, tmp_path, source, naming, format):
    convert_checkpoint(checkpoint(source), tmp_path / "out", format=format)
    export_checkpoint(tmp_path / "out", tmp_path / "back.safetensors", format=naming)
    before = recognise(open_source(checkpoint(source))).tensors
    after = open_source(tmp_path / "back.safetensors").tensors
    assert set(before) == set(after)
    for name, tensor in before.items():
        a, b = tensor.array(), after[name].array()
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert a.tobytes() == b.tobytes(), name


def test_naming_changes_nothing_that_the_model_computes(checkpoint, outputs, tmp_path):
    convert_checkpoint(checkpoint("wan_t2v"), tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b.safetensors", format="diffusers")
    convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c")
    assert set(load_file(tmp_path / "b.safetensors")) == set(open_source(checkpoint("diffusers_t2v")).tensors)
    assert relative(run_dit(turbojax.load(tmp_path / "c", dtype="float32")), outputs["wan_t2v"]) < 2e-4


@pytest.mark.parametrize("part", ["dit", "vae", "text_encoder"])
def test_the_header_tells_what_weights_do_not(tmp_path, part):
    config = getattr(PRESETS["tiny"], part)
    module = random_module(config)
    save_component(tmp_path / "a", module, format="safetensors")
    export_checkpoint(tmp_path / "a", tmp_path / "b.safetensors")
    convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c", format="safetensors")
    assert load_component(tmp_path / "c").config == config


def test_dtype_casts_floats_alone(tmp_path):
    save_component(tmp_path / "a", quantize_dit(random_module(SMALL), "block"), format="safetensors")
    export_checkpoint(tmp_path / "a", tmp_path / "b.safetensors", dtype="float16")
    dtypes = {name: str(value.dtype) for name, value in load_file(tmp_path / "b.safetensors").items()}
    assert dtypes["blocks.0.ffn.0.int8_weight"] == "int8"
    assert dtypes["blocks.0.ffn.0.bias"] == dtypes["head.modulation"] == "float16"


def test_what_a_format_cannot_say_is_refused(tmp_path):
    save_component(tmp_path / "channel", quantize_dit(random_module(SMALL), "channel"), format="safetensors")
    save_component(tmp_path / "block", quantize_dit(random_module(SMALL), "block"), format="safetensors")
    sla = DiTConfig(**{**json.loads(json.dumps(vars(SMALL))), "patch_size": (1, 2, 2), "linear_branch": True})
    save_component(tmp_path / "sla", random_module(sla), format="safetensors")
    for source, naming, words in (
        ("channel", "wan", "one scale a channel"),
        ("block", "diffusers", "int8 weights"),
        ("sla", "diffusers", "proj_l"),
    ):
        with pytest.raises(CheckpointError, match=words):
            export_checkpoint(tmp_path / source, tmp_path / "out.safetensors", format=naming)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["block", "channel", "sla"]


def test_an_export_does_not_overwrite_unasked(tmp_path):
    save_component(tmp_path / "a", random_module(SMALL), format="safetensors")
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="there already"):
        export_checkpoint(tmp_path / "a", tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"call it b\.pth\.safetensors"):
        export_checkpoint(tmp_path / "a", tmp_path / "b.pth")
    export_checkpoint(tmp_path / "a", tmp_path / "b.safetensors", overwrite=True)
    assert np.array_equal(
        load_file(tmp_path / "b.safetensors")["blocks.1.ffn.0.weight"],
        flat(load_component(tmp_path / "a"))["blocks.ffn.up.kernel"][1].T,
    )
