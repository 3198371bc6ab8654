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
# # Quickstart: text to video, and an ablation of your own
#
# A small model of Wan's architecture ships with the library. It was trained on clips of one coloured shape that moves,
# so a laptop's CPU makes a clip in a second, and a program can tell whether the clip shows what was asked for.

# %%
import turbojax

pipe = turbojax.Pipeline.load("tiny")
video = pipe.generate("a red circle moving right", seed=0)
video

# %% [markdown]
# The first clip compiles its programs; later ones with the same settings do not. Seconds by stage, first and second:

# %%
again = pipe.generate("a blue square moving up", seed=1)
for made in (video, again):
    print("   ".join(f"{stage} {seconds:.2f}" for stage, seconds in made.timings.items()))

# %% [markdown]
# Everything that shaped a clip travels with it, also into the files that `video.save("clip.mp4")` writes:

# %%
again.metadata

# %% [markdown]
# Several prompts and seeds make a list. One row a clip, eight of its 17 frames:

# %%
from PIL import Image

from turbojax.video import contact_sheet

prompts = ["a green triangle moving left", "a yellow square moving down"]
videos = pipe.generate(prompts, seed=[0, 1], batch_size=4)
Image.fromarray(contact_sheet([v.frames for v in videos]))

# %% [markdown]
# ## What can be varied without loading a weight again
#
# Attention (`dense`, `sage`, `sla`, `sagesla` and the share `topk` of key blocks that it keeps), steps, sampler,
# guidance and quantisation are options of `generate`. The same prompt and noise with four kinds of attention: exact
# (`dense`), in low-bit numbers (`sage`), and in low-bit numbers over the best half and the best tenth of the key blocks
# (`sagesla`). Low-bit numbers change nothing that can be seen, half of the blocks little; at a tenth the circle loses
# its shape. Unless told otherwise, this model keeps a quarter.

# %%
from experiments.strips import rows

clips = {}
for attention, topk in (("dense", None), ("sage", None), ("sagesla", 0.5), ("sagesla", 0.1)):
    name = attention if topk is None else f"{attention}, top-k {topk}"
    clips[name] = pipe.generate("a red circle moving right", seed=0, attention=attention, topk=topk).frames
rows(clips)

# %% [markdown]
# ## An ablation of your own, in ten lines
#
# `score` reads a clip back: are colour, shape and motion those of the prompt, and how closely does the clip fit an
# ideal one of what it shows, in dB? `summarise` gives the means with 95% intervals. Change the loop to what you want to
# know. Eight clips a setting are few: look at the intervals before you believe a difference. Here those of the shapes
# part 0.05 from the others; nothing parts 0.25 from 1.

# %%
# An ablation of one's own.
from turbojax.train.evaluate import pairs, prompt_of, score, summarise

wanted, seeds = zip(*pairs(8), strict=True)
prompts = [prompt_of(combination) for combination in wanted]
for topk in (0.05, 0.25, 1.0):
    videos = pipe.generate(prompts, seed=seeds, paired=True, batch_size=8, attention="sagesla", topk=topk)
    found = summarise([score(v.frames, *asked) for v, asked in zip(videos, pairs(8), strict=True)])
    (few, many), (low, high) = found["shape_interval"], found["fit_interval"]
    print(f"top-k {topk:<4}  shape right: {found['shape']:.0%} [{few:.0%}, {many:.0%}]", end="   ")
    print(f"fit: {found['fit']:.1f} dB [{low:.1f}, {high:.1f}]")

# %% [markdown]
# `python -m experiments.sparsity_steps` does this over a grid of sparsity and steps, with 48 clips a cell, tables and
# pictures; [docs/results.md](../docs/results.md) has what the experiments found. The next notebook shows what sparse
# attention keeps and what it leaves out.
