"""The references' own modules, loaded on a CPU from their checkouts for the scripts that make fixtures.

They expect flash-attn, CUDA streams and a training framework; none of it takes part in what is computed here, so
stand-ins take their place.  Made with Python 3.11, torch 2.13 (CPU) and diffusers 0.42.1.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers  # noqa: F401  (before flash_attn is replaced: it looks for the real one)
import numpy as np
import torch

warnings.filterwarnings("ignore", message=".*[Aa]utocast.*")


def load_file(path: Path, name: str | None = None) -> ModuleType:
    """One file as a module, under `name` (its package's other files must be stand-ins already)."""
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Full attention over [B, L, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def wan_model(checkout: Path, **config) -> torch.nn.Module:
    """WanModel of Wan 2.1 or 2.2 (whichever checkout it is), flash attention replaced by torch's own."""
    package = f"stand_in_{checkout.name.replace('+', '_').replace('.', '_').replace('-', '_')}"
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = []
    sys.modules[f"{package}.attention"] = SimpleNamespace(flash_attention=sdpa)
    return load_file(checkout / "wan/modules/model.py", f"{package}.model").WanModel(**config).eval()


def wan_umt5(
    checkout: Path, vocab: int, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_layers: int
) -> torch.nn.Module:
    """T5Encoder of Wan 2.1 with umT5's own position bias in each layer."""
    torch.cuda.current_device = lambda: 0
    sys.modules["stand_in_t5"] = ModuleType("stand_in_t5")
    sys.modules["stand_in_t5"].__path__ = []
    sys.modules["stand_in_t5.tokenizers"] = SimpleNamespace(HuggingfaceTokenizer=None)
    make = load_file(checkout / "wan/modules/t5.py", "stand_in_t5.t5").T5Encoder
    return make(vocab, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets=32, shared_pos=False).eval()


def turbo_model(checkout: Path, *, network: str = "wan2pt1", **config) -> torch.nn.Module:
    """WanModel of TurboDiffusion (rcm/networks/wan2pt1.py, or wan2pt2.py for image to video)."""
    root = str(checkout / "turbodiffusion")
    if root not in sys.path:
        sys.path.insert(0, root)

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = cos[None, :, None], sin[None, :, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    nothing = lambda *args, **kwargs: None  # noqa: E731
    for name, content in {
        "flash_attn": {},
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"apply_rotary_emb": rotate},
        "imaginaire": {},
        "imaginaire.utils": {"log": SimpleNamespace(info=nothing, warning=nothing, debug=nothing)},
        "rcm.utils.context_parallel": dict.fromkeys(
            ("split_inputs_cp", "cat_outputs_cp", "cat_outputs_cp_with_grad", "broadcast"), nothing
        ),
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.Stream = nothing
    model = importlib.import_module(f"rcm.networks.{network}").WanModel(**config).eval()
    for module in model.modules():
        if hasattr(module, "local_attn"):
            module.local_attn = sdpa
    return model


class Recorder:
    """A network in TurboDiffusion's inference script: calls `net` and keeps the states that it was given."""

    def __init__(self, net, seen: list[np.ndarray] | None = None) -> None:
        self.net = net
        self.seen: list[np.ndarray] = [] if seen is None else seen

    def cuda(self) -> None: ...
    def cpu(self) -> None: ...

    def __call__(self, x_B_C_T_H_W: torch.Tensor, timesteps_B_T: torch.Tensor, **condition) -> torch.Tensor:
        self.seen.append(x_B_C_T_H_W.numpy())
        return self.net(x_B_C_T_H_W, timesteps_B_T, **condition)


I2V_SCRIPT = "wan2.2_i2v_infer.py"


def statements(script: Path, first: str, last: str):
    """The code of a script's main part, from the first assignment to `first` to the last one to `last`."""
    body = ast.parse(script.read_text()).body[-1].body
    targets = [getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else "" for node in body]
    end = len(targets) - targets[::-1].index(last)
    return compile(ast.Module(body[targets.index(first) : end], type_ignores=[]), script.name, "exec")


def turbo_rcm(
    checkout: Path, net, noise: torch.Tensor, condition: dict, *, steps: int, sigma_max: float, mode: str, low=None
) -> tuple[np.ndarray, np.ndarray]:
    """TurboDiffusion's rCM loop: (states [steps + 1, ...] from the scaled noise to the sample, noise of each step).

    The loop lies in the body of its scripts (only the I2V one knows "ode", and a low-noise expert `low`); it is run
    from there, statement by statement, with the networks in float32.
    """
    script = I2V_SCRIPT if mode == "ode" or low is not None else "wan2.1_t2v_infer.py"
    loop = statements(checkout / "turbodiffusion/inference" / script, "mid_t", "samples")
    generator = torch.Generator().manual_seed(7)
    step_noise = torch.stack([torch.randn(noise.shape, generator=generator) for _ in range(steps)]).numpy()
    recorder = Recorder(net)
    scope = {
        "args": SimpleNamespace(num_steps=steps, sigma_max=sigma_max, ode=mode == "ode", boundary=0.9),
        "init_noise": noise, "condition": condition, "generator": generator.manual_seed(7),
        "net": recorder, "high_noise_model": recorder, "low_noise_model": Recorder(low or net, recorder.seen),
        "tensor_kwargs": {"device": "cpu", "dtype": torch.float32},
        "torch": torch, "math": math, "tqdm": lambda it, **_: it, "log": SimpleNamespace(info=lambda _: None),
    }  # fmt: skip
    exec(loop, scope)
    return np.stack([*recorder.seen, scope["samples"].numpy()]), step_noise
