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
# # Convert PyTorch weights, and check that nothing was lost
#
# A checkpoint of Wan's own code becomes a folder that this library loads. No torch is needed for that, and none for the
# check: `tests/golden` keeps what Wan's own code and diffusers computed, in torch, for weights that a seed gives back.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import turbojax
from convert import convert_checkpoint, inspect_checkpoint

repository = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "tests" / "golden").is_dir())
sys.path.insert(0, str(repository / "tests"))
from golden import seeded

shapes, golden = seeded.load("dit_t2v_128")
weights = seeded.weights(shapes)
for name in list(weights)[:6]:
    print(name, weights[name].shape)
print(f"... {len(weights)} tensors in all; stored beside them: {', '.join(golden)}")

# %% [markdown]
# Every parameter is random, none is left at zero or one: a weight that lands in the wrong place shows. Save them as a
# checkpoint with Wan's names, and ask what it is:

# %%
folder = Path(tempfile.mkdtemp())
save_file(weights, folder / "wan.safetensors")
print(str(inspect_checkpoint(folder / "wan.safetensors")).replace(f"{folder}/", ""))

# %% [markdown]
# Convert and load it. Kind and shape are inferred from the tensors; layers are stacked on the way.

# %%
convert_checkpoint(folder / "wan.safetensors", folder / "dit")
dit = turbojax.load(folder / "dit", dtype="float32")
print(dit.config)

# %% [markdown]
# ## Parity
#
# The same inputs through the converted model, against what torch computed with Wan's own code and with diffusers'. The
# two differ from each other as well, by the rounding of float32.


# %%
def channels_last(x):
    return np.moveaxis(x, -4, -1)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


latents = channels_last(seeded.uniform("t2v_128/latents", (2, 16, 3, 8, 12)))
context = seeded.uniform("t2v_128/context", (2, 24, 32))
velocity = dit(latents, golden["timesteps"], context)
for theirs in ("wan", "diffusers"):
    print(f"relative L2 against {theirs}: {relative(velocity, channels_last(golden[theirs])):.1e}")
print(f"and theirs against each other: {relative(golden['wan'], golden['diffusers']):.1e}")
assert relative(velocity, channels_last(golden["wan"])) < 1e-5

# %% [markdown]
# A check is worth what it catches. Swap two tensors, as a wrong line in a mapping would, and convert again: the names
# and shapes all fit, and the numbers say no.

# %%
swapped = dict(weights)
one, other = "blocks.0.self_attn.q.weight", "blocks.0.self_attn.k.weight"
swapped[one], swapped[other] = weights[other], weights[one]
save_file(swapped, folder / "swapped.safetensors")
convert_checkpoint(folder / "swapped.safetensors", folder / "swapped")
wrong = turbojax.load(folder / "swapped", dtype="float32")(latents, golden["timesteps"], context)
print(f"q and k of one block swapped: {relative(wrong, channels_last(golden['wan'])):.1e}")
assert relative(wrong, channels_last(golden["wan"])) > 1e-3

# %% [markdown]
# ## And back
#
# A component goes back into PyTorch's names without losing a bit.

# %%
from safetensors.numpy import load_file

from convert import export_checkpoint

export_checkpoint(folder / "dit", folder / "back.safetensors")
back = load_file(folder / "back.safetensors")
assert back.keys() == weights.keys()
assert all(np.array_equal(back[name], weights[name]) for name in weights)
print(f"{len(back)} tensors, bit for bit the same")

# %% [markdown]
# The command line does the same: `turbojax inspect FILE`, `turbojax convert FILE --out DIR`, `turbojax export DIR`. For
# a whole pipeline give its parts: `turbojax convert --dit A --vae B --text-encoder C --tokenizer D --out wan`.
