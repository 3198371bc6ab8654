"""Make rcm.npz: TurboDiffusion's own rCM losses, and their gradients, for a small network.

The methods of `T2VDistillModel_rCM` run as they are, on a CPU and in float32; what they import for clusters is
replaced by stand-ins, and what they draw (noise, times) is taken from the fixture. Needs torch and a checkout:
    python tests/golden/make_rcm.py TURBODIFFUSION_CHECKOUT
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import seeded
import torch

ROOT = Path(sys.argv[1]) / "turbodiffusion"
B, C, T, H, W, HIDDEN, TEXT = 2, 4, 2, 4, 4, 12, 3
SHAPES = {"inner": (HIDDEN, C), "mixed": (HIDDEN, C), "time": (HIDDEN, 1), "text": (HIDDEN, TEXT), "outer": (C, HIDDEN)}


class StandIn(ModuleType):
    """Answers every name that is imported from it, but is a real module to the import system."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Base(torch.nn.Module):
    pass


def load_model_class() -> type:
    sys.path.insert(0, str(ROOT))
    names = """attrs megatron megatron.core imaginaire imaginaire.config imaginaire.lazy_config imaginaire.model
        imaginaire.utils imaginaire.utils.easy_io imaginaire.utils.ema rcm.conditioner rcm.utils.checkpointer
        rcm.utils.optim_instantiate_dtensor rcm.utils.context_parallel rcm.utils.dtensor_helper rcm.utils.fsdp_helper
        rcm.utils.jvp_helper rcm.utils.misc rcm.utils.torch_future rcm.configs rcm.configs.defaults
        rcm.configs.defaults.ema rcm.samplers rcm.samplers.euler rcm.samplers.unipc"""
    for name in names.split():
        sys.modules[name] = StandIn(name)
    sys.modules["attrs"].define = lambda **_: lambda cls: cls
    sys.modules["imaginaire.model"].ImaginaireModel = Base
    sys.modules["imaginaire.utils"].misc = SimpleNamespace(timer=lambda _: lambda f: f)
    sys.modules["imaginaire.utils"].log = SimpleNamespace(debug=lambda _: None)
    from rcm.models.t2v_model_distill_rcm import T2VDistillModel_rCM

    return T2VDistillModel_rCM


