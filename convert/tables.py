"""The mapping tables: one line a module, with its name in each world.

`entries` spells them out for a config: every tensor of a checkpoint in that naming, and the parameter it becomes.
Sources: the state dicts of `wan/modules/{model,vae,t5}.py` (Wan 2.1, 2.2), TurboDiffusion's `rcm/networks`,
diffusers' WanTransformer3DModel and AutoencoderKLWan, transformers' UMT5EncoderModel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple

from turbojax.config import ComponentConfig, DiTConfig, UMT5Config, VAEConfig

Naming = Literal["wan", "diffusers"]
NAMINGS: tuple[Naming, ...] = ("wan", "diffusers")


class Module(NamedTuple):
    """A module's name in the original release, in diffusers (transformers for umT5), and here; {i} is the layer."""

    wan: str
    diffusers: str | None
    ours: str
    kind: str


class Entry(NamedTuple):
    """One tensor of a checkpoint: `source` becomes row `layer` of `target` (all of it when None) by `transform`."""

    source: str
    target: str
    layer: int | None
    transform: str


# kind -> (name there, name here, transform) of each of the module's tensors
KINDS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "linear": (("weight", "kernel", "linear"), ("bias", "bias", "same")),
    "linear_int8": (("int8_weight", "weight_q", "same"), ("scale", "weight_scale", "same"), ("bias", "bias", "same")),
    "matrix": (("weight", "kernel", "linear"),),
    "patch": (("weight", "kernel", "patch"), ("bias", "bias", "same")),
    "table": (("", "", "table"),),
    "layer_norm": (("weight", "scale", "same"), ("bias", "bias", "same")),
    "rms_norm": (("weight", "scale", "same"),),
    "embedding": (("weight", "embedding", "same"),),
    "conv": (("weight", "kernel", "conv"), ("bias", "bias", "same")),
    "gamma_video": (("gamma", "gamma", "gamma_video"),),
    "gamma_image": (("gamma", "gamma", "gamma_image"),),
}

DIT: tuple[Module, ...] = tuple(
    Module(*row)
    for row in (
        ("patch_embedding", "patch_embedding", "patch_embedding", "patch"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1", "text_embedding.linear_1", "linear"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2", "text_embedding.linear_2", "linear"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1", "time_embedding.linear_1", "linear"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2", "time_embedding.linear_2", "linear"),
        ("time_projection.1", "condition_embedder.time_proj", "time_projection", "linear"),
        ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", "blocks.modulation", "table"),
        ("blocks.{i}.self_attn.q", "blocks.{i}.attn1.to_q", "blocks.self_attn.q", "linear"),
        ("blocks.{i}.self_attn.k", "blocks.{i}.attn1.to_k", "blocks.self_attn.k", "linear"),
        ("blocks.{i}.self_attn.v", "blocks.{i}.attn1.to_v", "blocks.self_attn.v", "linear"),
        ("blocks.{i}.self_attn.o", "blocks.{i}.attn1.to_out.0", "blocks.self_attn.o", "linear"),
        ("blocks.{i}.self_attn.norm_q", "blocks.{i}.attn1.norm_q", "blocks.self_attn.norm_q", "rms_norm"),
        ("blocks.{i}.self_attn.norm_k", "blocks.{i}.attn1.norm_k", "blocks.self_attn.norm_k", "rms_norm"),
        # The norm before cross-attention: diffusers counts norms in order of use, Wan in order of definition.
        ("blocks.{i}.norm3", "blocks.{i}.norm2", "blocks.cross_norm", "layer_norm"),
        ("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q", "blocks.cross_attn.q", "linear"),
        ("blocks.{i}.cross_attn.k", "blocks.{i}.attn2.to_k", "blocks.cross_attn.k", "linear"),
        ("blocks.{i}.cross_attn.v", "blocks.{i}.attn2.to_v", "blocks.cross_attn.v", "linear"),
        ("blocks.{i}.cross_attn.o", "blocks.{i}.attn2.to_out.0", "blocks.cross_attn.o", "linear"),
        ("blocks.{i}.cross_attn.norm_q", "blocks.{i}.attn2.norm_q", "blocks.cross_attn.norm_q", "rms_norm"),
        ("blocks.{i}.cross_attn.norm_k", "blocks.{i}.attn2.norm_k", "blocks.cross_attn.norm_k", "rms_norm"),
        ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", "blocks.ffn.up", "linear"),
        ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", "blocks.ffn.down", "linear"),
        ("head.modulation", "scale_shift_table", "head_modulation", "table"),
        ("head.head", "proj_out", "head", "linear"),
    )
)

# TurboDiffusion's sparse-linear attention; diffusers has no place for it.
SLA = Module("blocks.{i}.self_attn.attn_op.local_attn.proj_l", None, "blocks.self_attn.proj_l", "linear")

