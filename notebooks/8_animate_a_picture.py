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
# # Draw a picture, animate it
#
# An image-to-video model starts a clip from a picture and does with it what the prompt says. `tiny-i2v` is the small
# one: two experts, one for the noisy steps and one for the rest, as in Wan 2.2's large model.

# %%
import numpy as np
from PIL import Image, ImageDraw

import turbojax
from experiments.strips import rows

pipe = turbojax.Pipeline.load("tiny-i2v")
config = pipe.spec.config
print(f"{config.steps} steps of {config.sampler}; above s = {config.boundary:g} the high-noise expert, then the other")

# %% [markdown]
# Draw something that it knows: a red, green, blue or yellow circle, square or triangle on a dark ground.

# %%
picture = Image.new("RGB", (128, 128), (30, 30, 30))
ImageDraw.Draw(picture).ellipse((44, 44, 84, 84), fill=(228, 42, 42))
picture

# %%
video = pipe.generate("the circle moves up", image=picture, seed=0)
video

# %% [markdown]
# ## One picture, four prompts
#
# Eight frames a row. The first is the picture again, as the model draws it; the VAE alone, encoding and decoding, keeps
# 33 dB of a first frame.

# %%
prompts = [f"the circle moves {motion}" for motion in ("left", "right", "up", "down")]
videos = pipe.generate(prompts, image=picture, seed=0)
for prompt, made in zip(prompts, videos, strict=True):
    error = np.mean(np.square(made.frames[0] - np.asarray(picture, np.float32)))
    print(f"{prompt}: first frame {10 * np.log10(255**2 / error):.1f} dB from the picture")
rows({prompt: made.frames for prompt, made in zip(prompts, videos, strict=True)})

# %% [markdown]
# ## Other pictures
#
# A shape near the edge, another one, and one that was never drawn in training: a star. Each row begins with the picture
# itself. The model blunts the star into something like a triangle or a house, and moves that down as it was told.

# %%
pictures = {}
for name in ("square", "triangle", "star"):
    pictures[name] = Image.new("RGB", (128, 128), (24, 24, 24))
ImageDraw.Draw(pictures["square"]).rectangle((10, 60, 50, 100), fill=(242, 214, 48))
ImageDraw.Draw(pictures["triangle"]).polygon([(64, 60), (92, 106), (36, 106)], fill=(48, 92, 236))
turn = np.arange(10) * np.pi / 5 - np.pi / 2
reach = np.where(np.arange(10) % 2, 11, 28)
points = zip(64 + reach * np.cos(turn), 40 + reach * np.sin(turn), strict=True)
ImageDraw.Draw(pictures["star"]).polygon([(float(x), float(y)) for x, y in points], fill=(44, 186, 68))
asked = {"square": "a yellow square moving right", "triangle": "the triangle moves up", "star": "the shape moves down"}
clips = {}
for name, prompt in asked.items():
    made = pipe.generate(prompt, image=pictures[name], seed=1)
    clips[prompt] = np.stack([np.asarray(pictures[name]), *made.frames[::2]])
rows(clips, columns=10)

# %% [markdown]
# ## Is it what was asked for?
#
# Freshly drawn pictures, two prompts each, and a program that reads colour, shape and motion back from the clips.
# `turbojax evaluate --model tiny-i2v` does this for hundreds.

# %%
from turbojax.train.i2v_evaluate import evaluate, summarise, wanted

scores = [found for found, _ in evaluate(pipe, wanted(8))]
summary = summarise(scores)
for name in ("colour", "shape", "motion"):
    low, high = summary[f"{name}_interval"]
    print(f"{name:7} right in {summary[name]:.0%} [{low:.0%}, {high:.0%}] of {summary['clips']} clips")
print(f"first frame {summary['first_frame']:.1f} dB from the picture")
