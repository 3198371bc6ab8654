"""LoRA files in the styles of the field, merged into a component: weight + strength * alpha / rank * (up @ down).

    diffusers     transformer.blocks.0.attn1.to_q.lora_A.weight      (alpha in the header's `lora_adapter_metadata`)
    original      diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha, .diff (weight), .diff_b (bias);
                  diffusion_model.blocks.0.diff_m (the modulation table)
    peft          base_model.model.blocks.0.self_attn.q.lora_A.weight       (alpha in adapter_config.json beside it)
    kohya         lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha

Sources: diffusers' `loaders/lora_conversion_utils.py`, peft's `LoraLayer` (scaling), musubi-tuner's `networks/lora.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.errors import CheckpointError
from convert.source import Source, open_source
from convert.tables import KINDS, NAMINGS, Entry, modules
from convert.tensors import Leaf, StoredTensor
from convert.transforms import TRANSFORMS
from turbojax.component import Component
from turbojax.config import DiTConfig

_PREFIXES = (
    "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "lora_unet_",
)  # fmt: skip
# pattern -> what it is, and what the module's name lacks
_PARTS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), part, rest)
    for pattern, part, rest in (
        (r"\.(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$", "down", ""),
        (r"\.(lora_B(\.\w+)?|lora_up|lora\.up)\.weight$", "up", ""),
        (r"\.lora_B(\.\w+)?\.bias$", "up_bias", ""),
        (r"\.alpha$", "alpha", ""),
        (r"\.diff$", "diff", ""),
        (r"\.diff_b$", "diff_b", ""),
        (r"\.diff_m$", "diff", ".modulation"),
    )
)
_METADATA = "lora_adapter_metadata"


class Place(NamedTuple):
    """Where a module's weight and bias lie: the entries of the mapping table, layer filled in."""

    weight: Entry
    bias: Entry | None


@dataclass
class Update:
    """What a file says about one module."""

    name: str
    parts: dict[str, StoredTensor]
    scale: Callable[[int], float]  # rank -> alpha / rank

    def weight(self) -> np.ndarray | None:
        """The change of the weight, float32, in torch's shape (a convolution's kernel flattened)."""
        change: np.ndarray | None = None
        if "down" in self.parts:
            down, up = (self.parts[part].array().astype(np.float32) for part in ("down", "up"))
            down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
            change = (up @ down) * np.float32(self.scale(down.shape[0]))
        if "diff" in self.parts:
            diff = self.parts["diff"].array().astype(np.float32)
            change = diff if change is None else change + diff.reshape(change.shape)
        return change

    def bias(self) -> np.ndarray | None:
        """The change of the bias, float32. peft scales the bias of B with the rest; `diff_b` stands alone."""
        change: np.ndarray | None = None
        if "diff_b" in self.parts:
            change = self.parts["diff_b"].array().astype(np.float32)
        if "up_bias" in self.parts:
            scale = np.float32(self.scale(self.parts["down"].shape[0]))
            scaled = self.parts["up_bias"].array().astype(np.float32) * scale
            change = scaled if change is None else change + scaled
        return change


