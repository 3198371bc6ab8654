"""Whole pipelines, tokenizers and the four commands; what fails leaves nothing behind."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from random_modules import flat, random_module
from safetensors.numpy import load_file

from convert import CheckpointError, convert_checkpoint, convert_pipeline, export_checkpoint, inspect_checkpoint
from convert import cli as convert_cli
from convert.tokenizer import read_backend
from turbojax.checkpoint import load_component, open_component, save_component
from turbojax.config import PRESETS
from turbojax.errors import UserError
from turbojax.pipeline_config import PipelineConfig, find_pipeline
from turbojax.quant import quantize_dit
from turbojax.tokenizer import Tokenizer, train_tiny_tokenizer

TINY = PRESETS["tiny"]


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of the small shapes, each part in another of the formats that people have."""
    folder = tmp_path_factory.mktemp("parts")
    for name, config, naming in (
        ("dit", TINY.dit, "wan"),
        ("sla", dataclasses.replace(TINY.dit, linear_branch=True), "wan"),
        ("vae", TINY.vae, "diffusers"),
        ("text_encoder", TINY.text_encoder, "wan"),
    ):
        save_component(folder / name, random_module(config, "float32"), format="safetensors")
        export_checkpoint(folder / name, folder / f"{name}.safetensors", format=naming)
    train_tiny_tokenizer(["a red circle"]).save(folder / "tokenizer")
    files = {name: folder / f"{name}.safetensors" for name in ("dit", "sla", "vae", "text_encoder")}
    return files | {"tokenizer": folder / "tokenizer"}


def given(parts, **changes):
    names = {k: parts[k] for k in ("dit", "vae", "text_encoder", "tokenizer")}
    return {**names, "format": "safetensors", **changes}


def test_a_pipeline_is_found_and_whole(parts, tmp_path):
    config = convert_pipeline(**given(parts, out=tmp_path / "pipe"))
    assert config == PipelineConfig.from_preset("tiny")
    found = find_pipeline(tmp_path / "pipe")
    assert (found.spec.dit, found.spec.vae, found.spec.text_encoder) == (TINY.dit, TINY.vae, TINY.text_encoder)
    kernel = load_file(parts["dit"])["blocks.3.ffn.0.weight"].T
    assert np.array_equal(flat(load_component(tmp_path / "pipe" / "dit", "float32"))["blocks.ffn.up.kernel"][3], kernel)
    text = inspect_checkpoint(tmp_path / "pipe")
    assert "pipeline of preset tiny" in text
    assert "vae: VAE (tiny or tiny-i2v)" in text


def test_a_distilled_model_samples_as_it_was_trained(parts, tmp_path):
    config = convert_pipeline(**given(parts, dit=parts["sla"], out=tmp_path / "pipe"))
    assert (config.sampler, config.steps, config.guidance) == ("rcm-sde", 4, (1.0, 1.0))
    assert config.attention == "sagesla"
    assert json.loads((tmp_path / "pipe" / "pipeline.json").read_text())["sampler"] == "rcm-sde"


def test_a_model_of_int8_weights_runs_as_it_is(parts, tmp_path):
    quantized = quantize_dit(load_component(parts["dit"].with_suffix("")), "block")
    save_component(tmp_path / "dit", quantized, format="safetensors")
    assert convert_pipeline(**given(parts, dit=tmp_path / "dit", out=tmp_path / "pipe")).quant == "w8a8"


def test_a_tokenizer_of_another_model_is_refused(parts, tmp_path):
    train_tiny_tokenizer(f"word{i}" for i in range(TINY.text_encoder.vocab_size)).save(tmp_path / "other")
    with pytest.raises(UserError, match="tokenizer has 131 tokens, the text encoder's embedding 128"):
        convert_pipeline(**given(parts, tokenizer=tmp_path / "other", out=tmp_path / "pipe"))
    assert os.listdir(tmp_path) == ["other"]


def test_a_converted_pipeline_is_no_checkpoint(parts, tmp_path):
    convert_pipeline(**given(parts, out=tmp_path / "pipe"))
    with pytest.raises(CheckpointError, match=r"a converted pipeline; name its part: .*pipe/dit, .*pipe/text_encoder"):
        export_checkpoint(tmp_path / "pipe", tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="converted already, so model 'tiny' has nothing to choose"):
        convert_checkpoint(tmp_path / "pipe" / "dit", tmp_path / "x", model="tiny")


