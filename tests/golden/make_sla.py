"""Make sla.npz, sla_grad.npz and dit_sla.npz: TurboDiffusion's SparseLinearAttention module by itself and inside its
network, the Triton kernels interpreted.

Needs torch, triton and TurboDiffusion's checkout (made with torch 2.13 CPU, triton 3.9):
    TRITON_INTERPRET=1 python tests/golden/make_sla.py TURBODIFFUSION_CHECKOUT

The module rounds to bfloat16 inside, which alone moves the output by some 4e-3 (printed).  So it is run both as it is
and with its `dtype` attribute set to float32, where nothing is rounded and the arithmetic can be compared closely.
Queries and keys carry a slow signal, so that the choice of blocks hangs on no rounding: the margin between the last
block chosen and the first one left out is checked here.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import seeded
import torch
from references import turbo_model

TURBO = Path(sys.argv[1])
sys.path.insert(0, str(TURBO / "turbodiffusion"))
warnings.filterwarnings("ignore", message=".*[Aa]utocast.*")

from SLA import SparseLinearAttention  # noqa: E402
from SLA.utils import get_block_map, mean_pool  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

HEADS, WIDTH = 2, 32
TOPK = 0.67  # of 6 blocks: 4; of 3: 2
NAMES = ("q", "k", "v", "proj_weight", "proj_bias")


def mend_bfloat16() -> None:
    """Give Triton's interpreter the bfloat16 of a GPU: as released (3.9), it keeps bfloat16 as its bits in uint16,
    multiplies those bits in `tl.dot`, and truncates where hardware rounds to nearest even."""
    convert, dot, tl = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter.tl

    def rounded(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


def inputs(length: int) -> dict[str, np.ndarray]:
    """q, k, v [1, L, heads, width] and the projection of the linear branch, (out, in)."""
    shape, slow = (1, length, HEADS, WIDTH), (1, -(-length // 64), HEADS, WIDTH)

    def signal(name: str) -> np.ndarray:
        offsets = seeded.uniform(f"sla/{name}/blocks", slow, scale=0.8)
        return seeded.uniform(f"sla/{name}", shape) + np.repeat(offsets, 64, axis=1)[:, :length]

    return {
        "q": signal("q"),
        "k": signal("k"),
        "v": seeded.uniform("sla/v", shape),
        "proj_weight": seeded.uniform("sla/proj_weight", (WIDTH, WIDTH), scale=WIDTH**-0.5),
        "proj_bias": seeded.uniform("sla/proj_bias", (WIDTH,), scale=0.2),
    }


def run(
    arrays: dict[str, np.ndarray], *, block_q: int, topk: float, dtype: torch.dtype, feature_map: str = "softmax"
) -> tuple[torch.Tensor, dict[str, torch.Tensor], np.ndarray]:
    """(output, leaves that carry gradients, chosen blocks in rising order)."""
    leaves = {name: torch.from_numpy(array).to(dtype).requires_grad_() for name, array in arrays.items()}
    module = SparseLinearAttention(WIDTH, topk, feature_map, BLKQ=block_q, BLKK=64)
    module.dtype = dtype
    # What autocast does on CUDA: the projection runs in the module's dtype.
    del module.proj_l.weight, module.proj_l.bias
    module.proj_l.weight, module.proj_l.bias = leaves["proj_weight"], leaves["proj_bias"]
    out = module(*(leaves[name] for name in "qkv"))
    chosen = blocks(leaves["q"].detach(), leaves["k"].detach(), block_q, topk, margin=0.02)
    return out, leaves, chosen.numpy().astype(np.int32)


def blocks(q: torch.Tensor, k: torch.Tensor, block_q: int, topk: float, margin: float) -> torch.Tensor:
    """The module's choice for [B, L, heads, d], in rising order; fails if it hangs on less than `margin`."""
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    _, chosen, count = get_block_map(q, k, topk, block_q, 64)
    scores = mean_pool(q.float(), block_q) @ mean_pool((k - k.mean(-2, keepdim=True)).float(), 64).transpose(-1, -2)
    ranked = scores.sort(dim=-1, descending=True).values
    gap = (ranked[..., count - 1] - ranked[..., count]).min() / ranked.std()
    assert gap > margin, f"blocks {gap:.4f} of a standard deviation apart: choose other data"
    return chosen.sort(dim=-1).values


def save_dit() -> None:
    """Its network with SLA in every self-attention, as for training, head_dim 128, 288 tokens."""
    config = {
        "model_type": "t2v", "text_len": 24, "in_dim": 16, "dim": 256, "ffn_dim": 160, "freq_dim": 256,
        "text_dim": 32, "out_dim": 16, "num_heads": 2, "num_layers": 2,
    }  # fmt: skip

    def check(q: torch.Tensor, k: torch.Tensor) -> None:
        blocks(q, k, 64, 0.5, margin=1e-3)

    net = turbo_model(TURBO, **config)
    for block in net.blocks:
        module = SparseLinearAttention(128, topk=0.5, BLKQ=64, BLKK=64)
        module.dtype = torch.float32
        block.self_attn.attn_op.local_attn = module
        module.register_forward_pre_hook(lambda _, qkv: check(*qkv[:2]))
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    net.load_state_dict({k: torch.from_numpy(v) for k, v in seeded.weights(shapes).items()}, strict=True)
    latents = torch.from_numpy(seeded.uniform("dit_sla/latents", (1, 16, 3, 16, 24)))
    context = torch.from_numpy(seeded.uniform("dit_sla/context", (1, 24, 32)))
    with torch.no_grad():
        out = net(latents, torch.tensor([[640.5]]), context)
    seeded.save("dit_sla", shapes, output=out.numpy())


def main() -> None:
    mend_bfloat16()
    arrays, results = inputs(length=328), {}
    for name, block_q, dtype in (
        ("float32_64", 64, torch.float32),
        ("float32_128", 128, torch.float32),
        ("bfloat16_128", 128, torch.bfloat16),
    ):
        out, _, results[f"{name}_blocks"] = run(arrays, block_q=block_q, topk=TOPK, dtype=dtype)
        results[name] = out.detach().float().numpy()
    exact, rounded = results["float32_128"], results["bfloat16_128"]
    print("bfloat16 against float32:", np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
    seeded.save("sla", {}, **results)

    arrays, results = inputs(length=152), {}
    cotangent = torch.from_numpy(seeded.uniform("sla/cotangent", (1, 152, HEADS, WIDTH)))
    for feature_map in ("softmax", "elu", "relu"):
        options = {"block_q": 64, "topk": TOPK, "dtype": torch.float32, "feature_map": feature_map}
        out, leaves, _ = run(arrays, **options)
        results[feature_map] = out.detach().numpy()
        if feature_map == "softmax":
            (out * cotangent).sum().backward()
            results |= {f"grad_{name}": leaves[name].grad.numpy() for name in NAMES}
    seeded.save("sla_grad", {}, **results)
    save_dit()


main()
