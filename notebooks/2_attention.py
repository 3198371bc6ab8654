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
# Sparse-linear attention (SLA) computes exact attention for a few blocks of keys and leaves the rest to a linear
# branch. Which blocks are they, and how much of the attention do they hold? Here are the shipped model's queries and
# keys, in every layer, while it makes a clip: at three of its noise levels, from nearly pure noise (1) down.

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
queries, keys = captured[1]  # of the middle level
layers, _, tokens, heads, width = queries.shape
print("noise levels:", ", ".join(f"{s:.2f}" for s in levels))
print(f"{layers} layers of {heads} heads, {tokens} tokens, head width {width}")

# %% [markdown]
# ## Every head looks somewhere else
#
# 320 tokens are five latent frames of 8 x 8. Each picture is one head's softmax: a row is a query, a column a key,
# brighter is more, and white lines part the frames. A narrow diagonal is a place that looks at itself and its
# neighbours; further diagonals, 64 tokens apart, are the same place in other frames. Some heads do only that, others
# look nearly everywhere.


# %%
def softmax_of(q, k, head):
    scores = jnp.einsum("qd,kd->qk", q[0, :, head].astype(jnp.float32), k[0, :, head].astype(jnp.float32))
    scores = scores / q.shape[-1] ** 0.5
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


fig, axes = plt.subplots(layers, heads, figsize=(1.7 * heads, 1.8 * layers), layout="constrained", dpi=72)
for layer, head in np.ndindex(layers, heads):
    weights = softmax_of(queries[layer], keys[layer], head)
    axis = axes[layer, head]
    axis.imshow(np.sqrt(weights), cmap="magma", vmax=np.quantile(np.sqrt(weights), 0.995))
    axis.set_title(f"layer {layer}, head {head}", fontsize=8)
    axis.set(xticks=[], yticks=[])
    for edge in range(64, len(weights), 64):
        axis.axhline(edge - 0.5, color="white", linewidth=0.3)
        axis.axvline(edge - 0.5, color="white", linewidth=0.3)
fig.suptitle(f"square root of the attention weights at noise level {levels[1]:.2f}")
plt.show()

# %% [markdown]
# ## What routing keeps
#
# The router averages queries and keys over blocks (here of 16 queries and 8 keys) and keeps, for each block of queries,
# the key blocks with the highest score between the averages. Below, for one layer: the mass of each pair of blocks, and
# a blue frame around what is kept. It finds the diagonals without having computed the attention.


# %%
def block_mass(q, k, head):
    weights = softmax_of(q, k, head)
    rows, columns = len(weights) // sparse.block_q, len(weights) // sparse.block_k
    return weights.reshape(rows, sparse.block_q, columns, sparse.block_k).sum(3).mean(1)


layer, sizes = layers // 2, {"block_q": sparse.block_q, "block_k": sparse.block_k}
index = kernels.sla_block_map(queries[layer], keys[layer], topk=sparse.topk, **sizes)
fig, axes = plt.subplots(2, 2, figsize=(9, 5), layout="constrained")
for head, axis in enumerate(axes.flat):
    mass = block_mass(queries[layer], keys[layer], head)
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
# Two of these heads look narrowly and lose little; the other two spread, and leave about half of what they look at to
# the linear branch. Would more blocks help, or a better choice of them? For every share of the blocks, mean over the
# heads of a layer: the mass that routing keeps, that the best choice of as many would keep, and that chance would.

# %%
shares = np.arange(1, mass.shape[1] + 1) / mass.shape[1]
routed, best = np.zeros((2, layers, heads, len(shares)))
for layer, head in np.ndindex(layers, heads):
    mass = block_mass(queries[layer], keys[layer], head)
    order = kernels.sla_block_map(queries[layer], keys[layer], topk=1.0, **sizes)
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
# Routing is close to the best choice but in the last layer: what costs is how few blocks are kept, not which. (`python
# -m experiments.attention_mass` has this with more clips, block sizes and heads.) The same seed with fewer and fewer
# blocks, down to two of 40: a quarter, which the model was tuned to, changes the ground's grey and little else. At a
# tenth the circle loses its shape, and at a twentieth it shrinks as well; colour and motion outlast the shape.

# %%
from dataclasses import replace

from experiments.strips import rows

clips = {}
for topk in (1.0, 0.25, 0.1, 0.05):
    video = pipe.generate("a red circle moving right", seed=0, attention=replace(sparse, topk=topk))
    clips[f"top-k {topk}"] = video.frames
rows(clips)
