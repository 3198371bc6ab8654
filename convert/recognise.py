"""What a checkpoint is: the prefix its names carry, the naming they follow, and the shape of the model.

Nothing is read but names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from convert.errors import CheckpointError
from convert.infer import infer_config
from convert.source import Source
from convert.tables import Naming
from convert.tensors import Leaf, StoredTensor
from turbojax.config import PRESETS, ComponentConfig, ComponentKind


class Scheme(NamedTuple):
    """A naming of a kind of model, told by a tensor that nothing else has."""

    kind: ComponentKind
    naming: Naming
    anchor: str


SCHEMES = (
    Scheme("dit", "wan", "blocks.0.self_attn.q.bias"),
    Scheme("dit", "diffusers", "blocks.0.attn1.to_q.bias"),
    Scheme("vae", "wan", "encoder.downsamples.0.residual.0.gamma"),
    Scheme("vae", "diffusers", "encoder.down_blocks.0.norm1.gamma"),
    Scheme("umt5", "wan", "blocks.0.attn.q.weight"),
    Scheme("umt5", "diffusers", "encoder.block.0.layer.0.SelfAttention.q.weight"),
)

# Put into names by torch.compile, activation checkpointing and FSDP, anywhere.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

# Of several copies of a model in one file, the averaged one is wanted, and the helpers of distillation are not.
_AVERAGED = {"net_ema", "ema", "model_ema", "ema_model", "generator_ema"}
_HELPERS = {"net_fake_score", "fake_score", "net_teacher", "teacher", "real_score", "critic", "discriminator"}
# What trainers keep beside the model.
_TRAINER_STATE = {
    "optimizer", "optimizers", "optimizer_states", "optim", "scheduler", "lr_scheduler", "lr_schedulers",
    "grad_scaler", "scaler", "callbacks", "loops", "trainer", "rng", "rng_state",
}  # fmt: skip

# Parts of a larger model, of which only the rest is wanted, and the tokenizer that some writers put among them.
_UNUSED: Mapping[str, tuple[str, ...]] = {"umt5": ("decoder.", "lm_head.", "spiece_model")}
# Tied to another tensor, and stored beside it by some writers.
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}

# Recognised, and refused in one line. First match wins.
_UNSUPPORTED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), message)
    for pattern, message in (
        (
            r"(^|\.)(img_emb\.emb_pos|image_embedder\.pos_embed)$",
            "Wan 2.1 FLF2V (first and last frame): needs a CLIP image branch, which turbojax lacks; use Wan 2.2 I2V",
        ),
        (
            r"(^|\.)(img_emb|condition_embedder\.image_embedder)\.|\.(k_img|add_k_proj)\.",
            "Wan 2.1 I2V: needs a CLIP image branch, which turbojax lacks; use Wan 2.2 I2V, which has none",
        ),
        (r"(^|\.)vace_(blocks|patch_embedding)\.", "Wan VACE: turbojax has no control branch; use Wan T2V or 2.2 I2V"),
        (
            r"(^|\.)(motion_encoder|face_adapter|face_encoder|pose_patch_embedding)\.",
            "Wan Animate: turbojax has no motion branch; use Wan 2.2 I2V",
        ),
        (
            r"(^|\.)(casual_audio_encoder|audio_injector|audio_proj)\.",
            "Wan S2V: turbojax has no audio branch; use Wan 2.2 I2V",
        ),
        (
            r"(^|\.)encoder\.(downsamples\.0\.downsamples\.0|down_blocks\.0\.resnets\.0)\.",
            "the VAE of Wan 2.2 TI2V-5B (48 channels): turbojax has the VAE of Wan 2.1, which the A14B models use",
        ),
        (
            r"(^|\.)visual\.transformer\.0\.|(^|\.)vision_model\.encoder\.layers\.0\.",
            "CLIP's image encoder, which only Wan 2.1 I2V needs; turbojax has no use for it",
        ),
    )
)
_LORA = re.compile(r"\.(lora_[AB]|lora_up|lora_down|lora\.up|lora\.down|diff|diff_b|hada_w1_a|lokr_w1)(\.|$)")


@dataclass(frozen=True)
class Recognised:
    """tensors: by name without prefix or wrappers; ignored: full names left out, by reason."""

    source: Source
    kind: ComponentKind
    naming: Naming
    prefix: str
    config: ComponentConfig
    tensors: Mapping[str, StoredTensor]
    ignored: Mapping[str, Collection[str]]


def is_lora(source: Source) -> bool:
    """True when the file holds low-rank updates, not a model."""
    return any(_LORA.search(name) for name in source.tensors)


def recognise(source: Source, *, model: str | None = None, prefix: str | None = None) -> Recognised:
    """Tell what `source` is. model: a preset whose shape overrides the inferred one; prefix: picks among several.

    Raises CheckpointError for what is unknown, unsupported or ambiguous.
    """
    if model is not None and model not in PRESETS:
        raise CheckpointError(f"unknown model {model!r}; known: {', '.join(PRESETS)}")
    if is_lora(source):
        raise CheckpointError(f"{source.path}: a LoRA; merge it into its base: turbojax convert BASE --lora FILE")
    names = _unwrapped(source)
    for pattern, message in _UNSUPPORTED:
        if any(pattern.search(name) for name in names):
            raise CheckpointError(f"{source.path}: recognised as {message}")
    scheme, chosen, others = _choose(source, names, prefix)
    tensors, ignored = {}, {}
    for name, full in names.items():
        if name.startswith(chosen) and not any(name.startswith(p) for p in others if len(p) > len(chosen)):
            tensors[name.removeprefix(chosen)] = source.tensors[full]
            continue
        reason = next((f"another copy of the model, at {p!r}" for p in others if p and name.startswith(p)), None)
        if reason is None and not _TRAINER_STATE.isdisjoint(name.split(".")[:2]):
            reason = "the trainer's own state"
        if reason is None:
            tensors[name] = source.tensors[full]  # not the model's: reported as unmapped
        else:
            ignored.setdefault(reason, []).append(full)
    if chosen == "":
        for name in [n for n in tensors if n.split(".")[0] in _TRAINER_STATE]:
            del tensors[name]
            ignored.setdefault("the trainer's own state", []).append(names[name])
    for name in [n for n in tensors if n.startswith(_UNUSED.get(scheme.kind, ("\0",)))]:
        del tensors[name]
        ignored.setdefault("parts that turbojax has no use for", []).append(names[chosen + name])
    for alias, name in _TIED.items():
        if alias in tensors:
            _untie(source, tensors, alias, name)
            ignored.setdefault(f"tied to {name}", []).append(names[chosen + alias])
    config = infer_config(scheme.kind, scheme.naming, tensors, source, model)
    return Recognised(source, scheme.kind, scheme.naming, chosen, config, tensors, ignored)


def _untie(source: Source, tensors: dict[str, StoredTensor], alias: str, name: str) -> None:
    """Leave one of two names for a tensor. Raises CheckpointError when they are two tensors."""
    tied = tensors.pop(alias)
    kept = tensors.setdefault(name, tied)
    if kept is not tied and not _same(kept, tied):
        raise CheckpointError(f"{source.path}: {alias} and {name} should be one tensor, but differ")


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if (a.file, a.offset, a.strides) == (b.file, b.offset, b.strides):
        return True
    pairs = zip(Leaf.of_stored(a).chunks(), Leaf.of_stored(b).chunks(), strict=True)
    return all(x.tobytes() == y.tobytes() for (_, x), (_, y) in pairs)


def _unwrapped(source: Source) -> dict[str, str]:
    """Name without wrappers -> name in the file."""
    names: dict[str, str] = {}
    for full in source.tensors:
        name = _WRAPPERS.sub("", full)
        if name in names:
            raise CheckpointError(f"{source.path}: {names[name]} and {full} are the same tensor twice")
        names[name] = full
    return names


def _choose(source: Source, names: Collection[str], prefix: str | None) -> tuple[Scheme, str, list[str]]:
    """(scheme, its prefix, the prefixes of other models in the file)."""
    found = [
        (scheme, name.removesuffix(scheme.anchor))
        for scheme in SCHEMES
        for name in names
        if name.endswith(scheme.anchor) and name.removesuffix(scheme.anchor)[-1:] in ("", ".")
    ]
    if prefix is not None:
        wanted = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
        chosen = [(s, p) for s, p in found if p == wanted]
        if not chosen:
            known = ", ".join(repr(p) for _, p in found) or "none"
            raise CheckpointError(f"{source.path}: no model at prefix {prefix!r}; found: {known}")
    else:
        ranks = [_rank(p) for _, p in found]
        chosen = [pair for pair, rank in zip(found, ranks, strict=True) if rank == min(ranks)]
    if not chosen:
        some = ", ".join(sorted(names)[:3])
        raise CheckpointError(
            f"{source.path}: not recognised: {len(names)} tensors such as {some}; known are Wan's DiT, VAE and umT5 "
            "in the names of the original, of diffusers and of TurboDiffusion"
        )
    if len(chosen) > 1:
        models = ", ".join(f"{s.kind} at {p!r}" for s, p in chosen)
        raise CheckpointError(f"{source.path}: holds several models: {models}; choose one with --prefix")
    ((scheme, best),) = chosen
    return scheme, best, [p for _, p in found if p != best]


def _rank(prefix: str) -> int:
    parts = set(prefix.split("."))
    return 2 if parts & _HELPERS else 0 if parts & _AVERAGED else 1
