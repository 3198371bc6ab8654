"""Make i2v.npz: image to video with two experts, by TurboDiffusion's own modules and script (preprocessing,
conditioning, the 4-step loop) and by Wan 2.2's (mask, guided UniPC loop), on the same seeded weights in float32.

Needs torch, torchvision, diffusers and the checkouts (see references.py):
    python tests/golden/make_i2v.py WAN22_CHECKOUT TURBODIFFUSION_CHECKOUT
"""

import ast
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import seeded
import torch

torch.library.register_fake = lambda *args, **kwargs: lambda f: f  # torchvision's wheel may not fit torch's build
import torchvision.transforms.v2 as T  # noqa: E402
from PIL import Image  # noqa: E402
from references import I2V_SCRIPT, load_file, statements, turbo_model, turbo_rcm, wan_model  # noqa: E402

WAN22, TURBO = (Path(p) for p in sys.argv[1:3])
SCRIPT = TURBO / "turbodiffusion/inference" / I2V_SCRIPT
WIDTH, HEIGHT, FRAMES, TEXT, TEXT_DIM = 48, 32, 5, 24, 32
DIT = {
    "model_type": "i2v", "text_len": TEXT, "in_dim": 36, "dim": 256, "ffn_dim": 160, "freq_dim": 256,
    "text_dim": TEXT_DIM, "out_dim": 16, "num_heads": 2, "num_layers": 2,
}  # fmt: skip
VAE = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
STEPS, SHIFT, GUIDANCE, BOUNDARY = 6, 5.0, (3.5, 2.0), 0.9
# What people take pictures of, in (width, height), and two that end half-way between multiples of 16.
PICTURES = ((1920, 1080), (1080, 1920), (1000, 1000), (4032, 3024), (640, 200), (77, 131), (1, 1), (1000, 1500))
quiet = SimpleNamespace(info=lambda _: None)


def turbo_vae() -> torch.nn.Module:
    """WanVAE_ of TurboDiffusion, its imports for clusters replaced."""
    for name, content in {
        "imaginaire.utils.distributed": {"get_rank": None, "sync_model_states": None},
        "imaginaire.utils.easy_io": {"easy_io": None},
        "rcm.tokenizers.interface": {"VideoTokenizerInterface": object},
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    module = load_file(TURBO / "turbodiffusion/rcm/tokenizers/wan2pt1.py", "turbo_vae")
    vae = module.WanVAE_(num_res_blocks=2, attn_scales=[], dropout=0.0, temporal_window=4, **VAE).eval()
    weights = seeded.weights({k: tuple(v.shape) for k, v in vae.state_dict().items()})
    vae.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
    # Not reached by an import: the statistics are in the body of a constructor that wants a GPU.
    constructor = ast.parse(Path(module.__file__).read_text())
    lists = [n.value for n in ast.walk(constructor) if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)]
    mean, std = (torch.tensor(ast.literal_eval(x)) for x in lists if len(x.elts) == 16)
    vae.scale = [mean, 1.0 / std]
    return vae


def experts(make) -> tuple[dict, list[torch.nn.Module]]:
    """Two networks with weights of their own."""
    nets = []
    for name in ("high", "low"):
        net = make()
        shapes = {k: (v.shape[0], 36, 1, 2, 2) if k == "patch_embedding.weight" else tuple(v.shape)
                  for k, v in net.state_dict().items()}  # fmt: skip
        drawn = seeded.weights({f"{name}/{k}": v for k, v in shapes.items()})
        state = {k: torch.from_numpy(drawn[f"{name}/{k}"]).reshape(v.shape) for k, v in net.state_dict().items()}
        net.load_state_dict(state, strict=True)
        nets.append(net)
    return shapes, nets


def condition(picture: np.ndarray, vae: torch.nn.Module) -> torch.Tensor:
    """y, by TurboDiffusion's script, from the picture to the repetition over samples."""
    tokenizer = SimpleNamespace(encode=lambda video: vae.encode(video, vae.scale))
    scope = {
        "T": T, "torch": torch, "tokenizer": tokenizer, "input_image": Image.fromarray(picture),
        "tensor_kwargs": {"device": "cpu", "dtype": torch.float32}, "args": SimpleNamespace(num_samples=1),
        "F": FRAMES, "w": WIDTH, "h": HEIGHT, "lat_h": HEIGHT // 8, "lat_w": WIDTH // 8, "lat_t": 1 + FRAMES // 4,
    }  # fmt: skip
    exec(statements(SCRIPT, "image_transforms", "y"), scope)
    return scope["y"]


def resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    scope = {"T": T, "torch": torch, "h": height, "w": width}
    exec(statements(SCRIPT, "image_transforms", "image_transforms"), scope)
    image = scope["image_transforms"](Image.fromarray(picture))
    return ((image + 1) * 127.5).round().numpy().astype(np.uint8).transpose(1, 2, 0)


