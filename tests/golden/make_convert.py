"""Make golden/convert/*.tar.xz and golden/convert/outputs.npz: checkpoints as the references themselves save them.

Needs torch, diffusers, transformers, sentencepiece, triton and the checkouts (see references.py):
    TRITON_INTERPRET=1 python tests/golden/make_convert.py WAN21_CHECKOUT WAN22_CHECKOUT TURBODIFFUSION_CHECKOUT

Weights are signs and powers of two, so that the files compress and bfloat16 holds them exactly: one output, in
float32, then serves a model in every format and precision.
"""

import copy
import importlib
import io
import json
import os
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import seeded
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from references import load_file, turbo_model, wan_model, wan_umt5
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

WAN21, WAN22, TURBO = (Path(p) for p in sys.argv[1:4])
FOLDER = seeded.GOLDEN / "convert"
TEXT, TEXT_DIM, TIMESTEP = 24, 32, 640.5
OUTPUTS: dict[str, np.ndarray] = {}


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and buffer random: +-2^-k for matrices, k differing by 32 x 32 tile; four levels for the rest."""
    module.load_state_dict(levels({k: tuple(v.shape) for k, v in module.state_dict().items()}), strict=True)
    return module.eval()


def levels(shapes: dict[str, tuple[int, ...]], gain: float = 1.0) -> dict[str, torch.Tensor]:
    drawn = {}
    for name, shape in shapes.items():
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if sum(n > 1 for n in shape) > 1 and "modulation" not in name and "scale_shift" not in name:
            flat = np.prod(shape[1:], dtype=int)
            size = 2.0 ** np.round(np.log2(gain * flat**-0.5))
            tiles = 2.0 ** rng.randint(-1, 1, (-(-shape[0] // 32), -(-flat // 32)))
            tiles = np.repeat(np.repeat(tiles, 32, 0), 32, 1)[: shape[0], :flat]
            value = (size * tiles * (2 * rng.randint(0, 2, (shape[0], flat)) - 1)).reshape(shape)
        else:
            value = 0.125 * (rng.randint(0, 4, shape) - 1.5) + (
                ("norm" in name and "weight" in name) or "gamma" in name
            )
        drawn[name] = torch.from_numpy(np.asarray(value, np.float32).copy())
    return drawn


def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(seeded.uniform(name, shape))


def pack(name: str, files: dict[str, bytes]) -> None:
    path = FOLDER / f"{name}.tar.xz"
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for file, data in sorted(files.items()):
            info = tarfile.TarInfo(file)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB of {sum(map(len, files.values())) / 1000:.0f}")


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def folder_bytes(save) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def wan_config(model_type: str, in_dim: int, dim: int, heads: int, ffn: int = 96) -> dict:
    return {
        "model_type": model_type, "text_len": TEXT, "in_dim": in_dim, "dim": dim, "ffn_dim": ffn, "freq_dim": 32,
        "text_dim": TEXT_DIM, "out_dim": 16, "num_heads": heads, "num_layers": 2,
    }  # fmt: skip


@torch.no_grad()
def run_wan(model: torch.nn.Module, channels: int) -> np.ndarray:
    x, context = noise("convert/latents", (1, channels, 3, 8, 12))[0], noise("convert/context", (1, TEXT, TEXT_DIM))[0]
    given = {"y": [x[16:]]} if channels > 16 else {}
    t = torch.full((1, 72) if given else (1,), TIMESTEP)  # Wan 2.2 takes a timestep for each token
    out = model([x[:16]], t=t, context=[context], seq_len=72, **given)
    return torch.stack(out).float().numpy()


@torch.no_grad()
def run_diffusers(model: torch.nn.Module) -> np.ndarray:
    x, context = noise("convert/latents", (1, 16, 3, 8, 12)), noise("convert/context", (1, TEXT, TEXT_DIM))
    return model(x, torch.tensor([TIMESTEP]), context).sample.numpy()


@torch.no_grad()
def run_turbo(model: torch.nn.Module, size: tuple[int, ...] = (3, 8, 12)) -> np.ndarray:
    x, context = noise("convert/latents", (1, 16, *size)), noise("convert/context", (1, TEXT, TEXT_DIM))
    return model(x, torch.tensor([[TIMESTEP]]), context).numpy()


def original() -> None:
    """Wan 2.1's folder of shards, and a .pth of Wan 2.2's image-to-video model."""
    model = fill(wan_model(WAN21, **wan_config("t2v", 16, 96, 2)))
    OUTPUTS["wan_t2v"] = run_wan(model, 16)
    pack("wan_t2v", folder_bytes(lambda folder: model.save_pretrained(folder, max_shard_size="600KB")))
    model = fill(wan_model(WAN22, **wan_config("i2v", 36, 128, 1)))
    OUTPUTS["wan_i2v"] = run_wan(model, 36)
    pack("wan_i2v", {"wan22_i2v.pth": torch_bytes(model.state_dict())})


def diffusers_dit() -> torch.nn.Module:
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 48, "in_channels": 16,
        "out_channels": 16, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 64,
    }  # fmt: skip
    return fill(WanTransformer3DModel(**config))


def diffusers_files() -> None:
    model = diffusers_dit()
    OUTPUTS["diffusers_t2v"] = run_diffusers(model)
    pack("diffusers_t2v", folder_bytes(model.save_pretrained))


def turbo() -> None:
    """TurboDiffusion: its training checkpoint, what dcp_to_pth makes of it, and both of modify_model's files."""
    sys.modules["turbo_diffusion_ops"] = ModuleType("turbo_diffusion_ops")
    vars(sys.modules["turbo_diffusion_ops"]).update(quant_cuda=quantize, gemm_cuda=gemm)
    sys.modules["rcm.utils.model_utils"] = SimpleNamespace(load_state_dict=None)
    net = turbo_model(TURBO, **wan_config("t2v", 16, 128, 2, ffn=128))
    modify = importlib.import_module("inference.modify_model")
    full = [block.self_attn.attn_op.local_attn for block in net.blocks]
    modify.replace_attention(net, attention_type="sla", sla_topk=0.5)
    sla = [block.self_attn.attn_op.local_attn for block in net.blocks]
    fill(net)
    for module in sla:
        module.dtype = torch.float32
    OUTPUTS["turbo_sla"] = run_turbo(net, size=(3, 16, 24))
    set_attention(net, full)
    OUTPUTS["turbo"] = run_turbo(net)
    set_attention(net, sla)
    state = {k: v.bfloat16() for k, v in net.state_dict().items()}
    pack("turbo_merged", {"merged.pth": torch_bytes({"state_dict": {f"net.{k}": v for k, v in state.items()}})})

    net = net.bfloat16()
    plain = copy.deepcopy(net)
    modify.replace_linear_norm(net, replace_linear=False, replace_norm=True)
    pack("turbo_released", {"TurboWan.pth": torch_bytes(net.state_dict())})

    modify.replace_linear_norm(net, replace_linear=True, replace_norm=False)
    pack("turbo_quant", {"TurboWan-quant.pth": torch_bytes(net.state_dict())})
    # Their Triton norms write past the last row unless there are 32n of them; the plain ones compute the same.
    modify.replace_linear_norm(plain, replace_linear=True, replace_norm=False)
    set_attention(plain, full)
    OUTPUTS["turbo_quant"] = run_turbo(plain.float())
    training(wan_config("t2v", 16, 128, 1, ffn=32))


