"""Settings files: what they say is what runs, and what they misspell is an error."""

import dataclasses
import json

import pytest

from turbojax.cli import main
from turbojax.config import nested
from turbojax.errors import UserError
from turbojax.train import config_file
from turbojax.train.cli import settings
from turbojax.train.config_file import overlay, read_config, remember
from turbojax.train.rcm_stage import RCMConfig
from turbojax.train.sla import SLAConfig
from turbojax.train.trigflow import LogNormal, UniformShift
from turbojax.train.vae import PHASES, TrainVAEConfig

SHIPPED = sorted(p.stem for p in config_file.SHIPPED.glob("*.toml"))


def test_tables_reach_into_nested_settings_and_leave_the_rest():
    config = overlay(SLAConfig(), {"steps": 7, "optimizer": {"learning_rate": 1}, "attention": {"topk": 0.1}})
    assert config.steps == 7
    assert config.optimizer == dataclasses.replace(SLAConfig().optimizer, learning_rate=1.0)
    assert config.attention == dataclasses.replace(SLAConfig().attention, topk=0.1)


def test_a_tables_names_say_which_distribution_it_is():
    config = overlay(RCMConfig(), {"consistency_times": {"shift": 3}, "critic_times": {"mean": 0.0, "std": 1}})
    assert config.consistency_times == UniformShift(3.0)
    assert config.critic_times == LogNormal(0.0, 1.0)
    assert overlay(RCMConfig(), {"fixed_times": "none"}).fixed_times is None
    assert overlay(RCMConfig(), {"fixed_times": [1.2, 1]}).fixed_times == (1.2, 1.0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stepps": 3}, "'stepps', did you mean 'steps'"),
        ({"optimizer": {"learning_rat": 3}}, r"optimizer\.learning_rat', did you mean 'optimizer\.learning_rate'"),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"loss": "grey_box"}, "loss must be 'white_box', 'black_box', not 'grey_box'"),
        ({"times": {"average": 1}}, "times cannot be"),
        ({"steps": {"a": 1}}, "not a table"),
    ],
)
def test_mistakes_are_told_by_name(wrong, told):
    with pytest.raises(UserError, match=told):
        overlay(SLAConfig(), wrong)


def test_json_and_toml_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text('steps = 5\n[attention]\nkind = "dense"\n')
    (tmp_path / "a.json").write_text('{"steps": 5, "attention": {"kind": "dense"}}')
    assert read_config(tmp_path / "a.toml") == read_config(tmp_path / "a.json") == nested(
        {"steps": 5, "attention.kind": "dense"}
    )  # fmt: skip


def test_later_layers_go_before_earlier_ones():
    run, config = settings("sla", {"steps": 5, "batch": 3, "teacher": "x"}, {"steps": 6, "out": "y"})
    assert (config.steps, config.batch, str(run.teacher), str(run.out)) == (6, 3, "x", "y")
    with pytest.raises(UserError, match="'guidanc', did you mean 'guidance'"):
        settings("rcm", {"guidanc": 2})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_valid_and_name_their_command(name):
    file = read_config(name)
    stage = file.pop("stage")
    run, config = settings(stage, file)
    assert run.out is None  # where things lie is for the command to say
    assert config.steps > 0
    assert f"turbojax train {stage} --config {name} " in (config_file.SHIPPED / f"{name}.toml").read_text()


def test_published_settings_of_rcm_are_in_the_files():
    """wan2.1 1.3B and 14B: `rcm/configs/experiments` of TurboDiffusion."""
    small, large = (settings("rcm", {k: v for k, v in read_config(n).items() if k != "stage"})[1]
                    for n in ("wan2.1-1.3b-rcm", "wan2.1-14b-rcm"))  # fmt: skip
    assert (small.student_optimizer.learning_rate, small.critic_optimizer.learning_rate) == (2e-6, 4e-7)
    assert (large.student_optimizer.learning_rate, large.critic_optimizer.learning_rate) == (1e-6, 1e-7)
    assert (small.student_every, large.student_every) == (5, 10)
    assert (small.tangent_warmup, large.tangent_warmup) == (1000, 0)
    assert (small.consistency_times, large.consistency_times) == (LogNormal(0.7, 1.6), LogNormal(1.5, 1.6))
    for config in (small, large):
        assert config.critic_times == UniformShift(5.0)
        assert config.guidance == 5.0
        assert (config.student_optimizer.b1, config.student_optimizer.b2) == (0.0, 0.999)
        assert config.student_optimizer.clip is None
        assert config.fixed_times is None


def test_flags_override_set_which_overrides_the_file(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("turbojax.train.launch.train_student", lambda run, config: seen.update(run=run, config=config))
    (tmp_path / "c.json").write_text(json.dumps({"stage": "sla", "steps": 5, "batch": 5, "seed": 5}))
    command = ["train", "sla", "--config", str(tmp_path / "c.json"), "--set", "batch=6", "--set", "steps=6"]
    assert main([*command, "--set", "optimizer.b1=0.5", "--steps", "7", "--topk", "0.5"]) == 0
    config = seen["config"]
    assert (config.steps, config.batch, config.seed) == (7, 6, 5)
    assert (config.optimizer.b1, config.attention.topk) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sla", "--config", "tiny-slaa"], "did you mean 'tiny-sla'"),
        (["rcm", "--config", "tiny-sla"], "is for stage 'sla'"),
        (["sla", "--set", "steps"], "NAME=VALUE"),
        (["sla", "--config", "tiny-sla"], "needs --teacher"),
        (["rcm", "--teacher", "x", "--shards", "*.tar"], "needs --negative"),
        (["rcm", "--teacher", "x", "--pca", "y", "--out", "z"], "--teacher x: no such file or folder"),
    ],
)
def test_mistakes_of_the_command_are_told_before_anything_starts(arguments, told, capsys):
    assert main(["train", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_flags_of_the_vae_reach_its_configuration(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("turbojax.train.vae.train_vae", seen.append)
    command = ["train", "vae", "--part", "polish", "--phases", "whole", "--learning-rate", "7e-4", "--seed", "3"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert seen == [
        TrainVAEConfig("polish", tmp_path, learning_rate=7e-4, seed=3, phases=PHASES["whole"])
    ]  # what is not given stays as it is


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    remember(tmp_path / "out" / "run.json", {"steps": 5, "topk": 0.1})
    remember(tmp_path / "out" / "run.json", {"steps": 5, "topk": 0.1})
    with pytest.raises(UserError, match=r"topk = 0\.1, not 0\.2"):
        remember(tmp_path / "out" / "run.json", {"steps": 5, "topk": 0.2})