def adaptive(size: tuple[int, int], area: tuple[int, int]) -> tuple[int, int]:
    """--adaptive_resolution for a picture of that size, in the area of a table entry."""
    main = ast.parse(SCRIPT.read_text()).body[-1].body
    (branch,) = [n for n in main if isinstance(n, ast.If) and ast.unparse(n.test) == "args.adaptive_resolution"]
    scope = {
        "args": SimpleNamespace(adaptive_resolution=True, resolution="r", aspect_ratio="a"), "log": quiet, "np": np,
        "VIDEO_RES_SIZE_INFO": {"r": {"a": area}}, "input_image": SimpleNamespace(size=size),
        "tokenizer": SimpleNamespace(spatial_compression_factor=8),
    }  # fmt: skip
    exec(compile(ast.Module([branch], type_ignores=[]), SCRIPT.name, "exec"), scope)
    return scope["w"], scope["h"]


def wan_loop(nets: list, noise: torch.Tensor, y: torch.Tensor, context: list, null: list) -> tuple[list, np.ndarray]:
    """The guided loop of Wan 2.2's `WanI2V.generate`, and the guided velocity of each step; y's mask is checked."""
    source = ast.parse((WAN22 / "wan/image2video.py").read_text())
    methods = {n.name: n for n in ast.walk(source) if isinstance(n, ast.FunctionDef)}
    body = methods["generate"].body
    named = [getattr(getattr(n, "targets", [None])[0], "id", "") for n in body]
    (block,) = [n for n in body if isinstance(n, ast.With)]
    mask = body[named.index("msk") : len(named) - named[::-1].index("msk")]
    scheduler = load_file(WAN22 / "wan/utils/fm_solvers_unipc.py").FlowUniPCMultistepScheduler
    velocities = []

    class Recorded(scheduler):
        def step(self, velocity, *args, **kwargs):
            velocities.append(velocity[0].numpy())
            return super().step(velocity, *args, **kwargs)

    self = SimpleNamespace(
        boundary=BOUNDARY, num_train_timesteps=1000, device="cpu", init_on_cpu=False, rank=1,
        high_noise_model=nets[0], low_noise_model=nets[1],
    )  # fmt: skip
    scope = {
        "self": self, "torch": torch, "F": FRAMES, "lat_h": HEIGHT // 8, "lat_w": WIDTH // 8, "tqdm": lambda it: it,
        "FlowUniPCMultistepScheduler": Recorded, "sample_solver": "unipc", "sampling_steps": STEPS, "shift": SHIFT,
        "guide_scale": GUIDANCE, "noise": noise, "y": y, "context": context, "context_null": null, "seed_g": None,
        "max_seq_len": 2 * (HEIGHT // 16) * (WIDTH // 16), "offload_model": False,
    }  # fmt: skip

    def run(*nodes: ast.stmt) -> None:
        exec(compile(ast.Module(list(nodes), type_ignores=[]), "image2video.py", "exec"), scope)

    run(*mask, methods["_prepare_model_for_timestep"])
    self._prepare_model_for_timestep = partial(scope["_prepare_model_for_timestep"], self)
    run(*block.body)
    assert torch.equal(scope["msk"], y[:4])
    return velocities, scope["latent"].numpy()


@torch.no_grad()
def main() -> None:
    picture = (seeded.uniform("i2v/picture", (HEIGHT, WIDTH, 3)) * 60 + 128).clip(0, 255).astype(np.uint8)
    large = (seeded.uniform("i2v/large", (45, 61, 3)) * 60 + 128).clip(0, 255).astype(np.uint8)
    shapes, turbo = experts(lambda: turbo_model(TURBO, network="wan2pt2", **DIT))
    vae = turbo_vae()
    _, wan = experts(lambda: wan_model(WAN22, **DIT))
    y = condition(picture, vae)
    noise = torch.from_numpy(seeded.uniform("i2v/noise", (1, 16, *y.shape[2:])))
    context, null = (torch.from_numpy(seeded.uniform(f"i2v/{n}", (1, TEXT, TEXT_DIM))) for n in ("context", "null"))
    arrays = {"picture": picture, "large": large, "y": y.numpy()}
    for width, height in ((48, 32), (80, 64), (96, 16)):
        arrays[f"resized_{width}_{height}"] = resized(large, width, height)
    areas = ((832, 480), (1280, 720))
    arrays["adaptive"] = np.array([[(*size, *area, *adaptive(size, area)) for size in PICTURES] for area in areas])
    given = {"crossattn_emb": context, "y_B_C_T_H_W": y}
    rcm = {"steps": 4, "sigma_max": 200.0, "low": turbo[1]}
    arrays["sde"], arrays["step_noise"] = turbo_rcm(TURBO, turbo[0], noise, given, mode="sde", **rcm)
    arrays["ode"], _ = turbo_rcm(TURBO, turbo[0], noise, given, mode="ode", **rcm)
    velocities, arrays["unipc"] = wan_loop(wan, noise[0], y[0], [context[0]], [null[0]])
    arrays["velocities"] = np.stack(velocities)
    for name, value in arrays.items():
        print(name, value.shape, float(np.std(value)))
    vae_shapes = {f"vae/{k}": tuple(v.shape) for k, v in vae.state_dict().items()}
    seeded.save("i2v", {**shapes, **vae_shapes}, **arrays)


main()
