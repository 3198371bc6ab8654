"""Kind, prefix and shape follow from names and shapes; what is foreign, incomplete or ambiguous is named."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from random_modules import flat, random_module
from safetensors.numpy import save_file

from convert import CheckpointError, convert_checkpoint, inspect_checkpoint
from convert.export import exported
from convert.recognise import recognise
from convert.source import Source, open_source
from convert.tensors import Leaf, StoredTensor
from turbojax.checkpoint import abstract_leaves, load_component
from turbojax.component import Component
from turbojax.config import PRESETS, DiTConfig, UMT5Config, VAEConfig

DIT = DiTConfig(dim=128, ffn_dim=24, num_heads=1, num_layers=2, text_dim=8, freq_dim=8)
VAE = VAEConfig(base_dim=2)
UMT5 = UMT5Config(vocab_size=11, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=2)


def tensors_of(config, naming="wan", dtype=np.float32) -> dict[str, np.ndarray]:
    """A small checkpoint in memory, by its tensors' names there."""
    leaves = {path: Leaf.of(v.astype(dtype)) for path, v in flat(random_module(config, "float32")).items()}
    return {name: leaf.array() for name, leaf in exported(Component(config, leaves), naming).items()}


@pytest.fixture(scope="module")
def dit_tensors():
    return tensors_of(DIT)


def converted(tmp_path, tensors, **options):
    save_file(tensors, tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", format="safetensors", **options)
    return load_component(tmp_path / "out", dtype="float32")


def refusal(tmp_path, tensors, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, tensors, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "in.safetensors") in message
    assert not (tmp_path / "out").exists()
    return message


# All but the small models', which have four heads in a width of 128: no weight tells.
WHOLE = [
    pytest.param(config, id=f"{name}-{type(config).__name__}-{getattr(config, 'linear_branch', '')}")
    for name, p in PRESETS.items()
    for config in (p.dit, dataclasses.replace(p.dit, linear_branch=True), p.vae, p.text_encoder)
    if not name.startswith("tiny")
]


@pytest.mark.parametrize("config", WHOLE)
@pytest.mark.parametrize("naming", ["wan", "diffusers"])
def test_the_shape_of_every_preset_is_inferred(config, naming):
    if naming == "diffusers" and getattr(config, "linear_branch", False):
        with pytest.raises(CheckpointError, match="proj_l"):
            exported(component(config), naming)
        return
    names = exported(component(config), naming)
    held = {name: StoredTensor(None, 0, leaf.dtype, leaf.shape) for name, leaf in names.items()}  # type: ignore[arg-type]
    found = recognise(Source("full.pth", held))  # type: ignore[arg-type]
    assert (found.naming, found.prefix, found.config) == (naming, "", config)


def component(config) -> Component:
    def unread(start: int, stop: int) -> np.ndarray:
        raise AssertionError("shapes must do")

    leaves = abstract_leaves(config)
    return Component(config, {path: Leaf(leaf.shape, np.dtype(leaf.dtype), unread) for path, leaf in leaves.items()})


@pytest.mark.parametrize(
    "prefix",
    ["net.", "net_ema.", "model.", "model.diffusion_model.", "module.", "_orig_mod.", "module._orig_mod.net.", "x.y."],
)
def test_prefixes_and_wrappers_come_off(tmp_path, dit_tensors, prefix):
    wrapped = {
        prefix + k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for k, v in dit_tensors.items()
    }
    dit = converted(tmp_path, wrapped)
    assert np.array_equal(flat(dit)["blocks.ffn.up.kernel"][1], dit_tensors["blocks.1.ffn.0.weight"].T)


def test_the_averaged_copy_wins_and_the_rest_is_reported(tmp_path, dit_tensors):
    tensors = {f"net.{k}": v for k, v in dit_tensors.items()}
    tensors |= {f"net_ema.{k}": v + 1 for k, v in dit_tensors.items()}
    tensors |= {f"net_fake_score.{k}": v for k, v in dit_tensors.items()}
    tensors["optimizer.state.0.exp_avg"] = np.zeros(3, np.float32)
    dit = converted(tmp_path, tensors)
    assert np.array_equal(dit.head.bias[...], dit_tensors["head.head.bias"] + 1)
    text = inspect_checkpoint(tmp_path / "in.safetensors")
    assert "prefix 'net_ema.'" in text
    assert f"{len(dit_tensors)} tensors, another copy of the model, at 'net.'" in text
    assert "1 tensors, the trainer's own state" in text
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "net", prefix="net")
    assert np.array_equal(load_component(tmp_path / "net", "float32").head.bias[...], dit_tensors["head.head.bias"])


def test_two_models_of_equal_rank_need_a_choice(tmp_path, dit_tensors):
    vae = tensors_of(VAE)
    tensors = {f"dit.{k}": v for k, v in dit_tensors.items()} | {f"vae.{k}": v for k, v in vae.items()}
    message = refusal(tmp_path, tensors)
    assert "dit at 'dit.'" in message
    assert "vae at 'vae.'" in message
    assert "--prefix" in message
    assert "found: 'dit.', 'vae.'" in refusal(tmp_path, tensors, prefix="net")
    assert converted(tmp_path, tensors, prefix="vae").config == VAE


def test_all_that_does_not_fit_is_listed_together(tmp_path, dit_tensors):
    tensors = dict(dit_tensors)
    del tensors["blocks.1.norm3.bias"]
    tensors["blocks.0.extra.weight"] = np.zeros(3, np.float32)
    tensors["blocks.0.self_attn.q.weight"] = np.zeros((5, 5), np.float32)
    tensors["head.head.weight"] = np.zeros((64, 128), np.int32)
    message = refusal(tmp_path, tensors)
    for part in (
        "4 tensors do not fit",
        "blocks.1.norm3.bias is missing",
        "blocks.0.extra.weight is unknown",
        "blocks.0.self_attn.q.weight is [5, 5], not [128, 128]",
        "head.head.weight is int32, not a float",
    ):
        assert part in message


