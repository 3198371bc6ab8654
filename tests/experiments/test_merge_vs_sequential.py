"""The comparison merges what it should, and hands each arm to the sampler as a pipeline (training is stubbed)."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import random_modules

from experiments import merge_vs_sequential as experiment
from turbojax.checkpoint import load_component, save_component
from turbojax.config import PRESETS
from turbojax.pipeline_config import find_pipeline
from turbojax.train.rcm_stage import RCMConfig

CALLS = []


def stub(run, config):
    """Leaves as weights the teacher's plus a number that tells the call."""
    CALLS.append((run, config))
    teacher = random_modules.flat(load_component(run.teacher / "dit"))
    shape = dataclasses.replace(PRESETS["tiny"].dit, linear_branch=config.attention.kind == "sla")
    made = random_modules.random_module(shape, "float32")
    weights = random_modules.flat(made) | {name: x + 2.0 ** -len(CALLS) for name, x in teacher.items()}
    save_component(run.export, (shape, {k: jnp.asarray(v) for k, v in weights.items()}), format="safetensors")


def test_the_merged_student_is_the_dense_one_plus_what_sparsity_taught(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(experiment, "train_student", stub)
    monkeypatch.setattr(experiment, "measured", lambda subjects, *_: measured.extend(subjects) or [])
    monkeypatch.setattr(experiment, "write", lambda *_: None)
    monkeypatch.setattr(experiment, "report", lambda *_: None)
    (tmp_path / "pca.npz").touch()
    arms = ["--arms", ",".join(experiment.ARMS)]
    experiment.main(["--pca", str(tmp_path / "pca.npz"), "--quick", *arms, "--out", str(tmp_path / "out")])

    (_, dense), (_, apart), (guided, sparse), (after, sequential) = CALLS
    assert isinstance(dense, RCMConfig)
    assert dense.attention.kind == "dense"
    assert (apart.guidance, sparse.guidance) == (1.0, 2.0)
    assert after.start == guided.export
    assert sequential.attention.kind == "sla"

    base, new = (random_modules.flat(load_component(p)) for p in (CALLS[0][0].teacher / "dit", tmp_path / "out/merged"))
    for name, value in base.items():
        # teacher + 1/2 (dense) + 1/4 (apart), rounded to what the teacher keeps (bfloat16: 8 bits).
        np.testing.assert_allclose(
            new[name].astype(np.float32), value.astype(np.float32) + 0.75, rtol=2**-6, atol=2**-6
        )
    assert "blocks.self_attn.proj_l.kernel" in new.keys() - base.keys()

    teacher, *students = measured
    assert teacher.options == {"steps": 4}
    assert [s.name for s in students] == ["merged, 4 steps", "sequential, 4 steps", "dense, 4 steps"]
    kinds = [find_pipeline(student.model).spec.config.attention for student in students]
    assert kinds == ["sla", "sla", "dense"]
    assert {find_pipeline(s.model).spec.config.sampler for s in students} == {"rcm-sde"}


def test_arms_are_compared_clip_by_clip(tmp_path):
    fits = {"merged": (20.0, 30.0), "sequential": (19.0, 29.0), "dense": (22.0, 32.0), "teacher": (25.0, 25.0)}
    rows = [
        {"model": arm if arm == "teacher" else experiment.named(arm, 4), "prompt": "a red circle moving left"}
        | {"seed": seed, "shape": arm != "sequential" or seed == 0, "fit": fit, "place": None}
        for arm, pair in fits.items()
        for seed, fit in enumerate(pair)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment.report(tmp_path, "teacher")
    table = (tmp_path / "differences.md").read_text()
    assert "| 4 | merged - sequential | 1.00 [1.00, 1.00] | 50.0 [0.0, 100.0] |" in table
    assert "| 4 | dense - merged | 2.00 [2.00, 2.00] | 0.0 [0.0, 0.0] |" in table
    assert (tmp_path / "arms.png").exists()


def test_the_arms_train_as_the_shipped_student_did():
    sla, rcm = experiment.shipped("sla"), experiment.shipped("rcm")
    assert sla.attention == rcm.attention == dataclasses.replace(experiment.SLA, kind="sla")
    assert (rcm.student_every, rcm.tangent_warmup) == (2, 60)
