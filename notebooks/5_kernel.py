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
# # A kernel from the inside, without a GPU
#
# Every kernel here has three paths behind one function: plain XLA, the Mosaic GPU kernel, and the same kernel in an
# interpreter that runs on a CPU and watches for races. And a kernel can be compiled for a named GPU on a machine that
# has none, down to the registers it takes. This notebook does all of it with the smallest one: rows to INT8.

# %%
import os

os.environ.setdefault("NPROC", "16")  # the interpreter's threads wait for each other: more of them than cores
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # compiling for a GPU takes none of its libraries

import inspect

import jax.numpy as jnp
import numpy as np

from pallas_kernels import quantize_per_token
from pallas_kernels.quantize import rows_xla
from pallas_kernels.quantize_kernels import quantize_rows

# %% [markdown]
# ## The reference, in plain JAX

# %%
print(inspect.getsource(rows_xla))

# %% [markdown]
# ## The kernel
#
# A row lives in the registers of one warpgroup: 128 threads read it once, agree on its largest value, and write the
# INT8 row. `plgpu.kernel` describes the grid; the body is what one block does.

# %%
print(inspect.getsource(quantize_rows))

# %% [markdown]
# ## In the interpreter
#
# `implementation="interpret"` runs that very body on the CPU, thread by thread, with race detection. 13 rows do not
# divide into blocks of 8, so the ragged end is covered too. The kernel rounds by adding a large number, XLA by its own
# rounding: the same integers, ties included.

# %%
x = jnp.asarray(np.random.default_rng(0).standard_normal((13, 256)), jnp.bfloat16)
plain, plain_scale = quantize_per_token(x, implementation="xla")
kernel, kernel_scale = quantize_per_token(x, implementation="interpret")
print(f"INT8 values that differ: {int((plain != kernel).sum())} of {plain.size}")
print("scales are the same bits:", bool((plain_scale == kernel_scale).all()))
back = kernel * kernel_scale[:, None]
print(f"relative L2 of rounding: {float(jnp.linalg.norm(back - x) / jnp.linalg.norm(x.astype(jnp.float32))):.4f}")

# %% [markdown]
# What cannot run says why, instead of falling back in silence:

# %%
for shape, implementation in (((4, 200), "interpret"), ((4, 256), "mosaic_gpu")):
    try:
        quantize_per_token(jnp.ones(shape, jnp.bfloat16), implementation=implementation)
    except NotImplementedError as error:
        print(f"{shape}, {implementation}: {error}")

# %% [markdown]
# ## A list of blocks
#
# Sparse attention's kernels read, for each block of queries, a list of key blocks. The router makes it; anybody can:
# here a window of three blocks around the diagonal, and every query sees the first block as well.

# %%
import matplotlib.pyplot as plt

from pallas_kernels import block_sparse_attention, dense_attention

rng = np.random.default_rng(1)
q, k, v = (jnp.asarray(rng.standard_normal((1, 256, 2, 32)), jnp.float32) for _ in range(3))
rows = np.arange(16)
window = np.stack([np.zeros(16, int), *(np.clip(rows, 2, 14) + offset for offset in (-1, 0, 1))], axis=1)
index = jnp.asarray(np.broadcast_to(window, (1, 2, 16, 4)), jnp.int32)
sparse = block_sparse_attention(q, k, v, index, block_q=16, block_k=16)

mask = np.zeros((16, 16), bool)
np.put_along_axis(mask, window, True, axis=1)
seen = np.kron(mask, np.ones((16, 16), bool))
scores = jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) / 32**0.5, -jnp.inf)
weights = jnp.exp(scores - scores.max(-1, keepdims=True))
masked = jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
print(f"against dense attention under that mask: {float(jnp.abs(sparse - masked).max()):.1e}")
print(f"against dense attention without it: {float(jnp.abs(sparse - dense_attention(q, k, v)).max()):.1e}")
fig, axis = plt.subplots(figsize=(2.6, 2.6), layout="constrained")
axis.imshow(mask, cmap="Blues")
axis.set(xlabel="key block", ylabel="query block", title="the list, as a mask")
plt.show()

# %% [markdown]
# ## Registers on an H100, without an H100
#
# The `aot` extra (`uv run --extra aot`) compiles a program for a named card with no driver and no device. A thread has
# at most 255 registers there; what does not fit spills to memory, and makes a slow kernel. Three programs: the rows
# above, the same after LayerNorm and modulation, and Sage attention, which is four kernels: q and k to INT8
# (`quantize_rows`), v to FP8, and the attention itself.

# %%
from pallas_kernels.aot import compile_cases, require_extra

wanted = {
    "pallas_kernels.cases_linear:compile_cases": ["quantize_rows_1.3b_1536", "norm_modulate_quantize_token_1.3b_1536"],
    "pallas_kernels.cases_attention:compile_cases": ["sage_attention 777x2x128"],
}
try:
    require_extra()
except ModuleNotFoundError as error:
    print(error)
else:
    for source, names in wanted.items():
        for report in compile_cases("h100", source, names):
            print(f"{report.case}, compiled for an {report.target} in {report.seconds:.1f} s")
            for found in report.kernels:
                print(f"    {found.kernel}: {found.registers} registers, {found.spill_bytes} bytes spilled,", end=" ")
                print(f"{found.smem_bytes} bytes of shared memory")

# %% [markdown]
# `python -m pallas_kernels.aot h100 pallas_kernels.cases_linear:compile_cases` does this for every kernel at the shapes
# of the real models; the same for `rtx4090`, `rtx5090` and `a100`. CONTRIBUTING.md says how to add a kernel.
