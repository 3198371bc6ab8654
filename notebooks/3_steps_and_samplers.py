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
# # Steps and samplers
#
# A diffusion model turns noise into a clip in steps. The teacher takes 50, and asks its network twice in each, with the
# prompt and without (guidance). A student distilled with rCM takes one to four and asks once. Here both are seen at
# work.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import turbojax
from experiments.capture import sample
from experiments.strips import rows
from turbojax.samplers import flow, rcm

prompt = "a red circle moving right"
teacher, pipe = turbojax.Pipeline.load("tiny-teacher"), turbojax.Pipeline.load("tiny")

# %% [markdown]
# ## Where the noise levels lie
#
# The noise level s runs from 1, pure noise, to 0. UniPC's steps are even but for a shift to high noise, where a clip's
# outline is decided. rCM's few lie higher still, the published ones more so than this student's own, which did better
# on its small clips. A dot is a level at which the network is asked; the last, at 0, is the finished clip.

# %%
fig, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
grids = {
    "UniPC, 50 steps, shift 3": flow.time_grid(50, 3.0),
    "UniPC, 8 steps, shift 3": flow.time_grid(8, 3.0),
    "rCM, 4 steps, as published": rcm.time_grid(4, 80.0),
    **{f"rCM, {n} of its own": rcm.time_grid(n, 80.0, pipe.spec.config.mid_times) for n in (4, 2, 1)},
}
for line, levels in enumerate(grids.values()):
    axis.plot(levels, [-line] * len(levels), "o", markersize=4)
axis.set_yticks([-line for line in range(len(grids))], list(grids))
axis.set(xlabel="noise level s", xlim=(1.02, -0.02))
plt.show()

# %% [markdown]
# ## What the model believes on the way
#
# At noise level s the model gives a velocity v for the noisy latents x, and with it a guess of the clean clip: x - s v.
# Four of the guesses of a teacher with 24 steps, decoded, show how it makes up its mind: place, colour and direction at
# once, from pure noise; the outline soon after; and little from the middle on.


# %%
def guesses(pipe, states, **options):
    """The decoded guess of the clean clip at some states of a sampling run."""
    run = sample(pipe, [prompt], [0], states=states, **options)
    shown = {}
    for state in run.states:
        timestep = jnp.full(1, 1000.0 * state.s)
        velocity = state.dit(state.latents, timestep, run.context, attention=run.settings.attention)
        video = jax.device_get(pipe.vae.decode(state.latents - state.s * velocity)[0])
        shown[f"s = {state.s:.2f}"] = np.clip(np.rint((video + 1) * 127.5), 0, 255).astype(np.uint8)
    return shown


rows(guesses(teacher, 4, attention="dense", steps=24))

# %% [markdown]
# ## Fewer steps
#
# For clips as simple as these UniPC needs far fewer than 50. The teacher from the same noise, with seconds in the
# transformer: 12 steps and even 4 still give a circle, 2 a dented one. Without guidance, at half the passes (the last
# row, which costs what the student's four steps do), 4 steps leave it small and flattened. Over many clips that is
# where distillation shows: four unguided steps get 79% of the shapes right with the teacher and 96% with the student
# ([the model card](../turbojax/tiny/README.md)).

# %%
clips = {}
for steps, guidance in ((50, 2.0), (12, 2.0), (4, 2.0), (2, 2.0), (4, 1.0)):
    for _ in range(2):  # the first compiles
        clip = teacher.generate(prompt, seed=0, steps=steps, guidance=guidance)
    name = f"{steps} steps{', guided' if guidance > 1 else ''}: {clip.timings['dit']:.2f} s"
    clips[name] = clip.frames
rows(clips)

# %% [markdown]
# ## rCM's sampler
#
# `rcm-sde` adds fresh noise after each guess and guesses again; `rcm-ode` follows the flow. The student in one to four
# steps: one step is the same for both, and dented. Fresh noise mends it from the second step on; ODE carries the dents
# along.

# %%
clips = {}
for sampler in ("rcm-sde", "rcm-ode"):
    for steps in (1, 2, 3, 4):
        name = f"{sampler}, {steps} step" + "s" * (steps > 1)
        clips[name] = pipe.generate(prompt, seed=0, sampler=sampler, steps=steps).frames
rows(clips)

# %% [markdown]
# ## Does distillation cost variety?
#
# The same prompt with six seeds, one frame each from the middle of the clip. Place, size and background change with the
# seed in both, and from the same seed the student makes a clip of its own. Over many clips, how much they vary relative
# to drawn ones is 0.99 for the teacher and 0.92 for the student (`turbojax evaluate`, in the model card).

# %%
middles = {}
for name, model in (("teacher", teacher), ("student", pipe)):
    videos = model.generate(prompt, seed=range(6), batch_size=6)
    middles[name] = np.stack([video.frames[len(video.frames) // 2] for video in videos])
rows(middles, columns=6)

# %% [markdown]
# `python -m experiments.sampler` measures all of this: modes, steps, middle noise levels, start and diversity, with
# intervals.