class Net(torch.nn.Module):
    """A velocity that depends on every input: each position, their mean, the time and the text."""

    def __init__(self, name: str):
        super().__init__()
        drawn = seeded.weights({f"{name}.{k}": v for k, v in SHAPES.items()}, gain=1.2)
        for key, value in drawn.items():
            self.register_parameter(key.split(".")[1], torch.nn.Parameter(torch.from_numpy(value)))

    def velocity(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        shift = x.mean((1, 2, 3)) @ self.mixed.T + timestep / 1000 @ self.time.T + text @ self.text.T
        hidden = torch.tanh(x @ self.inner.T + shift[:, None, None, None])
        return (0.5 * x + hidden @ self.outer.T).permute(0, 4, 1, 2, 3)

    def forward(self, x_B_C_T_H_W, timesteps_B_T, text, withT=False):
        if not withT:
            return self.velocity(x_B_C_T_H_W, timesteps_B_T, text)
        (x, dx), (t, dt) = x_B_C_T_H_W, timesteps_B_T
        return torch.func.jvp(lambda x, t: self.velocity(x, t, text), (x, t), (dx, dt))


class Condition:
    def __init__(self, name: str):
        self.text = torch.from_numpy(seeded.uniform(name, (B, TEXT)))

    def to_dict(self) -> dict[str, torch.Tensor]:
        return {"text": self.text}


def latents(name: str) -> torch.Tensor:
    """[B, t, h, w, C], as this project holds them, in the reference's order."""
    return torch.from_numpy(seeded.uniform(name, (B, T, H, W, C))).permute(0, 4, 1, 2, 3)


def fixed(values: list[torch.Tensor]):
    """A random function that hands out what the fixture drew, in order."""
    queue = iter(values)
    return lambda *args, **kwargs: next(queue)


CLASS = load_model_class()
from rcm.utils.denoiser_scaling import RectifiedFlow_TrigFlowWrapper  # noqa: E402

TIMES = {
    "consistency": [0.35, 1.52], "distribution": [1.1, 1.48], "critic": [0.6, 1.3],
    "simulated": [[1.4, 1.2], [1.45, 0.9]],
}  # fmt: skip
ones = torch.ones
torch.ones = lambda *args, device=None, **kwargs: ones(*args, **kwargs)


def model(**config) -> torch.nn.Module:
    made = CLASS.__new__(CLASS)
    torch.nn.Module.__init__(made)
    made.config = SimpleNamespace(
        **{
            "teacher_guidance": 5.0, "fd_type": 0, "tangent_warmup": 10, "loss_scale": 100.0, "loss_scale_dmd": 1.0,
            "max_simulation_steps_fake": 4, "dmd_fix_timesteps": False, "student_update_freq": 5, "dcm_total_steps": 48,
            "dcm_skipping_interval_steps": 1, "dcm_timestep_shift": 5.0, **config,
        }
    )  # fmt: skip
    made.tensor_kwargs = {"device": "cpu", "dtype": torch.float32}
    made.scaling = RectifiedFlow_TrigFlowWrapper(1.0, 1000.0)
    made.net, made.net_teacher, made.net_fake_score = Net("student"), Net("teacher"), Net("critic")
    made.sync = lambda *args: args[0] if len(args) == 1 else args
    return made


def column(times: list[float]) -> torch.Tensor:
    return torch.tensor(times, dtype=torch.float64)[:, None]


CONTEXT = (latents("latents"), Condition("context"), Condition("empty"))
arrays: dict[str, np.ndarray] = {}


def keep(name: str, losses: torch.Tensor, net: torch.nn.Module) -> None:
    losses.mean().backward()
    arrays[name] = losses.detach().numpy()
    for key, parameter in net.named_parameters():
        arrays[f"{name}.{key}"] = parameter.grad.numpy()


def consistency(name: str, iteration: int) -> None:
    it = model()
    it.draw_training_time_G = fixed([column(TIMES["consistency"])])
    torch.randn = fixed([latents("noise")])
    out, losses = it._student_scm_step(CONTEXT, iteration)
    keep(name, losses, it.net)
    arrays[f"{name}.df_dt"] = out["df_dt"].permute(0, 2, 3, 4, 1).float().numpy()


consistency("consistency_warming", 3)
consistency("consistency", 10)

it = model()
it.draw_training_time_D = fixed([column(t) for t in (*TIMES["simulated"], TIMES["distribution"])])
torch.randn = fixed([latents("start"), latents("noise")])
torch.randn_like = fixed([latents("step_1"), latents("step_2")])
it.get_effective_iteration = lambda _: 2  # three simulated steps
keep("distribution", it._student_dmd_step(CONTEXT, 10)[1], it.net)

it = model()
it.draw_training_time_D = fixed([column(t) for t in (*TIMES["simulated"], TIMES["critic"])])
torch.randn = fixed([latents("start"), latents("noise")])
torch.randn_like = fixed([latents("step_1"), latents("step_2")])
it.get_effective_iteration_fake = lambda _: 2
keep("critic", it.training_step_critic(CONTEXT, 10)[1], it.net_fake_score)

it = model()
torch.randn, torch.rand = fixed([latents("noise")]), fixed([column([0.2, 0.7]).float()])
keep("discrete", it._student_dcm_step(CONTEXT, 10)[1], it.net)

it = model(ema=SimpleNamespace(iteration_shift=0))
it.ema_exp_coefficient = np.roots([1, 7, 16 - 0.1**-2, 12 - 0.1**-2]).real.max()
arrays["ema_beta"] = np.array([it.ema_beta(i) for i in (0, 1, 10, 100, 1000, 10000)])
steps = range(40)
arrays["is_student"] = np.array([bool(it.is_student_phase(i)) for i in steps])
arrays["effective"] = np.array(
    [it.get_effective_iteration(i) if it.is_student_phase(i) else it.get_effective_iteration_fake(i) for i in steps]
)
seeded.save("rcm", SHAPES, **arrays)
