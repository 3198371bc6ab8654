"""A published model is converted from its folder alone, experts in their places; a part of a pair is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from random_modules import flat, random_module

from convert import CheckpointError, export_checkpoint
from convert.release import complete, find_parts, is_release
from turbojax.checkpoint import load_component, save_component
from turbojax.cli import main
from turbojax.config import PRESETS
from turbojax.pipeline_config import find_pipeline
from turbojax.tokenizer import train_tiny_tokenizer

TINY = PRESETS["tiny-i2v"]
WAN = {
    "dit": "high_noise_model/diffusion_pytorch_model", "dit_low": "low_noise_model/diffusion_pytorch_model",
    "vae": "Wan2.1_VAE", "text_encoder": "models_t5_umt5-xxl-enc-bf16", "tokenizer": "google/umt5-xxl",
}  # fmt: skip
DIFFUSERS = {
    "dit": "transformer/diffusion_pytorch_model", "dit_low": "transformer_2/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model", "text_encoder": "text_encoder/model", "tokenizer": "tokenizer",
}  # fmt: skip


@pytest.fixture(scope="session")
def components(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("components")
    configs = {"dit": TINY.dit, "dit_low": TINY.dit, "vae": TINY.vae, "text_encoder": TINY.text_encoder}
    for seed, (part, config) in enumerate(configs.items()):
        save_component(folder / part, random_module(config, "float32", seed), format="safetensors")
    return {part: folder / part for part in configs}


def release(components, folder: Path, names: dict[str, str], naming: str, without: tuple[str, ...] = ()) -> Path:
    for part, name in names.items():
        if part == "tokenizer":
            train_tiny_tokenizer(["a red circle"]).save(folder / name)
        elif part not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            export_checkpoint(components[part], folder / f"{name}.safetensors", format=naming)
    return folder


@pytest.mark.parametrize(("names", "naming"), [(WAN, "wan"), (DIFFUSERS, "diffusers")])
def test_a_release_is_converted_from_its_folder_alone(components, names, naming, tmp_path, capsys):
    source = release(components, tmp_path / "release", names, naming)
    assert main(["inspect", str(source)]) == 0
    told = capsys.readouterr().out
    assert "a whole model: dit, dit_low, vae, text_encoder, tokenizer" in told
    for line in (
        "would become a DiT (tiny-i2v)",
        "would become a VAE (tiny or",
        "would become a umT5 encoder (tiny or",
    ):
        assert line in told
    assert main(["convert", str(source), "--out", str(tmp_path / "pipe"), "--format", "safetensors"]) == 0
    found = find_pipeline(tmp_path / "pipe")
    assert (found.spec.config.preset, found.spec.config.boundary) == ("tiny-i2v", 0.9)
    for part in ("dit", "dit_low"):  # each in its own place, not the other's
        theirs, ours = (flat(load_component(path, "float32")) for path in (components[part], found.paths[part]))
        assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []
    assert "pipeline of preset tiny-i2v" in capsys.readouterr().out


def test_the_folder_of_both_experts_stands_for_the_pair(components, tmp_path):
    both = release(components, tmp_path / "release", WAN, "wan", without=("vae", "text_encoder"))
    parts = complete({"dit": str(both), "dit_low": None, "vae": "v"}, None)
    assert parts == {"dit": both / "high_noise_model", "dit_low": both / "low_noise_model", "vae": "v"}


def test_given_parts_go_before_the_releases_own(components, tmp_path):
    source = release(components, tmp_path / "release", WAN, "wan")
    given = dict.fromkeys(WAN)
    assert complete({**given, "vae": "mine"}, source)["vae"] == "mine"
    assert complete(given, source)["dit_low"] == source / "low_noise_model"
    # Another DiT does not go together with the release's low-noise expert.
    assert complete({**given, "dit": "mine.pth"}, source)["dit_low"] is None


@pytest.mark.parametrize(
    ("names", "naming", "lost", "words"),
    [
        (WAN, "wan", "dit_low", r"has high_noise_model/ but not low_noise_model/: the model is a pair"),
        (WAN, "wan", "dit", r"has low_noise_model/ but not high_noise_model/: the model is a pair"),
        (DIFFUSERS, "diffusers", "dit_low", r"has transformer/ but not transformer_2/: the model is a pair"),
    ],
)
def test_half_a_pair_is_refused(components, names, naming, lost, words, tmp_path):
    folder = release(components, tmp_path / "release", names, naming, without=(lost,))
    index = {"transformer": ["diffusers", "X"], "transformer_2": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert is_release(folder)
    with pytest.raises(CheckpointError, match=words):
        find_parts(folder)


def test_a_model_of_one_expert_has_no_second(components, tmp_path):
    folder = release(components, tmp_path / "release", DIFFUSERS, "diffusers", without=("dit_low",))
    (folder / "model_index.json").write_text('{"transformer_2": [null, null]}')
    assert "dit_low" not in find_parts(folder)


def test_a_missing_part_is_named(components, tmp_path, capsys):
    source = release(components, tmp_path / "release", WAN, "wan", without=("vae",))
    assert main(["convert", str(source), "--out", str(tmp_path / "pipe")]) == 2
    assert f"a pipeline also needs --vae; {source} lacks it" in capsys.readouterr().err
    assert not (tmp_path / "pipe").exists()
