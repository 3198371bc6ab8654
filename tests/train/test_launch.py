"""`turbojax train` end to end on shards that torch wrote, and the sheets that a run draws."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_modules
from golden import seeded
from PIL import Image
from train.small_students import DIT

from turbojax.checkpoint import load_component, save_component
from turbojax.cli import main
from turbojax.train import data, sheets
from turbojax.train.sheets import Sheets

SHARDS = seeded.GOLDEN / "shards"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_component(folder / "dit", random_modules.random_module(DIT, "float32"), format="safetensors")
    return folder


def command(teacher, out, *more, stage="sla"):
    small = ["attention.block_q=4", "attention.block_k=2", "log_every=1"]
    given = {"teacher": teacher, "shards": f"{SHARDS}/*.tar", "out": out, "export": out / "student", "topk": "0.5"}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["train", stage, *flags, "--batch", "2", *(f"--set={s}" for s in small), *more]


def leaves(folder: Path):
    return random_modules.flat(load_component(folder))


def test_a_student_learns_from_shards_and_a_second_call_does_nothing(teacher, tmp_path, capsys):
    asked = command(teacher, tmp_path, "--steps", "3", "--set", "optimizer.warmup=1")
    assert main(asked) == 0
    first = leaves(tmp_path / "student")
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3]
    # It began as the teacher, its linear branch at zero; both have moved.
    assert np.abs(first["blocks.self_attn.proj_l.kernel"]).max() > 0
    assert not np.array_equal(first["head.kernel"], leaves(teacher / "dit")["head.kernel"])

    assert main(asked) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    again = leaves(tmp_path / "student")
    assert all(np.array_equal(first[name], again[name]) for name in first)

    assert main(command(teacher, tmp_path, "--steps", "4", "--set", "optimizer.warmup=1")) == 2
    assert "steps = 3, not 4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sla", ["--set", "optimizer.warmup=1"]),
        # Two programs, student's and critic's, in turns.
        ("rcm", ["--tangent-warmup", "0", "--student-every", "2", "--guidance", "1"]),
    ],
)
def test_killed_and_started_again_it_ends_with_the_same_weights(teacher, tmp_path, stage, more):
    """As a user would: the same command, SIGKILL in the middle, the same command."""

    def start(out):
        words = command(teacher, tmp_path / out, "--steps", "6", "--set", "checkpoint_every=0", *more, stage=stage)
        return subprocess.Popen([sys.executable, "-m", "turbojax", *words])

    assert start("whole").wait() == 0
    with start("killed") as process:
        while not any((tmp_path / "killed" / "checkpoints").glob("[3-9]")):
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "student").exists()
    assert start("killed").wait() == 0
    whole, killed = (leaves(tmp_path / out / "student") for out in ("whole", "killed"))
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)


def test_few_and_many_steps_find_what_the_velocity_points_at():
    rng = np.random.default_rng(0)
    target, noise = rng.standard_normal((2, 2, 1, 2, 2, 3)).astype(np.float32)

    def network(params, x, timestep, context):
        """Straight towards `params`; what it is told with an empty caption leads elsewhere."""
        params = jnp.concatenate([params] * (len(x) // len(params)))
        towards = jnp.where(context[:, :1, :1, None, None] > 0, params, -params)
        return (x - towards) / (timestep[:, None, None, None, None] / 1000.0)

    told, untold = jnp.ones((2, 4, 3)), jnp.zeros((1, 4, 3))
    few = sheets.few_steps(network, told, noise, sigma_max=80.0)
    np.testing.assert_allclose(jax.jit(few)(target), target, atol=1e-5)
    many = sheets.many_steps(network, told, untold, noise, guidance=1.0, shift=3.0, steps=4)
    # UniPC asks at whole timesteps, up to a thousandth away from where it is.
    np.testing.assert_allclose(jax.jit(many)(target), target, atol=5e-3)
    guided = sheets.many_steps(network, told, untold, noise, guidance=2.0, shift=3.0, steps=4)
    assert float(np.abs(jax.jit(guided)(target) - target).max()) > 0.1


def test_a_sheet_shows_and_scores_what_the_average_draws(tmp_path):
    rng = np.random.default_rng(1)
    wanted = [(("red", "circle", "up"), 1), (("blue", "square", "left"), 2)]
    clips = np.stack([data.to_float(data.render(data.sample_scene(rng, c))) for c, _ in wanted])
    state = SimpleNamespace(ema=jnp.float32(1.0), params=jnp.float32(0.0))
    sheet = Sheets(tmp_path, lambda scale: scale * jnp.ones(()), lambda drawn, scale: scale * drawn, clips, wanted)
    scores = sheet(state, 40)
    assert (scores["colour"], scores["shape"], scores["motion"]) == (1.0, 1.0, 1.0)
    with Image.open(tmp_path / "sheet-000040.png") as image:
        assert image.width > data.SIZE
    assert sheet(SimpleNamespace(ema=-state.ema), 80)["colour"] < 1.0
