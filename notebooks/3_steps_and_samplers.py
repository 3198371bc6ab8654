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
# A diffusion model turns noise into a clip in steps. The teacher takes 50, twice a step because of guidance; a student
# distilled with rCM takes one to four. Here both are seen at work: what the model believes the clip will be, at each
# step on the way.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import turbojax
from experiments.capture import sample
from turbojax.samplers import flow, rcm
from turbojax.video import contact_sheet

prompt = "a red circle moving right"
teacher, pipe = turbojax.Pipeline.load("tiny-teacher"), turbojax.Pipeline.load("tiny")

# %% [markdown]
# ## Where the noise levels lie
#
# `s` runs from 1, pure noise, to 0. A student's few levels crowd where the picture is decided, at high noise. The
# published levels crowd more than this student's own: small latents carry their content at lower noise.

# %%
fig, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
grids = {
    "UniPC, 50 steps, shift 3": flow.time_grid(50, 3.0),
    "UniPC, 8 steps, shift 3": flow.time_grid(8, 3.0),
    "rCM, 4 steps, as published": rcm.time_grid(4, 80.0),
    **{f"rCM, {n} steps": rcm.time_grid(n, 80.0, pipe.spec.config.mid_times) for n in (4, 2, 1)},
}
for row, levels in enumerate(grids.values()):
    axis.plot(levels, [-row] * len(levels), "o", markersize=4)
axis.set_yticks([-row for row in range(len(grids))], list(grids))
axis.set(xlabel="noise level s", xlim=(1.02, -0.02))
plt.show()

# %% [markdown]
# ## What the model believes on the way
#
# At noise level s the model gives a velocity v, and with it a guess of the clean clip: x - s v. Decoded, the guesses of
# the teacher with 24 steps show how it makes up its mind: place, colour and direction at once, the outline soon after,
# and little from the middle on.


# %%
def guesses(pipe, states, **options):
    """The decoded guess of the clean clip at some states of a sampling run."""
    run = sample(pipe, [prompt], [0], states=states, **options)
    shown = {}
    for state in run.states:
        timestep = jnp.full(1, 1000.0 * state.s)
        velocity = state.dit(state.latents, timestep, run.context, attention=run.settings.attention)
        video = jax.device_get(pipe.vae.decode(state.latents - state.s * velocity)[0])
        shown[state.s] = np.clip(np.rint((video + 1) * 127.5), 0, 255).astype(np.uint8)
    return shown


seen = guesses(teacher, 4, attention="dense", steps=24)
print("rows: s =", *(f"{s:.2f}" for s in seen))
Image.fromarray(contact_sheet(list(seen.values())))

# %% [markdown]
# ## Fewer steps
#
# UniPC needs far fewer than 50 for clips as simple as these. From the same noise, with 50, 12, 4 and 2 steps, each with
# two passes because of guidance, and in the last row 4 without guidance, which is what the student's 4 cost:

# %%
ways = [{"steps": steps} for steps in (50, 12, 4, 2)] + [{"steps": 4, "guidance": 1.0}]
clips = [teacher.generate(prompt, seed=0, **way) for way in ways]
for way, clip in zip(ways, clips, strict=True):
    print(way, f"{clip.timings['dit']:.2f} s in the transformer")
Image.fromarray(contact_sheet([clip.frames for clip in clips]))

# %% [markdown]
# ## rCM's sampler
#
# `rcm-sde` adds fresh noise after each guess and guesses again; `rcm-ode` follows the flow. The student in four steps
# down to one, SDE in the first four rows and ODE in the others. One step is the same for both, and dented; fresh noise
# mends it from the second step on, while ODE carries the dents along:

# %%
clips = [
    pipe.generate(prompt, seed=0, sampler=sampler, steps=steps)
    for sampler in ("rcm-sde", "rcm-ode")
    for steps in (4, 3, 2, 1)
]
Image.fromarray(contact_sheet([clip.frames for clip in clips]))

# %% [markdown]
# ## Does distillation cost variety?
#
# The same prompt with six seeds: teacher above, student below. One frame each, from the middle of the clip. Place and
# background follow the seed in both; `turbojax evaluate` puts the student's diversity at 0.92, the teacher's at 0.99.

# %%
rows = []
for made in (teacher, pipe):
    videos = made.generate(prompt, seed=range(6), batch_size=6)
    rows.append(np.stack([video.frames[len(video.frames) // 2] for video in videos]))
Image.fromarray(contact_sheet(rows, columns=6))

# %% [markdown]
# `python -m experiments.sampler` measures all of this: modes, steps, middle noise levels, start and diversity, with
# intervals.