def test_a_missing_layer_is_named(tmp_path, dit_tensors):
    tensors = {k.replace("blocks.1.", "blocks.2."): v for k, v in dit_tensors.items()}
    assert "layer 1 is missing of 3" in refusal(tmp_path, tensors)


def test_the_same_tensor_twice_is_refused(tmp_path, dit_tensors):
    tensors = dit_tensors | {"_orig_mod.head.head.bias": dit_tensors["head.head.bias"]}
    assert "the same tensor twice" in refusal(tmp_path, tensors)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.0.cross_attn.k_img.weight", "Wan 2.1 I2V"),
        ("img_emb.proj.1.weight", "Wan 2.1 I2V"),
        ("img_emb.emb_pos", "FLF2V"),
        ("condition_embedder.image_embedder.pos_embed", "FLF2V"),
        ("blocks.0.attn2.add_k_proj.weight", "Wan 2.1 I2V"),
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("encoder.downsamples.0.downsamples.0.residual.0.gamma", "TI2V-5B"),
        ("motion_encoder.enc.weight", "Animate"),
    ],
)
def test_relatives_are_recognised_and_refused(tmp_path, dit_tensors, name, words):
    message = refusal(tmp_path, dit_tensors | {f"net.{name}": np.zeros(1, np.float32)})
    assert "recognised as" in message
    assert words in message


def test_strangers_are_named(tmp_path):
    assert "not recognised: 1 tensors such as w" in refusal(tmp_path, {"w": np.zeros(1, np.float32)})


def test_heads_need_a_hint_when_the_width_tells_nothing(tmp_path):
    config = dataclasses.replace(DIT, dim=96, num_heads=4)
    tensors = tensors_of(config)
    assert "number of heads" in refusal(tmp_path, tensors)
    for hint in ('{"dim": 96, "num_heads": 4}', '{"num_attention_heads": 4, "attention_head_dim": 24}'):
        (tmp_path / "config.json").write_text(hint)
        assert recognise(open_source(tmp_path / "in.safetensors")).config == config
    for hint in ('{"dim": 768, "num_heads": 12}', '{"num_heads": 4}', "nonsense"):
        (tmp_path / "config.json").write_text(hint)
        assert "number of heads" in refusal(tmp_path, tensors)


def test_a_named_preset_overrides_what_is_inferred(tmp_path, dit_tensors):
    assert "do not fit" in refusal(tmp_path, dit_tensors, model="wan2.1-t2v-1.3b")
    with pytest.raises(CheckpointError, match="known: tiny"):
        converted(tmp_path, dit_tensors, model="wan")


def test_a_vae_of_other_latents_needs_their_statistics(tmp_path):
    config = VAEConfig(base_dim=2, z_dim=2, latents_mean=(1.0, 2.0), latents_std=(3.0, 4.0))
    tensors = tensors_of(config)
    assert "latents_mean" in refusal(tmp_path, tensors)
    (tmp_path / "config.json").write_text('{"latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0]}')
    assert converted(tmp_path, tensors).config == config


def test_unused_and_tied_parts_of_a_whole_umt5_are_left_out(tmp_path):
    tensors = tensors_of(UMT5, "diffusers")
    tensors["decoder.block.0.layer.0.layer_norm.weight"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = np.ones((11, 8), np.float32)
    tensors["spiece_model"] = np.ones(40, np.uint8)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    assert converted(tmp_path, tensors).config == UMT5
    (tmp_path / "out" / "config.json").unlink()
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match="should be one tensor"):
        converted(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16])
def test_other_precisions_keep_what_they_can(tmp_path, dit_tensors, dtype):
    tensors = {k: v.astype(dtype) for k, v in dit_tensors.items()}
    loaded = flat(converted(tmp_path, tensors))
    assert np.array_equal(loaded["blocks.ffn.up.bias"][1], tensors["blocks.1.ffn.0.bias"].astype(np.float32))


def test_layers_of_mixed_precision_take_the_widest(tmp_path, dit_tensors):
    tensors = dict(dit_tensors)
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].astype(ml_dtypes.bfloat16)
    loaded = flat(converted(tmp_path, tensors))
    assert np.array_equal(loaded["blocks.ffn.up.kernel"][1], dit_tensors["blocks.1.ffn.0.weight"].T)


def test_dtype_casts_all_but_what_stays_float32(tmp_path, dit_tensors):
    save_file(dit_tensors, tmp_path / "in.safetensors")
    written = convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", dtype="bfloat16")
    assert written.leaves["blocks.ffn.up.kernel"].dtype == ml_dtypes.bfloat16
    assert written.leaves["blocks.modulation"].dtype == np.float32
    assert load_component(tmp_path / "out").blocks.ffn.up.kernel.dtype == ml_dtypes.bfloat16


def test_both_patch_embeddings_give_the_same_kernel(tmp_path, dit_tensors):
    flat2d = dit_tensors | {"patch_embedding.weight": dit_tensors["patch_embedding.weight"].reshape(128, -1)}
    assert dit_tensors["patch_embedding.weight"].shape == (128, 16, 1, 2, 2)
    kernels = []
    for name, tensors in (("conv", dit_tensors), ("linear", flat2d)):
        (tmp_path / name).mkdir()
        kernels.append(flat(converted(tmp_path / name, tensors))["patch_embedding.kernel"])
    assert np.array_equal(*kernels)
