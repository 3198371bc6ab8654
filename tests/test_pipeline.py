"""Prompts become clips as the parts say they should, reproducibly, and mistakes are found before any work."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_pipeline
from flax import nnx

import turbojax
from turbojax.errors import UserError
from turbojax.pipeline import Pipeline, draw_noise
from turbojax.pipeline_config import PipelineConfig, find_pipeline
from turbojax.programs import Programs, denoise
from turbojax.samplers import flow, rcm
from turbojax.settings import resolve

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline.pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    return small_pipeline.save(pipe, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def clip(pipe) -> turbojax.Video:
    return pipe.generate(PROMPT, seed=1)


def fail(*_, **__):
    raise AssertionError("went to work")


def by_hand(pipe: Pipeline, prompt: str, seed: int, condition=None, **options) -> np.ndarray:
    """The clip put together step by step, conditional and unconditional passes apart."""
    settings = resolve(pipe.spec, **options)
    noise, step_noise = draw_noise([seed], pipe._latent_shape(settings), settings)
    contexts = [pipe.text_encoder(*pipe.tokenizer(text)) for text in (prompt, settings.negative_prompt)]
    high, low = (None if dit is None else compiled(dit) for dit in (pipe.dit, pipe.dit_low))

    def velocity(x, s):
        is_high = settings.boundary is None or float(s) >= settings.boundary
        dit, g = (high, settings.guidance[1]) if is_high else (low, settings.guidance[0])
        x = x if condition is None else jnp.concatenate([x, condition], axis=-1)
        cond, uncond = (dit(x, jnp.array([1000.0 * s]), context) for context in contexts)
        return uncond + g * (cond - uncond)

    if settings.sampler.startswith("rcm"):
        grid = {name: getattr(settings, name) for name in ("sigma_max", "mid_times")} | {"num_steps": settings.steps}
        latents = rcm.sample(velocity, jnp.asarray(noise), jnp.asarray(step_noise), **grid, mode=settings.sampler[4:])
    else:
        solver = flow.unipc_solver(settings.steps, settings.shift)
        state = solver.start(jnp.asarray(noise))
        for s, row in zip(solver.times, solver.table, strict=True):
            state = solver.step(state, velocity(state.x, s), row)
        latents = state.x
    return np.asarray((pipe.vae.decode(latents)[0] + 1) * 127.5)


def compiled(module):
    graph, state = nnx.split(module)
    forward = jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))
    return lambda *arguments: forward(state, *arguments)


def assert_same_picture(frames: np.ndarray, exact: np.ndarray) -> None:
    # Half a level from rounding, and a little because the order of float32 sums differs between the two ways.
    assert frames.shape == exact.shape
    assert np.abs(frames - exact).max() < 0.75
    assert exact.std() > 5  # a picture, not a flat field that would agree with anything


def test_a_prompt_becomes_a_clip(clip):
    assert clip.frames.shape == (5, 48, 32, 3)  # size is width x height
    assert clip.frames.dtype == np.uint8
    assert clip.fps == 8
    assert set(clip.timings) == {"compile", "text", "dit", "vae", "total"}
    assert clip.metadata["prompt"] == PROMPT
    assert clip.metadata["seed"] == 1
    assert clip.metadata["settings"]["guidance"] == [2.0, 2.0]
    assert clip.metadata["versions"]["jax"] == jax.__version__
    json.dumps(clip.metadata)


def test_guided_unipc_is_what_the_parts_give_by_hand(pipe, clip):
    assert_same_picture(clip.frames, by_hand(pipe, PROMPT, 1))


def test_rcm_is_what_the_parts_give_by_hand(pipe):
    options = {"sampler": "rcm-sde", "steps": 2, "mid_times": (1.2,)}
    assert_same_picture(pipe.generate(PROMPT, seed=3, **options).frames, by_hand(pipe, PROMPT, 3, **options))


FOLDED = {
    "guided": (small_pipeline.DIT, {}),
    "sla": (small_pipeline.DIT, {"sampler": "rcm-sde", "steps": 2, "attention": "sla", "topk": 0.5}),
    "picture": (dataclasses.replace(small_pipeline.DIT, in_channels=12), {"steps": 2}),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded_padding_samples_the_same_latents(case):
    """A prompt padded to 512 rows: 120 of them give the same to float32 rounding, and only if the last is counted."""
    dit, options = FOLDED[case]
    pipe = small_pipeline.pipeline(dit, text_len=512)
    settings = resolve(pipe.spec, **options)
    shape = pipe._latent_shape(settings)
    noise, step_noise = draw_noise([1], shape, settings)
    texts = [pipe.text_encoder(*pipe.tokenizer(text)) for text in (PROMPT, "a blue square")]
    condition = (
        np.random.default_rng(0).standard_normal((1, *shape[:-1], 8), np.float32) if pipe.spec.takes_image else None
    )
    graph, state = nnx.split(pipe.dit)

    def latents(rows, text_rows):
        context, negative = (text[:, :rows] for text in texts)
        static = {"graphdefs": (graph,), "settings": settings, "tick": None, "text_rows": text_rows}
        run = jax.jit(partial(denoise, **static))
        return run((state,), context, negative if settings.guided else None, condition, noise, step_noise)

    whole = latents(512, None)

    def apart(other):
        return float(jnp.linalg.norm(other - whole) / jnp.linalg.norm(whole))

    assert apart(latents(512, 120)) < 1e-5
    assert apart(latents(120, None)) > 1e-3


def test_a_clip_of_folded_padding_is_what_the_parts_give_by_hand():
    """They are given all 512 rows."""
    pipe = small_pipeline.pipeline(text_len=512)
    assert_same_picture(pipe.generate(PROMPT, seed=1).frames, by_hand(pipe, PROMPT, 1))


@pytest.mark.parametrize(
    ("words", "options", "rows"),
    [
        ([118], {}, 120),  # with </s> and one row of padding
        ([119], {}, 248),
        ([5, 246], {"batch_size": 2}, 248),
        ([247], {}, 512),
        ([600], {}, 512),
        ([5], {"negative_prompt": "red " * 119}, 248),
        ([5], {"guidance": 1.0}, 120),
    ],
)
def test_as_few_rows_of_text_as_hold_every_prompt_of_a_batch(words, options, rows, monkeypatch):
    """The negative prompt is one of them; a pipeline of fewer rows than the least number keeps its own."""

    class Found(Exception):
        pass

    def prepare(*arguments):
        raise Found(arguments[-1])

    def found(text_len):
        pipe = small_pipeline.pipeline(text_len=text_len)
        monkeypatch.setattr(pipe, "_prepare", prepare)
        with pytest.raises(Found) as caught:
            pipe.generate(["red " * count for count in words], **options)
        return caught.value.args[0]

    assert found(512) == rows
    assert found(32) == 32


def test_two_experts_share_the_steps_at_the_boundary_each_with_its_guidance():
    pipe = small_pipeline.pipeline(boundary=0.8, guidance=(3.0, 1.5))
    high = (flow.unipc_solver(3, pipe.spec.config.shift).times >= 0.8).sum()
    assert 0 < high < 3  # both experts get a turn
    assert_same_picture(pipe.generate(PROMPT).frames, by_hand(pipe, PROMPT, 0))


def test_rcm_changes_experts_at_the_boundary():
    pipe = small_pipeline.pipeline(boundary=0.9)
    options = {"sampler": "rcm-sde", "steps": 4}  # at 0.988, 0.934 | 0.853, 0.609
    assert_same_picture(pipe.generate(PROMPT, **options).frames, by_hand(pipe, PROMPT, 0, **options))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("options", [{}, {"sampler": "rcm-sde", "steps": 4}])
def test_each_expert_makes_its_keys_of_the_text_once(options, offload):
    """Ahead of all of its steps, outside of every loop, of prompt and negative prompt together."""
    pipe = small_pipeline.pipeline(boundary=0.9)
    settings = resolve(pipe.spec, **options)
    graphs, states = zip(*map(nnx.split, (pipe.dit, pipe.dit_low)), strict=True)
    noises = draw_noise([1], pipe._latent_shape(settings), settings)
    text = jax.ShapeDtypeStruct((1, 8, small_pipeline.DIT.text_dim), jnp.float32)
    static = {"graphdefs": graphs, "settings": settings, "tick": None, "offload": offload}
    program = jax.make_jaxpr(partial(denoise, **static))(states, text, text, None, *noises)
    made = [step.params["jaxpr"] for step in program.eqns if step.params.get("name") == "_text_keys"]
    k_shapes = [keys.out_avals[0].shape for keys in made]
    assert k_shapes == [(2, 2 if settings.guided else 1, 8, 2, 16)] * 2
    assert str(program).count("name=_text_keys") == 2


@pytest.mark.parametrize("options", [{}, {"sampler": "rcm-sde", "quant": "w8a8"}])
def test_experts_that_wait_in_host_memory_make_the_same_clip(options, tmp_path):
    pipe = small_pipeline.pipeline(boundary=0.8, guidance=(3.0, 1.5))
    waiting = Pipeline.load(small_pipeline.save(pipe, tmp_path / "pair"), offload=True)
    np.testing.assert_array_equal(waiting.generate(PROMPT, **options).frames, pipe.generate(PROMPT, **options).frames)
    for expert in waiting._experts(options.get("quant", "none")):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(nnx.state(expert))} == {"pinned_host"}


def test_a_pair_of_experts_is_whole_and_alike():
    pair = small_pipeline.pipeline(boundary=0.8)
    parts = {name: getattr(pair, name) for name in ("dit", "vae", "text_encoder", "tokenizer")}
    wider = dataclasses.replace(small_pipeline.DIT, ffn_dim=64)
    for changes, low, message in (
        ({"boundary": 0.8}, None, "switches experts at s = 0.8, but has no low-noise one: dit_low"),
        ({}, pair.dit_low, "has two experts, but no boundary between them"),
        ({"boundary": 0.8}, small_pipeline.module(wider, "low"), "the experts dit and dit_low differ in shape"),
    ):
        with pytest.raises(UserError, match=message):
            Pipeline(small_pipeline.config(**changes), dit_low=low, **parts)


def test_a_clip_can_take_the_shape_of_its_picture():
    pipe = small_pipeline.pipeline(dataclasses.replace(small_pipeline.DIT, in_channels=12))
    clip = pipe.generate(PROMPT, image=np.zeros((30, 90, 3), np.uint8), size="adaptive", frames=1)
    assert clip.frames.shape == (1, 16, 64, 3)  # 32 x 48 pixels in the shape 3:1 are 67.9 x 22.6
    with pytest.raises(UserError, match="adaptive takes the shape of a picture, and there is none"):
        small_pipeline.pipeline().generate_each(PROMPT, size="adaptive")


def test_image_to_video_puts_mask_and_picture_behind_the_noise(tmp_path):
    pipe = small_pipeline.pipeline(dataclasses.replace(small_pipeline.DIT, in_channels=12))
    image = np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8)
    # One picture, then mid-grey (0 in [-1, 1]) frames; the mask marks the first of two latent frames.
    video = np.concatenate([image[None].astype(np.float32) / 127.5 - 1, np.zeros((4, 48, 32, 3), np.float32)])
    latents = np.asarray(pipe.vae.encode(video[None]))
    mask = np.zeros((1, 2, 6, 4, 4), np.float32)
    mask[:, 0] = 1
    clip = pipe.generate(PROMPT, image=image)
    assert_same_picture(clip.frames, by_hand(pipe, PROMPT, 0, np.concatenate([mask, latents], axis=-1)))
    assert clip.metadata["image"].startswith("sha256:")
    for source, message in (
        (tmp_path / "none.png", "no such image"),
        (__file__, "cannot read .* as an image"),
        (image[..., 0], r"must be uint8 \[h, w, 3\], got uint8 \[48, 32\]"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.generate(PROMPT, image=source)


def test_a_second_clip_compiles_nothing(pipe, clip, monkeypatch):
    monkeypatch.setattr(jax, "jit", fail)
    pipe.generate("a blue square moving left", seed=2)


def test_a_clip_depends_on_its_prompt_and_seed_and_not_on_its_company(pipe, clip):
    prompts = ["a blue square", PROMPT]
    clips = pipe.generate(prompts, seed=[0, 1])
    assert [(c.metadata["prompt"], c.metadata["seed"]) for c in clips] == [(p, s) for p in prompts for s in (0, 1)]
    np.testing.assert_array_equal(clips[3].frames, clip.frames)
    others = [c.frames for c in clips[:3]]
    assert all(np.abs(other - clip.frames.astype(int)).max() > 5 for other in others)


def test_batches_give_the_same_clips_and_a_short_one_compiles_nothing(pipe, clip, monkeypatch):
    clips = pipe.generate(["a blue square", PROMPT], seed=1, batch_size=2)
    assert np.abs(clips[1].frames - clip.frames.astype(int)).max() <= 1
    monkeypatch.setattr(jax, "jit", fail)
    again = pipe.generate(["a blue square", PROMPT, "a red square"], seed=1, batch_size=2)
    assert len(again) == 3
    np.testing.assert_array_equal(again[1].frames, clips[1].frames)


def test_changed_weights_count_at_once_with_and_without_int8(pipe, clip):
    def both():
        return [pipe.generate(PROMPT, seed=1, quant=quant).frames.astype(float) for quant in ("none", "w8a8")]

    plain, int8 = both()
    np.testing.assert_array_equal(plain, clip.frames)
    assert 0 < np.abs(int8 - plain).mean() < 10
    kernel = pipe.dit.blocks.self_attn.o.kernel
    before = kernel[...]
    try:
        kernel[...] = -before
        changed_plain, changed_int8 = both()
    finally:
        kernel[...] = before
    change = np.abs(changed_plain - plain).mean()
    assert change > 3 * np.abs(int8 - plain).mean()
    assert np.abs(changed_int8 - changed_plain).mean() < change / 3
    np.testing.assert_array_equal(both(), [plain, int8])


def test_noise_of_a_seed_is_the_same_for_every_sampler_and_fresh_for_every_step(pipe):
    shape = (2, 4, 6, 4)
    sde = resolve(pipe.spec, sampler="rcm-sde")
    start, steps = draw_noise([5, 6], shape, sde)
    assert start.shape == (2, *shape)
    assert steps is not None
    assert steps.shape == (4, 2, *shape)
    again, none = draw_noise([6], shape, resolve(pipe.spec))
    assert none is None
    np.testing.assert_array_equal(again[0], start[1])
    draws = np.stack([start, *steps]).reshape(10, -1)
    assert np.abs(np.corrcoef(draws) - np.eye(10)).max() < 0.3  # 192 numbers each: 4 standard errors
    assert abs(draws.mean()) < 0.1
    assert abs(draws.std() - 1) < 0.1


def test_the_progress_bar_counts_every_step(pipe, clip, capsys):
    watched, _ = pipe.generate(PROMPT, seed=[1, 2], progress=True)
    jax.effects_barrier()
    assert "6/6 steps" in capsys.readouterr().err
    np.testing.assert_array_equal(watched.frames, clip.frames)  # who watches changes nothing
    pipe.generate(PROMPT, seed=1, progress=False)
    assert capsys.readouterr().err == ""


def test_words_that_the_model_never_learned_are_named(pipe, clip):
    with pytest.warns(UserWarning, match="small never learned the words elephant"):
        pipe.generate("a red elephant", seed=1)


def test_a_saved_pipeline_makes_the_same_clip(folder, clip):
    np.testing.assert_array_equal(Pipeline.load(folder).generate(PROMPT, seed=1).frames, clip.frames)


def test_parts_may_lie_elsewhere(folder, tmp_path):
    shutil.copytree(folder / "dit", tmp_path / "student")
    config = json.loads((folder / "pipeline.json").read_text())
    shared = {part: str(folder / part) for part in ("vae", "text_encoder", "tokenizer")}
    (tmp_path / "student" / "pipeline.json").write_text(json.dumps({**config, "parts": {"dit": ".", **shared}}))
    assert find_pipeline(tmp_path / "student").spec.dit == small_pipeline.DIT


@pytest.mark.parametrize(
    "lost",
    [
        "pipeline.json",
        "dit/config.json",
        "dit/params.safetensors",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_folder_that_lacks_a_part_says_which(folder, tmp_path, lost):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / lost).unlink()
    with pytest.raises(UserError, match=f"lacks a part: no .*{lost.rpartition('/')[0]}"):
        Pipeline.load(broken)


def test_folders_that_do_not_fit_are_refused(folder, tmp_path):
    def changed(**changes) -> None:
        broken = shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)
        config = json.loads((broken / "pipeline.json").read_text())
        (broken / "pipeline.json").write_text(json.dumps({**config, **changes}))
        find_pipeline(broken)

    with pytest.raises(UserError, match="has no field stepz"):
        changed(stepz=3)
    with pytest.raises(UserError, match="unknown preset 'huge'"):
        changed(preset="huge")
    for field, value in {
        "steps": "x", "size": [1, 2, 3], "guidance": 3, "parts": 5, "negative_prompt": 7, "round_timestep": 1,
        "boundary": "x",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"{field} cannot be"):
            changed(**{field: value})
    for text in ("5", "[]", '{"preset": ["tiny"]}', "{", "[" * 100_000):
        with pytest.raises(UserError, match=r"pipeline\.json"):
            PipelineConfig.from_json(text)
    with pytest.raises(UserError, match=r"lacks a part: no .*dit_low"):
        changed(boundary=0.9)
    with pytest.raises(UserError, match="holds a UMT5Config, but vae needs a VAEConfig"):
        changed(parts={"vae": "text_encoder"})
    with pytest.raises(UserError, match="unknown model 'nowhere'; known: tiny"):
        find_pipeline("nowhere")
    with pytest.raises(UserError, match=r"wan2\.1-t2v-14b has no weights here; convert a checkpoint"):
        find_pipeline("wan2.1-t2v-14b")


def test_a_pipeline_file_says_everything_and_may_say_little():
    config = small_pipeline.config(boundary=0.9, parts={"dit": "."}, mid_times=(1.4, 1.0))
    assert PipelineConfig.from_json(config.to_json()) == config
    assert PipelineConfig.from_json('{"preset": "tiny"}') == PipelineConfig.from_preset("tiny")


def test_mistakes_are_found_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr(Programs, "get", fail)
    monkeypatch.setattr(nnx, "split", fail)
    for options in ({"frames": 4}, {"size": (33, 32)}, {"sampler": "ddim"}, {"steps": 0}, {"image": "x.png"}):
        with pytest.raises(UserError):
            pipe.generate_each(PROMPT, **options)
    with pytest.raises(UserError, match="empty prompt"):
        pipe.generate_each([PROMPT, " "])


def test_int8_weights_cannot_run_as_float(pipe):
    from turbojax.quant import quantize_dit

    int8 = small_pipeline.pipeline()
    int8.dit = quantize_dit(int8.dit)
    with pytest.raises(UserError, match="the weights of model small are int8: quant must be 'w8a8'"):
        int8.generate(PROMPT)