UMT5: tuple[Module, ...] = tuple(
    Module(*row)
    for row in (
        ("token_embedding", "shared", "token_embedding", "embedding"),
        ("blocks.{i}.norm1", "encoder.block.{i}.layer.0.layer_norm", "blocks.norm1", "rms_norm"),
        ("blocks.{i}.attn.q", "encoder.block.{i}.layer.0.SelfAttention.q", "blocks.attn.q", "matrix"),
        ("blocks.{i}.attn.k", "encoder.block.{i}.layer.0.SelfAttention.k", "blocks.attn.k", "matrix"),
        ("blocks.{i}.attn.v", "encoder.block.{i}.layer.0.SelfAttention.v", "blocks.attn.v", "matrix"),
        ("blocks.{i}.attn.o", "encoder.block.{i}.layer.0.SelfAttention.o", "blocks.attn.o", "matrix"),
        (
            "blocks.{i}.pos_embedding.embedding",
            "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
            "blocks.position_bias",
            "embedding",
        ),
        ("blocks.{i}.norm2", "encoder.block.{i}.layer.1.layer_norm", "blocks.norm2", "rms_norm"),
        ("blocks.{i}.ffn.gate.0", "encoder.block.{i}.layer.1.DenseReluDense.wi_0", "blocks.ffn.gate", "matrix"),
        ("blocks.{i}.ffn.fc1", "encoder.block.{i}.layer.1.DenseReluDense.wi_1", "blocks.ffn.up", "matrix"),
        ("blocks.{i}.ffn.fc2", "encoder.block.{i}.layer.1.DenseReluDense.wo", "blocks.ffn.down", "matrix"),
        ("norm", "encoder.final_layer_norm", "norm", "rms_norm"),
    )
)

# Inside the VAE's blocks.
_RES_BLOCK = (
    ("residual.0", "norm1", "gamma_video"),
    ("residual.2", "conv1", "conv"),
    ("residual.3", "norm2", "gamma_video"),
    ("residual.6", "conv2", "conv"),
)
_SHORTCUT = (("shortcut", "conv_shortcut", "conv"),)
_ATTENTION = (("norm", "norm", "gamma_image"), ("to_qkv", "to_qkv", "conv"), ("proj", "proj", "conv"))
_RESAMPLE = (("resample.1", "resample.1", "conv"),)
_TIME_CONV = (("time_conv", "time_conv", "conv"),)
_ENDS = (("head.0", "norm_out", "gamma_video"), ("head.2", "conv_out", "conv"))


def vae_modules(config: VAEConfig) -> list[Module]:
    """The VAE's table: its blocks are numbered through in the original, and by stage in the decoder elsewhere."""
    rows: list[Module] = []

    def add(wan: str, other: str, inner: tuple[tuple[str, str, str], ...]) -> None:
        rows.extend(Module(f"{wan}.{w}", f"{other}.{o}", f"{other}.{o}", kind) for w, o, kind in inner)

    def res_block(wan: str, other: str, changes_width: bool) -> None:
        add(wan, other, _RES_BLOCK + (_SHORTCUT if changes_width else ()))

    def middle(side: str) -> None:
        add(f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RES_BLOCK)
        add(f"{side}.middle.1", f"{side}.mid_block.attentions.0", _ATTENTION)
        add(f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RES_BLOCK)

    last = len(config.dim_mult) - 1
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    rows.append(Module("encoder.conv1", "encoder.conv_in", "encoder.conv_in", "conv"))
    index = 0
    for stage in range(last + 1):
        for i in range(config.num_res_blocks):
            names = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            res_block(*names, changes_width=i == 0 and widths[stage] != widths[stage + 1])
            index += 1
        if stage < last:
            names = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            add(*names, _RESAMPLE + (_TIME_CONV if config.temporal_downsample[stage] else ()))
            index += 1
    middle("encoder")
    add("encoder", "encoder", _ENDS)
    rows.append(Module("conv1", "quant_conv", "quant_conv", "conv"))
    rows.append(Module("conv2", "post_quant_conv", "post_quant_conv", "conv"))
    rows.append(Module("decoder.conv1", "decoder.conv_in", "decoder.conv_in", "conv"))
    middle("decoder")
    index, width = 0, widths[-1]
    for stage, out in enumerate(reversed(widths[1:])):
        for i in range(config.num_res_blocks + 1):
            names = f"decoder.upsamples.{index}", f"decoder.up_blocks.{stage}.resnets.{i}"
            res_block(*names, changes_width=i == 0 and width != out)
            index += 1
        width = out // 2
        if stage < last:
            names = f"decoder.upsamples.{index}", f"decoder.up_blocks.{stage}.upsamplers.0"
            add(*names, _RESAMPLE + (_TIME_CONV if config.temporal_downsample[last - 1 - stage] else ()))
            index += 1
    add("decoder", "decoder", _ENDS)
    return rows


def modules(config: ComponentConfig) -> list[Module]:
    """The table of a component."""
    if isinstance(config, VAEConfig):
        return vae_modules(config)
    if isinstance(config, UMT5Config):
        return list(UMT5)
    return [*DIT, SLA] if config.linear_branch else list(DIT)


def entries(config: ComponentConfig, naming: Naming, quantized: Collection[str] = ()) -> Iterator[Entry]:
    """Every tensor of a checkpoint of `config`; quantized: paths here of the layers whose weights are int8.

    Raises KeyError where the naming has no name for a module.
    """
    layers = config.num_layers if isinstance(config, DiTConfig | UMT5Config) else 0
    for module in modules(config):
        theirs = getattr(module, naming)
        if theirs is None:
            raise KeyError(module.ours)
        kind = "linear_int8" if module.ours in quantized else module.kind
        for name, here, transform in KINDS[kind]:
            source, target = _join(theirs, name), _join(module.ours, here)
            if "{i}" in theirs:
                for i in range(layers):
                    yield Entry(source.replace("{i}", str(i)), target, i, transform)
            else:
                yield Entry(source, target, None, transform)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else prefix
