"""A killed run goes on as if nothing had happened: same bits, same metrics, nothing half-written left behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train import toy_run

from turbojax.checkpoint import Checkpoints
from turbojax.errors import UserError
from turbojax.train import loop

STEPS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(final state, metrics without times) of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    return toy_run.run(out, STEPS), metrics(out)


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def kill_when(out, pause, condition):
    """Start the run as a program of its own, and SIGKILL it as soon as condition(names in checkpoints/) holds."""
    command = [sys.executable, str(Path(toy_run.__file__)), str(out), str(STEPS), str(pause)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not condition({p.name for p in (out / "checkpoints").glob("*")}):
            assert process.poll() is None, f"ended before it could be killed: {process.stderr.read().decode()[-2000:]}"
            assert time.monotonic() < end, "never came to the point where it was to be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)


def writing(names):
    """A checkpoint is being written, and whole ones are there."""
    return "3" in names and any("tmp" in name for name in names)


def test_run_killed_while_it_writes_a_checkpoint_ends_with_the_same_bits(whole, tmp_path):
    kill_when(tmp_path, 0.0, writing)
    assert (tmp_path / "checkpoints").is_dir()
    resumed = toy_run.run(tmp_path, STEPS)
    assert same(whole[0], resumed)
    assert metrics(tmp_path) == whole[1]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"11", "12"}


@pytest.mark.slow
def test_run_killed_between_checkpoints_and_again_ends_with_the_same_bits(whole, tmp_path):
    kill_when(tmp_path, 0.3, lambda names: "2" in names)
    kill_when(tmp_path, 0.3, lambda names: "6" in names)
    subprocess.run([sys.executable, toy_run.__file__, str(tmp_path), str(STEPS), "0"], check=True)
    assert same(whole[0], np.load(tmp_path / "final.npz"))
    assert metrics(tmp_path) == whole[1]


def test_a_checkpoint_keeps_its_step_though_the_next_ones_reuse_the_memory(tmp_path):
    # checkpoint_every 0: each is written while the following step overwrites the buffers it was taken from.
    toy_run.run(tmp_path, 5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        kept = checkpoints.restore(4, toy_run.Toy().init())
    assert same(toy_run.run(tmp_path / "four", 4), kept)


def test_a_step_is_compiled_once_wherever_its_state_came_from(tmp_path):
    """Weights from a file are committed to a device, fresh ones are not; the step's results all are."""

    class Loaded(toy_run.Toy):
        def init(self):
            state = super().init()
            return {**state, "weights": jax.device_put(state["weights"], jax.devices()[0])}

        def batch(self, step):
            return jax.device_put(super().batch(step), jax.devices()[0])

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: compiled.append(about.get("fun_name")) if "backend_compile" in event else None
    )
    loop.run(Loaded(), loop.LoopConfig(3, str(tmp_path)))
    assert sum("step" in str(name) for name in compiled) == 1, compiled


def test_finished_run_does_nothing(whole, tmp_path):
    toy_run.run(tmp_path, 3)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    calls = []
    again = loop.run(toy_run.Toy(), loop.LoopConfig(3, str(tmp_path), seed=3), lambda *_: calls.append(1) or {})
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert int(again["count"]) == 3
    assert not calls


def test_a_shorter_run_than_the_one_that_is_there_is_refused(tmp_path):
    toy_run.run(tmp_path, 2)
    with pytest.raises(UserError, match="2 steps already"):
        toy_run.run(tmp_path, 1)


def test_a_state_of_another_run_is_refused_by_name(tmp_path):
    toy_run.run(tmp_path, 1)

    class Wider(toy_run.Toy):
        def init(self):
            return {**super().init(), "extra": jnp.zeros(1)}

    with pytest.raises(UserError, match="extra"):
        loop.run(Wider(), loop.LoopConfig(2, str(tmp_path)))


def test_damaged_checkpoint_is_told_in_one_line(tmp_path):
    toy_run.run(tmp_path, 1)
    for file in (tmp_path / "checkpoints" / "1").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="damaged") as caught:
        toy_run.run(tmp_path, 2)
    assert "\n" not in str(caught.value)