def test_two_experts_need_a_preset_that_has_two(parts, tmp_path):
    with pytest.raises(CheckpointError, match="no preset has a DiT of this shape with two experts"):
        convert_pipeline(**given(parts, dit_low=parts["dit"], out=tmp_path / "pipe"))
    with pytest.raises(CheckpointError, match="tiny has one expert"):
        convert_pipeline(**given(parts, dit_low=parts["dit"], model="tiny", out=tmp_path / "pipe"))
    with pytest.raises(CheckpointError, match="--dit-low"):
        convert_pipeline(**given(parts, model="wan2.2-t2v-a14b", out=tmp_path / "pipe"))
    with pytest.raises(CheckpointError, match="two experts differ"):
        convert_pipeline(**given(parts, dit_low=parts["sla"], out=tmp_path / "pipe"))
    config = convert_pipeline(**given(parts, dit_low=parts["dit"], model="wan2.2-t2v-a14b", out=tmp_path / "pipe"))
    assert config.boundary == 0.875
    assert open_component(tmp_path / "pipe" / "dit_low").config == TINY.dit


@pytest.mark.parametrize(
    ("part", "other", "words"),
    [("vae", "dit", "not the vae"), ("dit", "vae", "not the dit"), ("tokenizer", "dit", "no tokenizer")],
)
def test_a_part_that_is_another_is_refused_and_nothing_stays(parts, tmp_path, part, other, words):
    with pytest.raises(CheckpointError, match=words):
        convert_pipeline(**given(parts, **{part: parts[other]}, out=tmp_path / "pipe"))
    assert os.listdir(tmp_path) == []


def test_an_output_that_is_there_is_kept(parts, tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "mine").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        convert_pipeline(**given(parts, out=tmp_path / "pipe"))
    assert os.listdir(tmp_path) == ["pipe"]
    assert os.listdir(tmp_path / "pipe") == ["mine"]


# Tokenizers


def test_a_sentencepiece_model_gives_sentencepieces_own_ids(checkpoint):
    tokenizer = Tokenizer(read_backend(checkpoint("tokenizer/spiece.model")))
    for case in json.loads(checkpoint("tokenizer/cases.json").read_text()):
        ids, mask = tokenizer(case["text"])
        assert ids[0, : mask.sum()].tolist() == [*case["ids"], tokenizer.eos_id], case["text"]


def test_tokenizer_json_comes_before_the_model_beside_it(checkpoint, tmp_path):
    train_tiny_tokenizer(["a red circle"]).save(tmp_path)
    (tmp_path / "spiece.model").write_bytes(checkpoint("tokenizer/spiece.model").read_bytes())
    assert read_backend(tmp_path).get_vocab_size() < 10


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x7f", b"not a model"])
def test_a_damaged_sentencepiece_model_is_named(tmp_path, data):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"spiece\.model"):
        read_backend(tmp_path)


# Commands


def command(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    convert_cli.add_arguments(parser.add_subparsers(dest="command"))
    return convert_cli.run(parser.parse_args([str(word) for word in argv]))


def test_commands_convert_inspect_export_and_merge(parts, tmp_path, capsys):
    out = tmp_path / "dit"
    assert command("convert", parts["dit"], "--out", out, "--format", "safetensors", "--dtype", "bfloat16") == 0
    assert "converted DiT (tiny)" in capsys.readouterr().out
    assert command("inspect", parts["dit"]) == 0
    assert "would become a DiT (tiny)" in capsys.readouterr().out
    assert (
        command("export", out, "--format", "diffusers", "--out", tmp_path / "e.safetensors", "--dtype", "float32") == 0
    )
    assert "MB in the names of diffusers" in capsys.readouterr().out
    assert "blocks.0.attn1.to_q.weight" in load_file(tmp_path / "e.safetensors")
    assert (
        command("merge", out, out, parts["sla"], "--weight", "0.5", "--out", tmp_path / "m", "--format", "safetensors")
        == 0
    )
    assert "DiT with SLA" in capsys.readouterr().out


def test_the_pipeline_command(parts, tmp_path, capsys):
    options = [f"--{name.replace('_', '-')}={parts[name]}" for name in ("dit", "vae", "text_encoder", "tokenizer")]
    assert command("convert", *options, "--out", tmp_path / "pipe", "--format", "safetensors") == 0
    assert "pipeline of preset tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["convert"], "also needs --dit, --vae, --text-encoder, --tokenizer"),
        (["convert", "--dit", "x"], "also needs --vae"),
        (["convert", "a", "--vae", "b"], "--vae belongs to a pipeline"),
        (["convert", "nowhere"], "nowhere: no such file"),
    ],
)
def test_command_mistakes_are_one_line(tmp_path, argv, words):
    with pytest.raises(UserError) as caught:
        command(*argv, "--out", tmp_path / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lora_strengths_are_read(tmp_path):
    (tmp_path / "odd:0.5").write_text("")
    texts = ["a.safetensors", "a.safetensors:0.5", "C:/a.safetensors", str(tmp_path / "odd:0.5")]
    expected = [
        ("a.safetensors", 1.0),
        ("a.safetensors", 0.5),
        ("C:/a.safetensors", 1.0),
        (str(tmp_path / "odd:0.5"), 1.0),
    ]
    assert convert_cli._loras(texts) == expected
