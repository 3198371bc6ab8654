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
# # Attention and sparsity, seen
#
# Sparse-linear attention computes exact attention for a few blocks of keys and leaves the rest to a linear branch.
# Which blocks, and how much do they hold? Here are the shipped model's queries and keys while it makes a clip.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import pallas_kernels as kernels
import turbojax
from experiments.capture import map_layers, sample
from experiments.sparse import own_attention

pipe = turbojax.Pipeline.load("tiny")
sparse = own_attention(pipe.spec)
run = sample(pipe, ["a red circle moving right"], [0], states=3)
captured = map_layers(run, lambda q, k, v: (q, k))
levels = [state.s for state in run.states]
q, k = captured[0]
print("states at noise levels", [round(s, 3) for s in levels], "- q of all layers", q.shape)

# %% [markdown]
# ## Every head looks somewhere else
#
# 320 tokens: five latent frames of 8 x 8. Each picture is one head's softmax: a row is a query, a column a key,
# brighter is more. Stripes at a distance of 64 are the same place in another frame; a narrow diagonal is a place
# looking at itself. White lines part the frames.


# %%
def softmax_of(q, k, head):
    scores = jnp.einsum("qd,kd->qk", q[0, :, head].astype(jnp.float32), k[0, :, head].astype(jnp.float32))
    scores = scores / q.shape[-1] ** 0.5
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


layers, heads = q.shape[0], q.shape[3]
fig, axes = plt.subplots(layers, heads, figsize=(1.7 * heads, 1.8 * layers), layout="constrained", dpi=72)
for layer, head in np.ndindex(layers, heads):
    weights = softmax_of(captured[1][0][layer], captured[1][1][layer], head)
    axis = axes[layer, head]
    axis.imshow(np.sqrt(weights), cmap="magma", vmax=np.quantile(np.sqrt(weights), 0.995))
    axis.set_title(f"layer {layer}, head {head}", fontsize=8)
    axis.set(xticks=[], yticks=[])
    for edge in range(64, len(weights), 64):
        axis.axhline(edge - 0.5, color="white", linewidth=0.3)
        axis.axvline(edge - 0.5, color="white", linewidth=0.3)
fig.suptitle(f"square root of the attention weights at s = {levels[1]:.2f}")
plt.show()

# %% [markdown]
# ## What routing keeps
#
# The router pools queries and keys into blocks and keeps, for each query block, the key blocks with the highest pooled
# score. Below, for one layer: the mass of each pair of blocks, and a frame around what is kept.


# %%
def block_mass(q, k, head):
    weights = softmax_of(q, k, head)
    rows, columns = len(weights) // sparse.block_q, len(weights) // sparse.block_k
    return weights.reshape(rows, sparse.block_q, columns, sparse.block_k).sum(3).mean(1)


layer = layers // 2
q, k = captured[1][0][layer], captured[1][1][layer]
index = kernels.sla_block_map(q, k, topk=sparse.topk, block_q=sparse.block_q, block_k=sparse.block_k)
fig, axes = plt.subplots(1, heads, figsize=(3.6 * heads, 2.4), layout="constrained")
for head, axis in enumerate(axes):
    mass = block_mass(q, k, head)
    kept = np.take_along_axis(mass, np.asarray(index[0, head]), axis=1).sum(1)
    axis.imshow(mass, cmap="magma", vmin=0)
    for row, blocks in enumerate(np.asarray(index[0, head])):
        for column in blocks:
            box = (column - 0.45, row - 0.45), 0.9, 0.9
            axis.add_patch(plt.Rectangle(*box, fill=False, edgecolor="deepskyblue", linewidth=1))
    axis.set(title=f"head {head}: kept {100 * kept.mean():.0f}% of the mass", xlabel="key block", ylabel="query block")
fig.suptitle(f"layer {layer}, top-k {sparse.topk:g}: {index.shape[-1]} of {mass.shape[1]} key blocks")
plt.show()

# %% [markdown]
# ## How much a share of the blocks holds
#
# For every share of the blocks: the mass that routing keeps, that the best choice of as many would keep, and that
# chance would. `python -m experiments.attention_mass` has this with more clips, block sizes, layers and heads.

# %%
shares = np.arange(1, mass.shape[1] + 1) / mass.shape[1]
routed, best = np.zeros((2, layers, heads, len(shares)))
for layer, head in np.ndindex(layers, heads):
    q, k = captured[1][0][layer], captured[1][1][layer]
    mass = block_mass(q, k, head)
    order = kernels.sla_block_map(q, k, topk=1.0, block_q=sparse.block_q, block_k=sparse.block_k)
    routed[layer, head] = np.take_along_axis(mass, np.asarray(order[0, head]), axis=1).cumsum(1).mean(0)
    best[layer, head] = np.sort(mass, axis=1)[:, ::-1].cumsum(1).mean(0)
fig, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for layer in range(layers):
    axis.plot(shares, routed[layer].mean(0), color=f"C{layer}", label=f"layer {layer}")
    axis.plot(shares, best[layer].mean(0), "--", color=f"C{layer}", linewidth=1)
axis.plot([0, 1], [0, 1], ":", color="grey", label="chance")
axis.set(xlabel="share of the key blocks kept", ylabel="attention mass held", title="routed (line), best (dashes)")
axis.legend()
plt.show()

# %% [markdown]
# ## And what it does to the clip
#
# The same seed with fewer and fewer blocks, down to the last few. A quarter changes little: the model was tuned to it.
# At a tenth the circle loses its shape, and at a twentieth it shrinks as well; colour and motion outlast the shape.

# %%
from dataclasses import replace

from PIL import Image

from turbojax.video import contact_sheet

clips = {}
for topk in (1.0, 0.25, 0.1, 0.05):
    clips[topk] = pipe.generate("a red circle moving right", seed=0, attention=replace(sparse, topk=topk))
print("rows: top-k", *clips)
Image.fromarray(contact_sheet([v.frames for v in clips.values()]))
