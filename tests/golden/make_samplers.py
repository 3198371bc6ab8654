"""Make samplers.npz: trajectories of Wan's, diffusers' and TurboDiffusion's own samplers for a small velocity.

Needs torch, diffusers and two checkouts (made with torch 2.13, diffusers 0.42.1):
    python tests/golden/make_samplers.py WAN_CHECKOUT TURBODIFFUSION_CHECKOUT
TurboDiffusion's rCM loop lives in the body of its scripts; it is run from there, statement by statement.
"""

import ast
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import seeded
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

WAN, TURBO = (Path(p) for p in sys.argv[1:3])
WIDTH, HIDDEN = 8, 32
SHAPES = {"inner": (HIDDEN, WIDTH), "time": (HIDDEN, 1), "outer": (WIDTH, HIDDEN)}
WEIGHTS = {k: torch.from_numpy(v) for k, v in seeded.weights(SHAPES, gain=1.5).items()}
NOISE = torch.from_numpy(seeded.uniform("noise", (2, WIDTH)))


def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
    hidden = torch.tanh(x @ WEIGHTS["inner"].T + s * WEIGHTS["time"].T)
    return 0.5 * x + hidden @ WEIGHTS["outer"].T


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def trajectory(scheduler) -> np.ndarray:
    x, points = NOISE, []
    for t in scheduler.timesteps:
        v = velocity(x, float(t) / 1000)
        x = scheduler.step(v, t, x)
        x = x if isinstance(x, torch.Tensor) else x.prev_sample
        points.append(x.numpy())
    return np.stack(points)


def wan_unipc(steps: int, shift: float) -> np.ndarray:
    scheduler = module(WAN / "wan/utils/fm_solvers_unipc.py").FlowUniPCMultistepScheduler(
        num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
    )
    scheduler.set_timesteps(steps, device="cpu", shift=shift)
    return trajectory(scheduler)


def even(steps: int) -> np.ndarray:
    return np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]


def diffusers_unipc(steps: int, shift: float) -> np.ndarray:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=even(steps))
    return trajectory(scheduler)


def diffusers_euler(steps: int, shift: float) -> np.ndarray:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=even(steps).tolist())
    return trajectory(scheduler)


def turbo_unipc(steps: int, shift: float) -> np.ndarray:
    sampler = module(TURBO / "turbodiffusion/rcm/samplers/unipc.py").FlowUniPCMultistepSampler(sigma_max=0.97)
    sampler.set_timesteps(steps, device="cpu", shift=shift)
    return trajectory(sampler)


class Net:
    """Stands for a network in TurboDiffusion's script and keeps what it was asked."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def cuda(self) -> None: ...
    def cpu(self) -> None: ...

    def __call__(self, x_B_C_T_H_W: torch.Tensor, timesteps_B_T: torch.Tensor) -> torch.Tensor:
        self.seen.append(x_B_C_T_H_W.numpy())
        return velocity(x_B_C_T_H_W, float(timesteps_B_T[0, 0]) / 1000)


def turbo_rcm(script: str, steps: int, sigma_max: float, ode: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(states [steps + 1, ...] from the scaled noise to the sample, step noise [steps, ...])."""
    body = ast.parse((TURBO / f"turbodiffusion/inference/{script}").read_text()).body[-1].body
    names = [
        node.targets[0].id if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id") else "" for node in body
    ]
    loop = ast.Module(body[names.index("mid_t") : names.index("samples") + 1], type_ignores=[])
    net, generator = Net(), torch.Generator().manual_seed(7)
    step_noise = torch.stack([torch.randn(NOISE.shape, generator=generator) for _ in range(steps)]).numpy()
    scope = {
        "args": SimpleNamespace(num_steps=steps, sigma_max=sigma_max, ode=ode, boundary=0.9),
        "init_noise": NOISE, "net": net, "high_noise_model": net, "low_noise_model": net, "condition": {},
        "generator": generator.manual_seed(7), "tensor_kwargs": {"device": "cpu", "dtype": torch.float32},
        "torch": torch, "math": math, "tqdm": lambda it, **_: it, "log": SimpleNamespace(info=print),
    }  # fmt: skip
    exec(compile(loop, script, "exec"), scope)
    return np.stack([*net.seen, scope["samples"].numpy()]), step_noise


arrays = {"noise": NOISE.numpy()}
for steps, shift in ((50, 5.0), (50, 3.0), (40, 12.0), (1, 5.0), (2, 5.0), (3, 5.0)):
    arrays[f"wan_unipc_{steps}_{shift:g}"] = wan_unipc(steps, shift)
arrays["diffusers_unipc_50_5"] = diffusers_unipc(50, 5.0)
arrays["diffusers_euler_20_3"] = diffusers_euler(20, 3.0)
arrays["turbo_unipc_10_3"] = turbo_unipc(10, 3.0)
for steps in (1, 2, 3, 4):
    arrays[f"rcm_sde_{steps}"], arrays["step_noise"] = turbo_rcm("wan2.1_t2v_infer.py", steps, 80.0)
    arrays[f"rcm_ode_{steps}"], _ = turbo_rcm("wan2.2_i2v_infer.py", steps, 200.0, ode=True)
arrays["rcm_sde_experts"], _ = turbo_rcm("wan2.2_i2v_infer.py", 4, 200.0)
seeded.save("samplers", SHAPES, **arrays)
