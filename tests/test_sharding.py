"""Parameters and batches are cut as the rules say, and a step gives the same numbers however it is spread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from turbojax.errors import UserError
from turbojax.sharding import batch_spec, make_mesh, parameter_spec


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params.blocks.ffn.up.kernel", (30, 1536, 8960), (None, None, "fsdp")),
        ("params.blocks.ffn.down.kernel", (30, 8960, 1536), (None, "fsdp")),
        ("opt_state.0.mu.blocks.self_attn.q.kernel", (40, 5120, 5120), (None, None, "fsdp")),
        ("params.head.kernel", (5120, 64), ("fsdp",)),
        ("params.blocks.modulation", (40, 6, 5120), (None, None, "fsdp")),
        ("params.blocks.self_attn.norm_q.scale", (30, 1536), ()),  # small: a copy each
        ("params.odd.kernel", (1537, 8961), ()),  # divides nowhere
        ("updates", (), ()),
    ],
)
def test_large_arrays_are_cut_along_their_longest_axis_but_not_along_the_layers(path, shape, spec):
    assert parameter_spec(path, shape, fsdp=4) == PartitionSpec(*spec)
    assert parameter_spec(path, shape, fsdp=1) == PartitionSpec()


def test_batches_are_shared_by_all_devices_or_refused():
    devices = [jax.devices()[0]] * 4
    mesh = jax.sharding.Mesh(np.asarray(devices[:1]).reshape(1, 1), ("data", "fsdp"))
    assert batch_spec((8, 3), mesh) == PartitionSpec(("data", "fsdp"))
    assert batch_spec((), mesh) == PartitionSpec()
    with pytest.raises(UserError, match="2 x 2 devices"):
        make_mesh(2, 2, devices[:3])


@pytest.mark.slow
def test_sharded_run_equals_an_unsharded_one(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).parent / "sharded_steps.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # The partitioner says so when it copies activations to every device for want of something better.
    assert "rematerialization" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4
    # Sums over the batch are taken in another order (measured: 2e-5 of the way that the parameters went).
    assert found["difference"] < 1e-3
    assert found["restored"] == 4
    _, rows, columns = found["whole"]
    assert found["held"] == [[1, rows, columns // 2]] * 2