def set_attention(net: torch.nn.Module, attentions: list) -> None:
    for block, attention in zip(net.blocks, attentions, strict=True):
        del block.self_attn.attn_op.local_attn
        block.self_attn.attn_op.local_attn = attention


def training(net_config: dict) -> None:
    """A checkpoint of training: three networks and an optimizer, names as torch's own wrappers make them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net, averaged = (fill(turbo_model(TURBO, **net_config)) for _ in range(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    OUTPUTS["turbo_training"] = run_turbo(averaged)
    tensors = {}
    for name, module in {"net": net, "net_ema": torch.compile(averaged), "net_fake_score": net}.items():
        for i, block in enumerate(module.blocks):
            if name != "net_fake_score":
                module.blocks[i] = checkpoint_wrapper(block)
        tensors |= {f"{name}.{k}": v.detach() for k, v in module.named_parameters()}
    assert any("_orig_mod." in k and "_checkpoint_wrapped_module." in k for k in tensors)
    optimizer = torch.optim.AdamW(list(net.head.parameters()), lr=1e-3)
    sum(p.sum() for p in net.head.parameters()).backward()
    optimizer.step()
    state = {"model": tensors, "optimizer": optimizer.state_dict(), "iteration": 7}
    pack("turbo_training", {"iter_7.ckpt": torch_bytes(state)})


# TurboDiffusion's CUDA extension, its products and sums in float64 (ops/quant/quant.hpp, ops/gemm): 128 x 128 tiles.


def quantize(x: torch.Tensor, values: None, scales: None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (-(-n // 128) for n in x.shape)
    padded = torch.zeros(rows * 128, columns * 128, dtype=torch.float64)
    padded[: x.shape[0], : x.shape[1]] = x.double()
    tiles = padded.reshape(rows, 128, columns, 128)
    largest = tiles.abs().amax((1, 3)).clamp_min(1e-8)
    values = (tiles * (128 / largest)[:, None, :, None]).round().clamp(-128, 127)
    values = values.reshape(rows * 128, columns * 128)[: x.shape[0], : x.shape[1]]
    return values.to(torch.int8), (largest / 128).float()


def gemm(x_q: torch.Tensor, x_s: torch.Tensor, w_q: torch.Tensor, w_s: torch.Tensor, y: torch.Tensor) -> None:
    def wide(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        full = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return values.double() * full[: values.shape[0], : values.shape[1]]

    y.copy_(wide(x_q, x_s) @ wide(w_q, w_s).T)


@torch.no_grad()
def vaes() -> None:
    """Wan's VAE as a .pth, and diffusers' as a folder; the latents of both normalised."""
    make = load_file(WAN21 / "wan/modules/vae.py").WanVAE_
    model = fill(make(dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]))
    source = load_file(WAN21 / "wan/modules/vae.py").WanVAE.__init__.__code__.co_consts
    mean, std = ([x for x in source if isinstance(x, tuple) and len(x) == 16][i] for i in range(2))
    scale = [torch.tensor(mean), 1 / torch.tensor(std)]
    video, latents = noise("convert/video", (1, 3, 5, 16, 24)).clamp(-1, 1), noise("convert/z", (1, 16, 2, 2, 3))
    OUTPUTS["wan_vae_z"] = model.encode(video, scale).numpy()
    OUTPUTS["wan_vae_video"] = model.decode(latents, scale).numpy()
    pack("wan_vae", {"Wan2.1_VAE.pth": torch_bytes(model.state_dict())})

    statistics = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 1.0, 0.5, 4.0]}
    model = fill(AutoencoderKLWan(base_dim=4, z_dim=4, **statistics))
    mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in statistics.values())
    OUTPUTS["diffusers_vae_z"] = ((model.encode(video).latent_dist.mode() - mean) / std).numpy()
    OUTPUTS["diffusers_vae_video"] = model.decode(latents[:, :4] * std + mean).sample.numpy()
    pack("diffusers_vae", folder_bytes(model.save_pretrained))


@torch.no_grad()
def text_encoders() -> None:
    """umT5 as Wan's bf16 .pth and as transformers' folder."""
    encoder = fill(wan_umt5(WAN21, 100, 48, 48, 96, 4, 2))
    ids = torch.from_numpy(np.random.RandomState(0).randint(2, 100, (2, 10)))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    OUTPUTS["ids"], OUTPUTS["mask"] = ids.numpy().astype(np.int32), mask.numpy().astype(np.int32)
    OUTPUTS["wan_umt5"] = (encoder(ids, mask) * mask[..., None]).numpy()
    bf16 = {k: v.bfloat16() for k, v in encoder.state_dict().items()}
    pack("wan_umt5", {"models_t5_umt5-enc-bf16.pth": torch_bytes(bf16)})

    config = UMT5Config(
        vocab_size=100, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    drawn = levels({k: tuple(v.shape) for k, v in model.state_dict().items()})
    drawn["encoder.embed_tokens.weight"] = drawn["shared.weight"]
    model.load_state_dict(drawn)
    OUTPUTS["diffusers_umt5"] = (model(ids, mask).last_hidden_state * mask[..., None]).numpy()
    files = folder_bytes(model.save_pretrained)
    # Both of the tied tensors, as older versions of the library wrote them.
    files["pytorch_model.bin"] = torch_bytes(model.state_dict())
    pack("diffusers_umt5", {"st/config.json": files["config.json"], "st/model.safetensors": files["model.safetensors"],
                            "bin/pytorch_model.bin": files["pytorch_model.bin"]})  # fmt: skip


@torch.no_grad()
def loras() -> None:
    """Updates of the diffusers model in three styles; diffusers' own converters say what the foreign two mean."""
    rank, wan, theirs = 4, {}, {}
    names = {f"blocks.{i}.{w}": f"blocks.{i}.{d}" for i in range(2) for w, d in {
        **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"}, "self_attn.o": "attn1.to_out.0",
        **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"}, "cross_attn.o": "attn2.to_out.0",
        "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    }.items()}  # fmt: skip
    weights = dict(diffusers_dit().named_parameters())
    for name, other in names.items():
        out, into = weights[f"{other}.weight"].shape
        wan[name] = theirs[other] = levels({f"{name}.down": (rank, into), f"{name}.up": (out, rank)}, gain=0.5)
    files, updates = {}, {}

    kohya, plain = {}, {}
    for name, pair in wan.items():
        down, up = pair.values()
        flat = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(2.0)}
        plain |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        plain[f"diffusion_model.{name}.alpha"] = torch.tensor(8.0)
        plain[f"diffusion_model.{name}.diff_b"] = levels({f"{name}.diff_b": (up.shape[0],)})[f"{name}.diff_b"]
    for name, state, convert in (
        ("kohya", kohya, _convert_musubi_wan_lora_to_diffusers),
        ("original", plain, _convert_non_diffusers_wan_lora_to_diffusers),
    ):
        save_file(state, FOLDER / "lora.tmp")
        files[f"{name}.safetensors"] = (FOLDER / "lora.tmp").read_bytes()
        updates[name] = {k.removeprefix("transformer."): v for k, v in convert(dict(state)).items()}

    peft = {}
    for name, pair in theirs.items():
        down, up = pair.values()
        peft |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    metadata = {"r": rank, "lora_alpha": 8, "alpha_pattern": {"blocks.1.attn1.to_q": 2}}
    saved = folder_bytes(
        lambda folder: WanPipeline.save_lora_weights(
            folder, transformer_lora_layers=peft, transformer_lora_adapter_metadata=metadata
        )
    )
    (files["diffusers.safetensors"],) = saved.values()
    updates["diffusers"] = {
        k: v * ((2 if k.startswith("blocks.1.attn1.to_q.") else 8) / rank if ".lora_B." in k else 1)
        for k, v in peft.items()
    }
    os.remove(FOLDER / "lora.tmp")

    # Whole differences, which diffusers' converter leaves out: the plain meaning of their names.
    whole = levels({"blocks.0.norm3.diff": (96,), "blocks.1.self_attn.norm_q.diff": (96,), "head.head.diff": (64, 96),
                    "head.head.diff_b": (64,), "patch_embedding.diff": (96, 16, 1, 2, 2)}, gain=0.5)  # fmt: skip
    save_file({f"diffusion_model.{k}": v for k, v in whole.items()}, FOLDER / "lora.tmp")
    files["whole.safetensors"] = (FOLDER / "lora.tmp").read_bytes()
    os.remove(FOLDER / "lora.tmp")
    pack("loras", files)

    for name, update in updates.items():
        model = diffusers_dit()
        weights = dict(model.named_parameters())
        for other in theirs:
            product = update[f"{other}.lora_B.weight"] @ update[f"{other}.lora_A.weight"]
            weights[f"{other}.weight"] += 0.75 * product
            if f"{other}.lora_B.bias" in update:
                weights[f"{other}.bias"] += 0.75 * update[f"{other}.lora_B.bias"]
        OUTPUTS[f"lora_{name}"] = run_diffusers(model)
    model = diffusers_dit()
    weights = dict(model.named_parameters())
    for key, other in {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "head.head.diff": "proj_out.weight", "head.head.diff_b": "proj_out.bias",
        "patch_embedding.diff": "patch_embedding.weight",
    }.items():  # fmt: skip
        weights[other] += 0.75 * whole[key]
    OUTPUTS["lora_whole"] = run_diffusers(model)


def big_endian(tensors: dict[str, torch.Tensor]) -> bytes:
    """What torch would write on a big-endian machine: its bytes swapped by torch, its marker set."""
    swapped = {}
    for name, value in tensors.items():
        storage = value.untyped_storage().clone()
        storage.byteswap(value.dtype)
        swapped[name] = torch.empty(0, dtype=value.dtype).set_(storage, 0, value.shape, value.stride())
    order, sys.byteorder = sys.byteorder, "big"
    try:
        data = torch_bytes(swapped)
    finally:
        sys.byteorder = order
    for name, value in torch.load(io.BytesIO(data)).items():
        assert torch.equal(value, tensors[name]), name
    return data


def containers() -> None:
    """What a .pth can hold: dtypes, views, shared storages, nesting, parameters; and what torch wrote before 1.6."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(), "slice": base[1:3, ::2], "offset": base.flatten()[5:9],
        "expanded": torch.ones(2).expand(3, 2),
        "scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "parameter": torch.nn.Parameter(torch.ones(2) * 5),
        "buffer": torch.nn.Buffer(torch.ones(2) * 6),
    }  # fmt: skip
    dtypes = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int16",
              "int32", "int64", "uint16", "uint32", "bool", "complex64")  # fmt: skip
    for name in dtypes:
        tensors[name] = torch.tensor([0.0, 1.0, 1.5, 3.0]).to(getattr(torch, name))
    tree = {
        "state_dict": tensors, "epoch": 3, "lr": 0.1, "list": [torch.ones(1), {"inner": torch.ones(2)}], "none": None,
        "size": torch.Size([1, 2]), "dtype": torch.bfloat16, "device": torch.device("cpu"),
    }  # fmt: skip
    legacy = io.BytesIO()
    torch.save(tensors["offset"], legacy, _use_new_zipfile_serialization=False)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    module = torch_bytes(torch.nn.Linear(2, 2))
    files = {
        "all.pth": torch_bytes(tree),
        "big.pth": big_endian({k: tensors[k] for k in ("float32", "bfloat16", "int64", "complex64", "transposed")}),
        "legacy.pth": legacy.getvalue(),
        "script.pt": script.getvalue(),
        "module.pth": module,
    }
    pack("containers", files)
    for name, value in tensors.items():
        OUTPUTS[f"container/{name}"] = value.detach().double().numpy() if name != "complex64" else value.numpy()


def tokenizer() -> None:
    """A sentencepiece model of umT5's kind, and what sentencepiece itself makes of some texts."""
    import sentencepiece

    texts = [line.strip() for line in (TURBO / "README.md").read_text().splitlines() if len(line) > 20]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=600, model_type="unigram", byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.99, minloglevel=2,
        user_defined_symbols=["<extra>"], normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    encoder = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    prompts = ["a red circle moving right", "Two cats, boxing!  On a stage.", "", "ｆｕｌｌ width ①",
               "日本語 and <extra> more",
               "  leading and trailing  ", "naïve café", "a\tb\nc", "🎬 film", "turbo-diffusion's 100x"]  # fmt: skip
    cases = [{"text": text, "ids": encoder.encode(text)} for text in prompts]
    pack("tokenizer", {"spiece.model": model.getvalue(), "cases.json": json.dumps(cases).encode()})


FOLDER.mkdir(exist_ok=True)
original()
diffusers_files()
turbo()
vaes()
text_encoders()
loras()
containers()
tokenizer()
np.savez_compressed(FOLDER / "outputs.npz", allow_pickle=False, **OUTPUTS)
print(f"outputs.npz: {(FOLDER / 'outputs.npz').stat().st_size / 1000:.0f} kB")
