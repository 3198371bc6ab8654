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
# # Bring your own weights, on a GPU
#
# The code that made small clips on a CPU runs Wan 2.1 and 2.2 on NVIDIA GPUs. Set `WAN` to a converted folder and run
# this notebook again; without it, the shipped model stands in, and every cell still runs.
#
# ```
# uv run turbojax convert --dit DIT --vae VAE --text-encoder T5 --tokenizer TOKENIZER --out wan
# WAN=wan uv run --extra cuda --extra notebooks jupyter lab notebooks/7_own_weights.ipynb
# ```

# %%
import os
from dataclasses import asdict

import jax

import turbojax
from turbojax.compilation_cache import use_compilation_cache
from turbojax.pipeline_config import find_pipeline

model = os.environ.get("WAN", "tiny")
use_compilation_cache()  # compiled programs outlive this process
print(model, "on", jax.devices()[0].device_kind)

# %% [markdown]
# ## What is in the folder
#
# No weight is read for this: shapes, and how the model samples unless told otherwise.

# %%
spec = find_pipeline(model).spec
dit, sampling = asdict(spec.dit), asdict(spec.config)
for name in ("dim", "ffn_dim", "num_heads", "num_layers", "linear_branch"):
    print(f"{name:14} {dit[name]}")
for name in ("sampler", "steps", "guidance", "size", "frames", "attention", "topk", "block_q", "block_k", "quant"):
    print(f"{name:14} {sampling[name]}")

# %% [markdown]
# ## Will it fit?
#
# With the `aot` extra the pipeline's own programs are compiled for a named card that need not be there, and their
# memory is added up. Here the 1.3B model at 480p on an RTX 4090; `turbojax plan --help` lists presets and cards.

# %%
import subprocess
import sys

command = "plan --model wan2.1-t2v-1.3b --device rtx4090 --size 832x480 --quant w8a8"
done = subprocess.run([sys.executable, "-m", "turbojax", *command.split()], capture_output=True, text=True, check=False)
print(done.stdout or done.stderr.splitlines()[-1])

# %% [markdown]
# ## One prompt, part by part
#
# Each part of the speed-up alone and two together, from the same noise. Seconds in the transformer, without compiling:
# every setting runs twice and the second run counts. The shipped model is too small to gain, and on a CPU Sage's
# formats are emulated: these times say something only for large weights on a GPU.

# %%
prompt = os.environ.get("PROMPT", "a red circle moving right")
pipe = turbojax.Pipeline.load(model)
settings = {
    "dense": {"attention": "dense", "quant": "none"},
    "W8A8": {"attention": "dense", "quant": "w8a8"},
    "Sage": {"attention": "sage", "quant": "none"},
    "SageSLA and W8A8": {"attention": "sagesla", "quant": "w8a8"},
}
clips = {}
for name, options in settings.items():
    for _ in range(2):
        clips[name] = pipe.generate(prompt, seed=0, **options)

# %%
from experiments.strips import rows

rows({f"{name}: {clip.timings['dit']:.2f} s": clip.frames for name, clip in clips.items()})

# %% [markdown]
# ## The experiments, on your weights
#
# Every script takes the folder: `python -m experiments.sparsity_steps --model wan --clips 8 --batch-size 1`. Clips that
# no oracle reads are compared with those of the largest top-k from the same noise.
