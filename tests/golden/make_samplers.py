"""Make samplers.npz: trajectories of Wan's, diffusers' and TurboDiffusion's own samplers for a small velocity.

Needs torch, diffusers and two checkouts (made with torch 2.13, diffusers 0.42.1):
    python tests/golden/make_samplers.py WAN_CHECKOUT TURBODIFFUSION_CHECKOUT
"""

import sys
from pathlib import Path

import numpy as np
import seeded
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from references import load_file, turbo_rcm

WAN, TURBO = (Path(p) for p in sys.argv[1:3])
WIDTH, HIDDEN = 8, 32
SHAPES = {"inner": (HIDDEN, WIDTH), "time": (HIDDEN, 1), "outer": (WIDTH, HIDDEN)}
WEIGHTS = {k: torch.from_numpy(v) for k, v in seeded.weights(SHAPES, gain=1.5).items()}
NOISE = torch.from_numpy(seeded.uniform("noise", (2, WIDTH)))


def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
    hidden = torch.tanh(x @ WEIGHTS["inner"].T + s * WEIGHTS["time"].T)
    return 0.5 * x + hidden @ WEIGHTS["outer"].T


def trajectory(scheduler) -> np.ndarray:
    x, points = NOISE, []
    for t in scheduler.timesteps:
        v = velocity(x, float(t) / 1000)
        x = scheduler.step(v, t, x)
        x = x if isinstance(x, torch.Tensor) else x.prev_sample
        points.append(x.numpy())
    return np.stack(points)


def wan_unipc(steps: int, shift: float) -> np.ndarray:
    scheduler = load_file(WAN / "wan/utils/fm_solvers_unipc.py").FlowUniPCMultistepScheduler(
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
    sampler = load_file(TURBO / "turbodiffusion/rcm/samplers/unipc.py").FlowUniPCMultistepSampler(sigma_max=0.97)
    sampler.set_timesteps(steps, device="cpu", shift=shift)
    return trajectory(sampler)


def net(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return velocity(x, float(timesteps[0, 0]) / 1000)


def rcm(steps: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    sigma_max = {"sde": 80.0, "ode": 200.0}[mode]  # the defaults of the two scripts
    return turbo_rcm(TURBO, net, NOISE, {}, steps=steps, sigma_max=sigma_max, mode=mode)


arrays = {"noise": NOISE.numpy()}
for steps, shift in ((50, 5.0), (50, 3.0), (40, 12.0), (1, 5.0), (2, 5.0), (3, 5.0)):
    arrays[f"wan_unipc_{steps}_{shift:g}"] = wan_unipc(steps, shift)
arrays["diffusers_unipc_50_5"] = diffusers_unipc(50, 5.0)
arrays["diffusers_euler_20_3"] = diffusers_euler(20, 3.0)
arrays["turbo_unipc_10_3"] = turbo_unipc(10, 3.0)
for steps in (1, 2, 3, 4):
    arrays[f"rcm_sde_{steps}"], arrays["step_noise"] = rcm(steps, "sde")
    arrays[f"rcm_ode_{steps}"], _ = rcm(steps, "ode")
seeded.save("samplers", SHAPES, **arrays)
