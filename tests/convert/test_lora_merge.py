"""LoRAs and merges change weights as the reference's arithmetic does, and refuse what does not fit."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from golden.modules import relative
from random_modules import flat, random_module
from safetensors.numpy import save_file
from test_formats import run_dit

import turbojax
from convert import CheckpointError, apply_lora, convert_checkpoint, inspect_checkpoint, merge_checkpoints
from convert.assemble import read_component
from convert.merge import merge
from convert.tensors import Leaf
from turbojax.checkpoint import load_component, save_component
from turbojax.component import Component
from turbojax.config import DiTConfig, UMT5Config
from turbojax.quant import quantize_dit

SMALL = DiTConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, freq_dim=8)
UMT5 = UMT5Config(vocab_size=8, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=1)


@pytest.mark.parametrize("style", ["diffusers", "kohya", "original", "whole"])
def test_a_lora_of_each_style_merged_at_conversion(checkpoint, outputs, tmp_path, style):
    lora = [(checkpoint(f"loras/{style}.safetensors"), 0.75)]
    convert_checkpoint(checkpoint("diffusers_t2v"), tmp_path / "out", lora=lora)
    assert relative(run_dit(turbojax.load(tmp_path / "out", dtype="float32")), outputs[f"lora_{style}"]) < 2e-4
    # The LoRA matters: without it the output is another.
    assert relative(outputs["diffusers_t2v"], outputs[f"lora_{style}"]) > 0.01


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_a_lora_merged_at_load(checkpoint, outputs, tmp_path, format):
    convert_checkpoint(checkpoint("diffusers_t2v"), tmp_path / "out", format=format)
    lora = [(checkpoint("loras/original.safetensors"), 0.5), (checkpoint("loras/original.safetensors"), 0.25)]
    dit = load_component(tmp_path / "out", dtype="float32", lora=lora)
    assert relative(run_dit(dit), outputs["lora_original"]) < 2e-4


def component(config=SMALL, seed=0, dtype="float32") -> Component:
    module = random_module(config, dtype, seed)
    return Component(config, {path: Leaf.of(value) for path, value in flat(module).items()})


def test_sums_are_rounded_once_to_the_parameters_own_dtype(tmp_path):
    base = component(dtype="bfloat16")
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 16)).astype(np.float32), rng.standard_normal((24, 2)).astype(np.float32)
    tensors = {"blocks.1.ffn.0.lora_down.weight": down, "blocks.1.ffn.0.lora_up.weight": up}
    save_file(tensors | {"blocks.1.ffn.0.alpha": np.ones((), np.float32)}, tmp_path / "lora.safetensors")
    merged = apply_lora(base, tmp_path / "lora.safetensors", 2.0).leaves["blocks.ffn.up.kernel"]
    original = base.leaves["blocks.ffn.up.kernel"].array()
    expected = (original[1].astype(np.float32) + (up @ down).T).astype(ml_dtypes.bfloat16)
    assert merged.dtype == ml_dtypes.bfloat16
    assert np.array_equal(merged.read(1, 2)[0], expected)
    assert np.array_equal(merged.read(0, 1)[0], original[0])


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("blocks.0.self_attn.q.lora_A.weight", (2, 16), "one half"),
        ("blocks.0.self_attn.q.dora_scale", (16,), "unknown kind"),
        ("blocks.0.self_attn.q.hada_w1_a", (16,), "unknown kind"),
        ("blocks.0.cross_attn.k_img.diff", (16, 16), "k_img is unknown"),
        ("blocks.7.self_attn.q.diff", (16, 16), "blocks.7.self_attn.q is unknown"),
        ("blocks.0.self_attn.q.diff", (8, 8), "changes"),
        # As many numbers, in another order.
        ("blocks.0.ffn.2.diff", (24, 16), r"changes \[24, 16\], the model has \[16, 24\]"),
        ("blocks.0.ffn.2.diff", (384,), r"changes \[384\], the model has \[16, 24\]"),
        ("blocks.0.self_attn.q.alpha", (), "nothing that it scales"),
        ("blocks.0.self_attn.norm_q.diff_b", (16,), "no bias"),
        ("blocks.0.self_attn.q.alpha", (3,), "not one number"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, key, shape, words):
    good = {"blocks.0.ffn.0.diff_b": np.ones(24, np.float32)}
    save_file({key: np.ones(shape, np.float32), **good}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        apply_lora(component(), tmp_path / "l.safetensors")
    assert "l.safetensors" in str(caught.value)


def test_a_product_beside_a_difference_of_another_shape_is_refused(tmp_path):
    tensors = {"lora_A.weight": (2, 16), "lora_B.weight": (24, 2), "diff": (16, 24)}
    save_file({f"blocks.0.ffn.0.{k}": np.ones(s, np.float32) for k, s in tensors.items()}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=r"changes \[16, 24\], the model has \[24, 16\]"):
        apply_lora(component(), tmp_path / "l.safetensors")


def test_modulation_tables_change_too(tmp_path):
    """As the distillation LoRAs of lightx2v name them."""
    rng = np.random.default_rng(0)
    block, head = (rng.standard_normal((1, n, 16)).astype(np.float32) for n in (6, 2))
    tensors = {"diffusion_model.blocks.1.diff_m": block, "diffusion_model.head.diff_m": head}
    save_file(tensors, tmp_path / "l.safetensors")
    base, merged = component(), apply_lora(component(), tmp_path / "l.safetensors", 0.5)
    change = {k: merged.leaves[k].array() - base.leaves[k].array() for k in ("blocks.modulation", "head_modulation")}
    assert np.allclose(change["blocks.modulation"], [np.zeros((6, 16)), 0.5 * block[0]], atol=1e-6)
    assert np.allclose(change["head_modulation"], 0.5 * head[0], atol=1e-6)


def test_pefts_own_folder_tells_the_alpha(tmp_path):
    shapes = {"lora_A.weight": (2, 16), "lora_B.weight": (24, 2)}
    tensors = {f"base_model.model.blocks.1.ffn.0.{k}": np.ones(s, np.float32) for k, s in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base, merged = component(), apply_lora(component(), tmp_path)
    change = merged.leaves["blocks.ffn.up.kernel"].array() - base.leaves["blocks.ffn.up.kernel"].array()
    assert np.allclose(change, np.stack([np.zeros((16, 24)), np.full((16, 24), 6 / 2 * 2)]), atol=1e-5)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is not JSON"):
        apply_lora(component(), tmp_path)


def test_both_ways_of_changing_a_bias_add_up(tmp_path):
    tensors = {"lora_A.weight": (2, 16), "lora_B.weight": (24, 2), "lora_B.bias": (24,), "diff_b": (24,)}
    save_file({f"blocks.1.ffn.0.{k}": np.ones(s, np.float32) for k, s in tensors.items()}, tmp_path / "l.safetensors")
    base, merged = component(), apply_lora(component(), tmp_path / "l.safetensors")
    change = merged.leaves["blocks.ffn.up.bias"].array() - base.leaves["blocks.ffn.up.bias"].array()
    assert np.allclose(change, [[0.0], [2.0]], atol=1e-6)


@pytest.mark.parametrize(("value", "words"), [(np.ones(24, np.int32), "not a float"), (np.full(1, np.nan), "finite")])
def test_a_lora_of_what_is_no_number_is_refused(tmp_path, value, words):
    key = "diff_b" if value.dtype == np.int32 else "alpha"
    tensors = {f"blocks.0.ffn.0.{key}": value, "blocks.0.ffn.0.diff": np.ones((24, 16), np.float32)}
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match=words):
        apply_lora(component(), tmp_path / "l.safetensors")


def test_a_product_of_wrong_ranks_is_refused(tmp_path):
    down, up = np.ones((2, 16), np.float32), np.ones((24, 3), np.float32)
    save_file({"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="no product"):
        apply_lora(component(), tmp_path / "l.safetensors")


def test_int8_weights_and_other_models_take_no_lora(checkpoint, tmp_path):
    save_component(tmp_path / "q", quantize_dit(random_module(SMALL), "block"), format="safetensors")
    with pytest.raises(CheckpointError, match="int8"):
        apply_lora(read_component(tmp_path / "q"), checkpoint("loras/kohya.safetensors"))
    with pytest.raises(CheckpointError, match="belong to the DiT"):
        apply_lora(component(UMT5), checkpoint("loras/kohya.safetensors"))


def test_a_lora_alone_is_no_model(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="--lora"):
        convert_checkpoint(checkpoint("loras/kohya.safetensors"), tmp_path / "out")
    text = inspect_checkpoint(checkpoint("loras/kohya.safetensors"))
    assert "rank 4: 20 modules" in text
    assert "--lora" in text


# Merges


def test_merge_is_the_references_arithmetic_and_lets_sla_in(tmp_path):
    sla = dataclasses.replace(SMALL, linear_branch=True)
    folders = []
    for i, config in enumerate((SMALL, SMALL, sla)):
        folders.append(tmp_path / str(i))
        save_component(folders[i], random_module(config, "bfloat16", seed=i), format="safetensors")
    merge_checkpoints(*folders, tmp_path / "out", weight=0.5)
    merged = flat(load_component(tmp_path / "out"))
    base, before, after = (flat(load_component(folder)) for folder in folders)
    assert merged.keys() == after.keys()
    for path, value in merged.items():
        if path not in base:
            assert "proj_l" in path
            expected = after[path]
        else:
            wide = [x[path].astype(np.float32) for x in (base, before, after)]
            expected = (wide[0] + np.float32(0.5) * (wide[2] - wide[1])).astype(base[path].dtype)
        assert value.dtype == expected.dtype
        assert np.array_equal(value, expected), path
    assert load_component(tmp_path / "out").config == sla


def test_weight_zero_keeps_the_base_and_one_reaches_the_target():
    base, target = component(seed=0), component(seed=1)
    for weight, expected in ((0.0, base), (1.0, target)):
        merged = merge(base, base, target, weight)
        for path, leaf in merged.leaves.items():
            assert np.allclose(leaf.array(), expected.leaves[path].array(), atol=1e-6), path


def test_models_that_cannot_be_merged_are_refused(tmp_path):
    other = component(dataclasses.replace(SMALL, ffn_dim=32))
    with pytest.raises(CheckpointError, match=r"blocks.ffn.up.kernel is \[2, 16, 24\] in the base, \[2, 16, 32\]"):
        merge(component(), other, other)
    with pytest.raises(CheckpointError, match="cannot merge a UMT5Config"):
        merge(component(), component(), component(UMT5))
    with pytest.raises(CheckpointError, match="not a number"):
        merge(component(), component(), component(), float("nan"))
    save_component(tmp_path / "q", quantize_dit(random_module(SMALL), "block"), format="safetensors")
    with pytest.raises(CheckpointError, match="target has int8"):
        merge(component(), component(), read_component(tmp_path / "q"))
    sla = component(dataclasses.replace(SMALL, linear_branch=True))
    with pytest.raises(CheckpointError, match="in the target base, but not in the base"):
        merge(component(), sla, sla)
