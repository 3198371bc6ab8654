"""Defaults come from the pipeline, and every mistake is told in one line before anything is loaded."""

import dataclasses

import numpy as np
import pytest

from turbojax import AttentionConfig
from turbojax.config import MID_TIMES, PRESETS
from turbojax.errors import UserError
from turbojax.pipeline_config import PipelineConfig, PipelineSpec
from turbojax.settings import check_image, check_prompts, check_seeds, pair_up, resolve


def spec_of(name: str, **changes) -> PipelineSpec:
    preset = PRESETS[name]
    return PipelineSpec(name, PipelineConfig.from_preset(name, **changes), preset.dit, preset.vae, preset.text_encoder)


TINY = spec_of("tiny")


def test_defaults_are_the_presets():
    settings = resolve(spec_of("wan2.2-t2v-a14b"))
    assert (settings.sampler, settings.steps, settings.guidance) == ("unipc", 40, (3.0, 4.0))
    assert (settings.shift, settings.boundary, settings.size, settings.frames) == (12.0, 0.875, (832, 480), 81)
    assert settings.attention == AttentionConfig("dense")


def test_another_sampler_brings_its_own_steps_and_guidance():
    teacher = resolve(TINY, sampler="rcm-sde")
    assert (teacher.steps, teacher.guidance) == (4, (1.0, 1.0))
    student = spec_of("tiny", sampler="rcm-sde", steps=2, guidance=(1.0, 1.0))
    assert resolve(student).steps == 2
    many = resolve(student, sampler="euler")
    assert (many.steps, many.guidance) == (PRESETS["tiny"].steps, PRESETS["tiny"].guidance)


def test_attention_is_named_or_given_whole_and_topk_counts_either_way():
    sparse = spec_of("tiny", block_q=32, block_k=16, topk=0.3)
    assert resolve(sparse, attention="sla").attention == AttentionConfig("sla", topk=0.3, block_q=32, block_k=16)
    own = AttentionConfig("sagesla", topk=0.5, block_q=64, block_k=32)
    assert resolve(sparse, attention=own).attention == own
    assert resolve(sparse, attention=own, topk=0.2).attention == dataclasses.replace(own, topk=0.2)


def test_a_model_may_have_few_step_times_of_its_own():
    assert resolve(TINY, sampler="rcm-sde").mid_times == MID_TIMES
    own = spec_of("tiny", mid_times=(1.4, 0.9))
    assert resolve(own, sampler="rcm-sde").mid_times == (1.4, 0.9)
    assert resolve(own, sampler="rcm-sde").steps == 3  # one more than there are times
    chosen = resolve(own, sampler="rcm-sde", mid_times=np.array([1.3]), steps=2)
    assert chosen.mid_times == (1.3,)
    assert chosen.describe()["mid_times"] == [1.3]


def test_numpy_integers_are_integers():
    settings = resolve(TINY, steps=np.int64(3), frames=np.int32(5), size=tuple(np.array([32, 48])))
    assert (settings.steps, settings.frames, settings.size) == (3, 5, (32, 48))
    assert check_seeds(np.arange(3)) == [0, 1, 2]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim"}, "unknown sampler 'ddim'; known: rcm-sde, rcm-ode, unipc, euler"),
        ({"sampler": "rcm-sde", "steps": 5}, "rcm-sde takes 1 to 4 steps, got 5; for more steps use sampler unipc"),
        ({"sampler": "rcm-ode", "steps": 0}, "rcm-ode takes 1 to 4 steps, got 0"),
        ({"steps": 1001}, "unipc takes 1 to 1000 steps, got 1001"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"size": (100, 64)}, "multiples of 16: got 100x64, nearest 96x64"),
        ({"size": (0, 64)}, "multiples of 16: got 0x64, nearest 16x64"),
        ({"size": (64, 64, 64)}, "width x height"),
        ({"size": "large"}, r"size must be \(width, height\) or 'adaptive', got 'large'"),
        ({"frames": 16}, r"frames must be 4n \+ 1 \(1, 5, \.\.\.\): got 16, nearest 17"),
        ({"frames": 0}, "got 0, nearest 1"),
        ({"attention": "flash"}, "unknown attention 'flash'; known: dense, sage, sla, sagesla"),
        ({"topk": 0.0}, r"topk must be in \(0, 1\], got 0.0"),
        ({"quant": "int4"}, "unknown quant 'int4'; known: none, w8a8"),
        ({"guidance": 0.5}, "guidance must be a number from 1"),
        ({"guidance": (3.0, float("nan"))}, "guidance must be a number from 1"),
        ({"guidance": (3.0, 4.0)}, "model tiny has one expert: give one guidance"),
        ({"guidance": 1, "negative_prompt": "blurry"}, "a negative prompt needs guidance"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"sigma_max": float("inf")}, "sigma_max must be above 0"),
        ({"sampler": "rcm-sde", "sigma_max": 1.0}, "sigma_max must be more than"),
        ({"sampler": "rcm-sde", "steps": 3, "mid_times": (1.4,)}, "rcm-sde takes 1 to 2 steps, got 3"),
        ({"sampler": "rcm-sde", "mid_times": (1.0, 1.4)}, r"mid_times must fall towards 0, got \(1.0, 1.4\)"),
        ({"mid_times": (1.6,)}, "mid_times must be angles between 0 and pi/2"),
        ({"mid_times": ("x",)}, "mid_times must be angles between 0 and pi/2"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(TINY, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_prompts_and_seeds_are_checked():
    assert check_prompts("a circle") == ["a circle"]
    for empty in ("", " \n", ["a circle", ""], []):
        with pytest.raises(UserError, match="prompt"):
            check_prompts(empty)
    for wrong in (-1, 0.5, [], [0, -2]):
        with pytest.raises(UserError, match="seed"):
            check_seeds(wrong)


def test_prompts_and_seeds_meet_all_with_all_or_one_with_one():
    assert pair_up(["a", "b"], [1, 2], paired=False) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert pair_up(["a", "b"], [1, 2], paired=True) == [("a", 1), ("b", 2)]
    with pytest.raises(UserError, match="2 prompts, 1 seeds"):
        pair_up(["a", "b"], [1], paired=True)


def test_an_image_goes_with_the_models_that_take_one():
    with pytest.raises(UserError, match="tiny takes text alone"):
        check_image(TINY, True)
    with pytest.raises(UserError, match="makes video from a picture"):
        check_image(spec_of("wan2.2-i2v-a14b"), False)
    check_image(spec_of("wan2.2-i2v-a14b"), True)
    check_image(TINY, False)
