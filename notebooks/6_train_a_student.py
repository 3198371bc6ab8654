# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a tiny student in three minutes
#
# The small teacher attends to every key and asks its network twice a step, with the prompt and without: guidance. Here
# a student that attends to a tenth of the keys is grown from its weights, and learns to say in one sparse pass what the
# teacher says in two dense ones. This is the first of the two trainings behind the shipped student, with fewer keys and
# fewer updates; the second, rCM, cuts the steps and takes longer (the commands for both are at the end). It takes two
# minutes on two quiet cores, and what becomes of the clips is at the bottom.

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import turbojax
from experiments.strips import rows
from turbojax.train import data, loop, sla, student
from turbojax.train.encoded import encode_scenes
from turbojax.train.evaluate import pairs, prompt_of, score
from turbojax.train.flow import add_noise
from turbojax.train.pca import fit_pca_latents
from turbojax.train.rcm import guided

steps, batch, scenes = 200, 4, 512
folder = Path(tempfile.mkdtemp())
teacher = turbojax.Pipeline.load("tiny-teacher")

# %% [markdown]
# ## The clips
#
# Training clips are drawn, not stored: one coloured shape that moves. A seed gives the same ones everywhere. Eight of
# the 48 combinations of colour, shape and motion are never among them.

# %%
train_scenes = data.clips(1, scenes)
rows({data.caption(scene): data.render(scene) for scene in train_scenes[:3]}, columns=6)

# %% [markdown]
# Their latents come from the linear codec that the small VAE was trained to imitate: fitted in seconds, and far quicker
# to encode with than the VAE.

# %%
pca = fit_pca_latents(data.render(scene) for scene in data.clips(0, 240))
latents = encode_scenes(train_scenes, pca, folder / "latents.npy")
captions = [(scene.colour, scene.shape, scene.motion) for scene in train_scenes]
clips = student.Clips(latents, captions, teacher.tokenizer, teacher.text_encoder, seed=0)
print("latents", latents.shape, "- captions' features", clips.contexts.shape)

# %% [markdown]
# ## The student
#
# The teacher's weights, and one new projection in each block (`proj_l`, of the linear branch), zero at first.

# %%
attention = replace(student.SLA, topk=0.1)
networks = student.Networks(teacher.dit, attention)
start = networks.graft()
print(f"{attention.kind}, top-k {attention.topk}, blocks of {attention.block_q} queries x {attention.block_k} keys")
for path, leaf in jax.tree_util.tree_leaves_with_path(start):
    if "proj_l" in (name := jax.tree_util.keystr(path, simple=True, separator=".")):
        print("new:", name, leaf.shape)

# %% [markdown]
# How far is it from the teacher before it learns anything? The relative error of its velocity, at four noise levels, on
# sixteen clips of their own. Part of it is guidance, which the student does not have yet; the rest is the keys that it
# leaves out.

# %%
guidance, levels = 2.0, (0.95, 0.8, 0.5, 0.2)
new_scenes = data.clips(2, 16)
new_latents = pca.encode(data.to_float(np.stack([data.render(scene) for scene in new_scenes])))
asked = [clips.captions.rows[(scene.colour, scene.shape, scene.motion), 0] for scene in new_scenes]
new_context, empty = jnp.asarray(clips.contexts[asked]), jnp.asarray(clips.empty)


def velocity_error(params):
    return _velocity_error(jax.device_get(params))  # where training keeps them is no reason to compile again


@jax.jit
def _velocity_error(params):
    noise = jax.random.normal(jax.random.key(0), new_latents.shape)
    target = guided(networks.teacher, new_context, empty, guidance)

    def at(s):
        times = jnp.full(len(noise), s)
        x = add_noise(new_latents, noise, times)
        wanted = target(x, 1000 * times)
        found = networks.student(params, x, 1000 * times, new_context)
        return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)

    return jax.lax.map(at, jnp.asarray(levels))


before = velocity_error(start)
print(", ".join(f"s = {s}: {e:.1%}" for s, e in zip(levels, before.tolist(), strict=True)))

# %% [markdown]
# ## Training
#
# The white-box loss: noise a clip, ask teacher and student, take the squared difference. One loop drives every stage of
# training here; it checkpoints, resumes a killed run with the same bits, and writes a line of metrics now and then.

