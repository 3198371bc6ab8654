"""No file, however damaged or hostile, gets anything but one clear error out of the converter.

See hostile.py for the families of files and for what is watched. Slices by default, everything under `slow`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_modules import random_module

from convert import export_checkpoint
from turbojax.checkpoint import save_component
from turbojax.config import DiTConfig, UMT5Config

DIT = DiTConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, freq_dim=8)
UMT5 = UMT5Config(vocab_size=11, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=2)
ALL, SLICE, PART = 10_400, 400, 2_500


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, checkpoint) -> dict[str, bytes]:
    """Good files, small, of every container: what the mutations start from."""
    folder = tmp_path_factory.mktemp("seeds")
    for name, config in (("dit", DIT), ("umt5", UMT5)):
        save_component(folder / name, random_module(config), format="safetensors")
        export_checkpoint(folder / name, folder / f"{name}.safetensors", dtype="bfloat16")
    files = [folder / "dit.safetensors", folder / "umt5.safetensors", checkpoint("loras/whole.safetensors")]
    files.append(checkpoint("wan_umt5/models_t5_umt5-enc-bf16.pth"))
    return {
        f"{'lora-' if file.parent.name.startswith('loras') else ''}{file.name}": file.read_bytes() for file in files
    }


def run(first: int, last: int, seeds: dict[str, bytes], scratch: Path) -> None:
    (scratch / "seeds").mkdir()
    for name, data in seeds.items():
        (scratch / "seeds" / name).write_bytes(data)
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), str(first), str(last), str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(result.stdout)
    assert summary["failures"] == []
    assert summary["refused"] + summary["read"] == last - first
    # Both happen, or the files would be all alike.
    assert summary["refused"] > 0.5 * (last - first)
    assert summary["read"] > 0.01 * (last - first)


def test_a_slice_of_the_hostile_files(seeds, tmp_path):
    run(0, SLICE, seeds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SLICE, ALL, PART))
def test_all_hostile_files(seeds, tmp_path, first):
    run(first, min(first + PART, ALL), seeds, tmp_path)