def apply_lora(component: Component, source: str | Path, strength: float = 1.0) -> Component:
    """The component with a LoRA merged: sums in float32, rounded once to the parameter's dtype, as it is read.

    Raises CheckpointError for a file that is no LoRA, is made for another model, or a component with int8 weights.
    """
    config = component.config
    if not isinstance(config, DiTConfig):
        raise CheckpointError(f"{source}: LoRAs belong to the DiT, not to a {type(config).__name__}")
    if any(path.endswith(".weight_q") for path in component.leaves):
        raise CheckpointError(f"{source}: cannot be merged into int8 weights; merge into the bf16 model, then quantise")
    if not math.isfinite(strength):
        raise CheckpointError(f"{source}: strength {strength} is not a number")
    changes: dict[str, list[tuple[Entry, Update]]] = defaultdict(list)
    troubles: list[str] = []
    places = _places(config)
    opened = open_source(source)
    updates = read_lora(opened)
    for update in updates:
        place = places.get(update.name)
        if place is None:
            troubles.append(f"{update.name} is unknown")
            continue
        for entry, shapes in ((place.weight, _weight_shapes(update)), (place.bias, _bias_shapes(update))):
            if not shapes:
                continue
            if entry is None:
                troubles.append(f"{update.name} has no bias")
                continue
            accepted = _accepted(component.leaves[entry.target].shape, entry, config.patch_size)
            if wrong := [shape for shape in shapes if shape not in accepted]:
                troubles.append(f"{update.name} changes {list(wrong[0])}, the model has {list(accepted[0])}")
            else:
                changes[entry.target].append((entry, update))
    if troubles:
        more = f"; and {len(troubles) - 6} more" if len(troubles) > 6 else ""
        raise CheckpointError(f"{source}: this LoRA does not fit the model: {'; '.join(troubles[:6])}{more}")
    leaves = dict(component.leaves)
    for target, rows in changes.items():
        leaves[target] = _changed(leaves[target], rows, strength, config.patch_size)
    return Component(config, leaves, component.dtype)


def read_lora(source: Source) -> list[Update]:
    """Updates by module name without prefix. Raises CheckpointError naming every key that is not understood."""
    found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    troubles: list[str] = []
    scales = _adapter_scales(source)
    for key, tensor in source.tensors.items():
        match = next(((m, part, rest) for pattern, part, rest in _PARTS if (m := pattern.search(key))), None)
        if match is None:
            troubles.append(f"{key} is of an unknown kind")
            continue
        module, part = _stripped(key[: match[0].start()]) + match[2], match[1]
        if part in found[module]:
            troubles.append(f"{key} occurs twice")
        if tensor.dtype.kind != "f" and not tensor.dtype.name.startswith(("bfloat16", "float8")):
            troubles.append(f"{key} is {tensor.dtype}, not a float")
        found[module][part] = tensor
    updates = []
    for module, parts in found.items():
        down, up = parts.get("down"), parts.get("up")
        alpha = parts.get("alpha")
        if (down is None) != (up is None):
            troubles.append(f"{module} has only one half of its product")
        elif down is not None and up is not None and not _multiply(down, up):
            troubles.append(f"{module}: {list(up.shape)} x {list(down.shape)} is no product")
        elif alpha is not None and math.prod(alpha.shape) != 1:
            troubles.append(f"{module}.alpha is not one number")
        elif "up_bias" in parts and down is None:
            troubles.append(f"{module} has a bias without weights")
        elif parts.keys() == {"alpha"}:
            troubles.append(f"{module} has an alpha and nothing that it scales")
        elif alpha is not None and not np.isfinite(alpha.array().astype(np.float64)).all():
            troubles.append(f"{module}.alpha is not finite")
        else:
            updates.append(Update(module, parts, _scale(alpha, scales, module)))
    if troubles:
        more = f"; and {len(troubles) - 6} more" if len(troubles) > 6 else ""
        raise CheckpointError(f"{source.path}: no LoRA that is understood: {'; '.join(troubles[:6])}{more}")
    return updates


def _stripped(name: str) -> str:
    for _ in range(2):  # peft wraps what diffusers has prefixed
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _multiply(down: StoredTensor, up: StoredTensor) -> bool:
    """[rank, in, ...] and [out, rank, 1...], none of them empty."""
    return (
        len(down.shape) >= 2
        and len(up.shape) >= 2
        and 0 not in (*down.shape, *up.shape)
        and math.prod(up.shape[1:]) == down.shape[0]
    )


def _scale(alpha: StoredTensor | None, adapter: Callable[[str, int], float], module: str) -> Callable[[int], float]:
    if alpha is None:
        return lambda rank: adapter(module, rank)
    value = float(alpha.array().astype(np.float64).reshape(()))
    return lambda rank: value / rank