# %%
optimizer = replace(sla.ADAM, warmup=20)
config = sla.SLAConfig(steps=steps, batch=batch, attention=attention, guidance=guidance, optimizer=optimizer)
stage = sla.SLAStage(config, networks, clips)
curve = [(0, float(before.mean()))]


def measure(state, step):
    curve.append((step, float(velocity_error(state.ema).mean())))
    return {"unseen_error": curve[-1][1]}


trained = loop.run(stage, loop.LoopConfig(steps, str(folder / "run"), log_every=10, sample_every=20), measure)
metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
losses = [m for m in metrics if "loss" in m]
print(f"{steps} updates, {np.median([m['seconds_per_step'] for m in losses]):.2f} s each")

# %%
after = velocity_error(trained.ema)
fig, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
axes[0].plot([m["step"] for m in losses], [m["loss"] for m in losses], ".-")
axes[0].set(title="loss, each of one batch", xlabel="updates", ylim=(0, None))
axes[1].plot(*zip(*((n, 100 * e) for n, e in curve), strict=True), "o-")
axes[1].set(title="error of the velocity, unseen clips, %", xlabel="updates", ylim=(0, None))
for name, errors in (("before", before), ("after", after)):
    axes[2].plot(levels, [100 * e for e in errors], "o-", label=name)
axes[2].set(title="by noise level, %", xlabel="noise level s", ylim=(0, None))
axes[2].legend(frameon=False)
plt.show()

# %% [markdown]
# ## What it makes
#
# Export the averaged weights and put them into a pipeline. Twelve steps each, from the same noise: the teacher with
# guidance, and the student without, before training and after. Twelve clips of each are read back: what is right, and
# how well an ideal clip fits. The seconds are those in the transformer.


# %%
def grown(params, name):
    networks.export(params, folder / name)
    sampling = {name: getattr(attention, name) for name in ("topk", "block_q", "block_k")}
    settings = replace(teacher.spec.config, attention="sagesla", guidance=(1.0, 1.0), **sampling)
    parts = {part: getattr(teacher, part) for part in ("vae", "text_encoder", "tokenizer")}
    return turbojax.Pipeline(settings, dit=turbojax.load(folder / name), name=name, **parts)


wanted = pairs(12)
prompts, seeds = [prompt_of(combination) for combination, _ in wanted], [seed for _, seed in wanted]
models = {"teacher": teacher, "before": grown(start, "before"), "after": grown(trained.ema, "after")}
shown = {}
for name, model in models.items():
    videos = model.generate(prompts, seed=seeds, paired=True, batch_size=6, steps=12)
    found = [score(video.frames, *pair) for video, pair in zip(videos, wanted, strict=True)]
    right = [f"{part} {sum(getattr(s, part) for s in found)}" for part in ("colour", "shape", "motion")]
    fit, seconds = np.mean([s.fit for s in found]), videos[-1].timings["dit"] / 6
    print(f"{name:8} right of {len(found)}: {', '.join(right)}; fit {fit:.1f} dB; {seconds:.2f} s a clip")
    shown |= {f"{prompts[i]}: {name}": videos[i].frames for i in (0, 1)}
rows({name: shown[name] for name in sorted(shown, key=lambda name: prompts.index(name.split(":")[0]))})

# %% [markdown]
# Before training, next to nothing is left of the clips. These 200 updates bring back every colour, most motions and
# half of the shapes: a start, not a student to ship. The shipped one keeps a quarter of the keys; it had 700 such
# updates with twice the clips each, and then 1,000 of rCM:
#
# ```
# turbojax train vae --part pca --out runs/vae
# turbojax train sla --config tiny-sla --teacher turbojax/tiny/teacher --pca runs/vae/pca.npz \
#     --out runs/sla --export runs/sla/student
# turbojax train rcm --config tiny-rcm --teacher turbojax/tiny/teacher --pca runs/vae/pca.npz \
#     --start runs/sla/student --out runs/rcm --export runs/rcm/student
# ```
#
# `python -m experiments.training` asks what has to move and for how long; `--config wan2.1-1.3b-sla` trains a student
# of Wan's own 1.3B model from shards of latents.
