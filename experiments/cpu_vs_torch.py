"""DiT, VAE decode and umT5 forward on CPU, against diffusers and transformers on the same random weights.

    uv run python experiments/cpu_vs_torch.py --torch-python ../torch-env/bin/python --out runs/cpu_vs_torch

`--torch-python` is a Python that has torch, diffusers and transformers (`uv venv ../torch-env`, then
`uv pip install --python ../torch-env/bin/python torch diffusers transformers`). Torch makes the models, every
parameter random, and saves them; this side converts them, checks that both give the same result, and then the two
take turns, run by run, in float32 and with the same number of threads. Reported is the ratio of the medians, torch
over JAX: above 1, JAX is faster. Takes a few minutes and 3 GB. Writes results.jsonl, a table (table.md) and a
picture (ratios.png) into `--out`.
"""

# torch, diffusers and transformers live in the other Python.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# The small model's own sizes, and Wan's widths with few layers and few tokens. Shapes as this library has them.
CASES: dict[str, dict[str, Any]] = {
    "dit-tiny": {
        "dit": {"dim": 128, "heads": 4, "ffn": 512, "layers": 4, "text_dim": 64},
        "latents": (2, 5, 16, 16, 16), "context": (2, 32, 64),
    },
    "dit-wan": {
        "dit": {"dim": 1536, "heads": 12, "ffn": 8960, "layers": 2, "text_dim": 4096},
        "latents": (1, 3, 30, 52, 16), "context": (1, 512, 4096),
    },
    "vae-tiny": {"vae": {"base_dim": 8}, "latents": (1, 5, 16, 16, 16)},
    "vae-wan": {"vae": {"base_dim": 96}, "latents": (1, 2, 8, 8, 16)},
    "umt5-tiny": {"umt5": {"dim": 64, "ffn": 128, "heads": 4, "layers": 2}, "tokens": 32},
    "umt5-wide": {"umt5": {"dim": 1024, "ffn": 2560, "heads": 16, "layers": 2}, "tokens": 512},
}  # fmt: skip
VOCABULARY = 1000
WARM_UP = 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--torch-python", type=Path, metavar="PATH")
    arguments.add_argument("--out", type=Path, default=Path("runs/cpu_vs_torch"), metavar="DIR")
    arguments.add_argument("--rounds", type=int, default=9, help="runs of each, after two to warm up")
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--cases", default=",".join(CASES), help="comma-separated: " + ", ".join(CASES))
    arguments.add_argument("--torch-half", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    # Both halves see the same cores, and size their thread pools by them.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    names = args.cases.split(",")
    if args.torch_half:
        serve(torch_models(args.torch_half, names))
        return
    if args.torch_python is None:
        arguments.error("--torch-python is needed: a Python with torch, diffusers and transformers")
    # As the command line does; torch, in its own process, keeps its memory itself.
    from turbojax.host_memory import keep_freed_memory

    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, torch_half(args, Path(folder)) as ask:
        rows = [compare(name, Path(folder), ask, args) for name in names]
    report(rows, args.out)


def compare(name: str, folder: Path, ask: Callable[[str], float], args: argparse.Namespace) -> dict[str, Any]:
    """One case: the same result first, then turns of torch and JAX."""
    run, versions = jax_model(name, folder)
    ask(name)
    expected, result = np.load(folder / name / "output.npy"), run()
    error = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
    if not error < 1e-4:
        raise SystemExit(f"{name}: the two disagree by {error:.1e}; a time would mean nothing")
    seconds: dict[str, list[float]] = {"torch": [], "jax": []}
    for _ in range(WARM_UP + args.rounds):
        seconds["torch"].append(ask(name))
        begun = time.perf_counter()
        run()
        seconds["jax"].append(time.perf_counter() - begun)
    medians = {key: statistics.median(values[WARM_UP:]) for key, values in seconds.items()}
    row = {"case": name, **{f"{key}_ms": 1000 * value for key, value in medians.items()}}
    row |= {"ratio": medians["torch"] / medians["jax"], "relative_error": error, "threads": args.threads}
    row |= {"seconds": {key: values[WARM_UP:] for key, values in seconds.items()}, "versions": versions}
    print(f"{name:10} torch {row['torch_ms']:9.2f} ms   jax {row['jax_ms']:9.2f} ms   {row['ratio']:.2f}x", flush=True)
    return row


def report(rows: list[dict[str, Any]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["| case | torch, ms | JAX, ms | torch / JAX | relative error |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['case']} | {r['torch_ms']:.2f} | {r['jax_ms']:.2f} | {r['ratio']:.2f} | {r['relative_error']:.1e} |"
        for r in rows
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(6, 0.5 * len(rows) + 1), layout="constrained")
    axes.barh([r["case"] for r in rows][::-1], [r["ratio"] for r in rows][::-1])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel(f"time in torch / time in JAX, float32, {rows[0]['threads']} thread(s)")
    figure.savefig(out / "ratios.png", dpi=120)
    print(f"written: {out / 'results.jsonl'}, table.md, ratios.png")


def jax_model(name: str, folder: Path) -> tuple[Callable[[], np.ndarray], dict[str, str]]:
    """The converted model's forward pass on the case's inputs, compiled."""
    import jax
    from flax import nnx

    import turbojax
    from convert import convert_checkpoint

    converted = folder / name / "converted"
    convert_checkpoint(folder / name / "model", converted, dtype="float32", format="safetensors", progress=False)
    module = turbojax.load(converted, dtype="float32")
    graph, state = nnx.split(module)
    with np.load(folder / name / "inputs.npz") as file:
        inputs = [jax.device_put(file[key]) for key in ("a", "b", "c") if key in file]

    def forward(state: Any, *inputs: Any) -> Any:
        module = nnx.merge(graph, state)
        return module.decode(*inputs) if name.startswith("vae") else module(*inputs)

    compiled = jax.jit(forward)
    return lambda: np.asarray(compiled(state, *inputs)), {"jax": jax.__version__}


@contextmanager
def torch_half(args: argparse.Namespace, folder: Path) -> Iterator[Callable[[str], float]]:
    """This script under the other Python; the function that comes back runs a case there and gives the seconds."""
    shared = ["--torch-half", str(folder), "--cases", args.cases, "--threads", str(args.threads)]
    command = [str(args.torch_python), __file__, *shared]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to_torch, from_torch = process.stdin, process.stdout

        def ask(name: str) -> float:
            print(name, file=to_torch, flush=True)
            answer = from_torch.readline()
            if not answer:
                raise SystemExit(f"{name}: the torch half has died; its own message is above")
            return float(answer)

        ask("ready")
        yield ask
        to_torch.close()


# What follows runs under the other Python.


def serve(models: dict[str, Callable[[], float]]) -> None:
    """Answer each name on standard input with the seconds that its run took."""
    for line in sys.stdin:
        name = line.strip()
        print(0.0 if name == "ready" else models[name](), flush=True)


def torch_models(folder: Path, names: list[str]) -> dict[str, Callable[[], float]]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    models = {}
    for index, name in enumerate(names):
        torch.manual_seed(index)
        case, place = CASES[name], folder / name
        place.mkdir()
        build = {"dit": _torch_dit, "vae": _torch_vae, "umt5": _torch_umt5}[name.partition("-")[0]]
        model, inputs, forward = build(case)
        model.save_pretrained(place / "model")
        np.savez(place / "inputs.npz", **{key: value.numpy() for key, value in zip("abc", inputs, strict=False)})

        def run(forward: Any = forward, place: Path = place) -> float:
            begun = time.perf_counter()
            result = forward()
            seconds = time.perf_counter() - begun
            if not (place / "output.npy").exists():
                np.save(place / "output.npy", result.numpy())
            return seconds

        models[name] = run
    return models


def _randomised(model: Any) -> Any:
    """Every parameter away from where initialisation leaves it: zeros and ones would hide a mistake."""
    import torch

    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.add_(torch.randn_like(parameter) * 0.5 * fan_in**-0.5)
    return model.eval()


def _torch_dit(case: dict[str, Any]) -> Any:
    import torch
    from diffusers import WanTransformer3DModel

    size = case["dit"]
    model = WanTransformer3DModel(
        num_attention_heads=size["heads"],
        attention_head_dim=size["dim"] // size["heads"],
        in_channels=16,
        out_channels=16,
        text_dim=size["text_dim"],
        ffn_dim=size["ffn"],
        num_layers=size["layers"],
    )
    latents, context = torch.randn(case["latents"]), torch.randn(case["context"])
    timestep = torch.full((len(latents),), 500.0)
    x, model = latents.permute(0, 4, 1, 2, 3).contiguous(), _randomised(model)
    return model, (latents, timestep, context), lambda: model(x, timestep, context).sample.permute(0, 2, 3, 4, 1)


def _torch_vae(case: dict[str, Any]) -> Any:
    import torch
    from diffusers import AutoencoderKLWan

    model = _randomised(AutoencoderKLWan(base_dim=case["vae"]["base_dim"], z_dim=16))
    latents = torch.randn(case["latents"])
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    z = (latents * std + mean).permute(0, 4, 1, 2, 3).contiguous()
    return model, (latents,), lambda: model.decode(z).sample.permute(0, 2, 3, 4, 1)


def _torch_umt5(case: dict[str, Any]) -> Any:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    size = case["umt5"]
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=size["dim"],
        d_kv=size["dim"] // size["heads"],
        d_ff=size["ffn"],
        num_layers=size["layers"],
        num_heads=size["heads"],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = _randomised(UMT5EncoderModel(config))
    ids = torch.randint(2, VOCABULARY, (1, case["tokens"]), dtype=torch.int32)
    mask = torch.ones_like(ids)
    return model, (ids, mask), lambda: model(ids, attention_mask=mask).last_hidden_state


if __name__ == "__main__":
    main()
