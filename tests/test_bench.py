"""`turbojax bench kernels`: every contestant runs or says why not, and the files appear whole. No time is asserted."""

import argparse
import json

import jax.numpy as jnp
import pytest

from pallas_kernels.timing import compare
from turbojax import bench
from turbojax.errors import UserError


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser.add_subparsers())
    return parser.parse_args(["bench", "kernels", *arguments])


def test_every_contestant_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CPU_SIZE", bench.Size(256, 256, 1, ((8, 128, 128),)))
    out = tmp_path / "kernels.json"
    assert bench.run(parsed("--json", str(out), "--seconds", "0.001")) == 0
    result = json.loads(out.read_text())
    ops = {time["op"] for time in result["times"]}
    assert ops == {"attention float32", "attention bfloat16", "linear", "norm_modulate_quantize", "rms_norm_rope"}
    assert [time["error"] for time in result["times"]] == [None] * len(result["times"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    assert len(capsys.readouterr().out.splitlines()) == len(result["times"])


def test_one_that_fails_does_not_stop_the_others():
    def fails(x):
        raise RuntimeError("no such kernel")

    contest = bench.Contest("op", "shape", 1.0, lambda: {"first": (fails, [1.0]), "second": (jnp.sin, [1.0])})
    first, second = bench.run_contest(contest, 0.001)
    assert first.ms is None
    assert "no such kernel" in first.error
    assert second.ms > 0
    assert second.speedup is None


def test_a_missing_folder_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        bench.run(parsed("--json", str(tmp_path / "nowhere" / "kernels.json")))


def test_contestants_take_turns():
    order = []

    def make(name):
        def call(x):
            import jax

            jax.debug.callback(lambda: order.append(name), ordered=False)
            return x

        return call

    compare({name: (make(name), [jnp.ones(())]) for name in "ab"}, budget=0.0, repeats=2)
    assert order[-4:] == ["a", "b", "a", "b"]