def _adapter_scales(source: Source) -> Callable[[str, int], float]:
    """alpha / rank (or / sqrt(rank)) by module, from diffusers' header or peft's config; 1 without either."""
    text = source.metadata.get(_METADATA)
    if text is None and "peft_type" not in source.config:
        return lambda module, rank: 1.0
    try:
        told = source.config if text is None else json.loads(text)
        fields = {key.removeprefix("transformer."): v for key, v in told.items()}
        alpha, patterns = fields.get("lora_alpha"), dict(fields.get("alpha_pattern") or {})
        rooted = bool(fields.get("use_rslora", False))
        alphas = {name: float(value) for name, value in patterns.items()}
        default = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source.path}: its alpha cannot be read: {str(error)[:80]}") from error

    def scale(module: str, rank: int) -> float:
        value = next((a for name, a in alphas.items() if module == name or module.endswith(f".{name}")), default)
        return 1.0 if value is None else value / (math.sqrt(rank) if rooted else rank)

    return scale


def _places(config: DiTConfig) -> Mapping[str, Place]:
    """Every module of the DiT by its name in each naming, dotted and with kohya's underscores."""
    places: dict[str, Place] = {}
    for row in modules(config):
        parts = KINDS[row.kind]
        for naming in NAMINGS:
            theirs = getattr(row, naming)
            if theirs is None:
                continue
            for layer in range(config.num_layers) if "{i}" in theirs else [None]:
                name = theirs if layer is None else theirs.replace("{i}", str(layer))
                held = [Entry(name, f"{row.ours}.{here}" if here else row.ours, layer, t) for _, here, t in parts]
                place = Place(held[0], held[1] if len(held) > 1 else None)
                places[name] = place
                places[name.replace(".", "_")] = place
    return places


def _weight_shapes(update: Update) -> list[tuple[int, ...]]:
    shapes = []
    if "down" in update.parts:
        shapes.append((update.parts["up"].shape[0], math.prod(update.parts["down"].shape[1:])))
    if "diff" in update.parts:
        shapes.append(update.parts["diff"].shape)
    return shapes


def _bias_shapes(update: Update) -> list[tuple[int, ...]]:
    return [update.parts[part].shape for part in ("diff_b", "up_bias") if part in update.parts]


def _accepted(shape: tuple[int, ...], entry: Entry, patch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that a change may have: the tensor's own in each naming, and a convolution's as a matrix."""
    own = TRANSFORMS[entry.transform].source_shapes(shape if entry.layer is None else shape[1:], patch)
    return [*own, *((s[0], math.prod(s[1:])) for s in own if len(s) > 2)]


def _changed(leaf: Leaf, rows: list[tuple[Entry, Update]], strength: float, patch: tuple[int, ...]) -> Leaf:
    transform = TRANSFORMS[rows[0][0].transform]

    def change(entry: Entry, update: Update) -> np.ndarray:
        shape = leaf.shape if entry.layer is None else leaf.shape[1:]
        is_bias = entry.target.endswith(".bias")
        value = update.bias() if is_bias else update.weight()
        assert value is not None
        source_shape = transform.source_shapes(shape, patch)[0]
        return transform.forward(value.reshape(source_shape), shape) * np.float32(strength)

    def read(start: int, stop: int) -> np.ndarray:
        values = leaf.read(start, stop)
        total = None
        for entry, update in rows:
            if entry.layer is None:
                total = values.astype(np.float32) if total is None else total
                total += change(entry, update)[start:stop]
            elif start <= entry.layer < stop:
                total = values.astype(np.float32) if total is None else total
                total[entry.layer - start] += change(entry, update)
        return values if total is None else total.astype(leaf.dtype)

    return Leaf(leaf.shape, leaf.dtype, read)
