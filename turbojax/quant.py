"""W8A8: linear layers of the transformer blocks with int8 weights, activations quantised as they come.

`quantize_dit` turns a float module into a quantised one; everything outside the blocks, and SLA's `proj_l`, stays as
it was (TurboDiffusion `modify_model.replace_linear_norm`). A quantised module has no derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8, Num

import pallas_kernels as kernels
from turbojax.models.layers import Linear, Measured

# "block": the reference's 128 x 128 tiles. "channel": one scale an output channel and a token, faster and closer.
Granularity = Literal["block", "channel"]


class Quantized(NamedTuple):
    """An activation as int8 values and the float32 scales that its consumer's granularity asks for."""

    values: Int8[Array, "*rows K"]
    scale: Float[Array, "..."]


class QuantizedLinear(nnx.Module):
    """`Linear` with int8 weights [out, in]; a stack of layers has one more axis in front."""

    def __init__(self, weight_q: Array, weight_scale: Array, bias: Array):
        self.weight_q = nnx.Param(weight_q)
        self.weight_scale = nnx.Param(weight_scale)
        self.bias = nnx.Param(bias)

    def __call__(
        self, x: Num[Array, "*rows K"] | Quantized, activation: Literal["gelu_tanh"] | None = None
    ) -> Float[Array, "*rows N"]:
        return self._product(x, activation=activation)

    @property
    def rounds_rows(self) -> bool:
        """Whether this layer wants its input `Measured`."""
        n, k = self.weight_q.shape[-2:]
        return not self._in_tiles and kernels.rounds_rows(n, k, self.bias.dtype)

    @property
    def tells_squares(self) -> bool:
        """Whether `with_squares` costs no pass of its own."""
        n, k = self.weight_q.shape[-2:]
        return kernels.measures_rows(n, k, self.bias.dtype)

    def with_amax(
        self, x: Num[Array, "*rows K"] | Quantized, activation: Literal["gelu_tanh"] | None = None
    ) -> Measured:
        """self(x) and what the next layer needs to round it."""
        return Measured(*self._product(x, activation=activation, measure="amax"))

    def with_squares(
        self, x: Num[Array, "*rows K"] | Quantized
    ) -> tuple[Float[Array, "*rows N"], Float32[Array, "*rows"]]:
        """self(x) and the sum of squares of each of its rows."""
        return self._product(x, measure="squares")

    def onto(
        self,
        residual: Float[Array, "B L N"],
        x: Num[Array, "B L K"] | Quantized | Measured,
        gate: Float[Array, "B 1 N"] | None = None,
    ) -> Float[Array, "B L N"]:
        """residual + gate * self(x), in float32, rounded once."""
        return self._product(x, residual=residual, gate=gate)

    def modulated(
        self,
        x: Float[Array, "B L K"],
        shift: Float[Array, "..."],
        scale: Float[Array, "..."],
        eps: float,
        affine: bool = False,
    ) -> Quantized:
        """norm(x) * (1 + scale) + shift (affine: scale), quantised for this layer without a float copy written."""
        options: Any = {"granularity": "block" if self._in_tiles else "token", "affine": affine}
        return Quantized(*kernels.norm_modulate_quantize(x, scale, shift, eps=eps, **options))

    @property
    def _in_tiles(self) -> bool:
        return self.weight_scale.ndim == self.weight_q.ndim

    def _product(self, x: Num[Array, "*rows K"] | Quantized | Measured, **epilogue: Any) -> Any:
        weights = self.weight_q[...], self.weight_scale[...], self.bias[...]
        # The bias kept the dtype that the layer computed in before it was quantised.
        epilogue["out_dtype"] = self.bias.dtype
        if isinstance(x, Quantized):
            return kernels.int8_linear(x.values, *weights, x_scale=x.scale, **epilogue)
        if isinstance(x, Measured):
            return kernels.int8_linear(x.values, *weights, x_amax=x.amax, **epilogue)
        return kernels.int8_linear(x, *weights, **epilogue)


def block_linears(module: nnx.Module) -> list[str]:
    """Paths of the linear layers inside the blocks that W8A8 replaces: ten in a T2V block."""
    return [
        ".".join(map(str, path))
        for path, child in nnx.iter_modules(module)
        if isinstance(child, Linear) and path[0] == "blocks" and path[-1] != "proj_l"
    ]


def quantize_dit(module: Any, granularity: Granularity = "channel") -> Any:
    """A copy of a WanDiT whose block linears are int8; the other parameters are shared, not copied."""
    if granularity not in ("block", "channel"):
        raise ValueError(f"granularity must be 'block' or 'channel', got {granularity!r}")
    return quantize_linears(module, dict.fromkeys(block_linears(module), granularity))


def quantize_linears(module: Any, layout: Mapping[str, Granularity]) -> Any:
    """A copy of a module whose linear layers at the paths of `layout` are int8, each with its granularity."""
    module = nnx.merge(*nnx.split(module))
    for path, granularity in layout.items():
        *parents, name = path.split(".")
        owner = module
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, quantize_linear(getattr(owner, name), granularity))
    return module


def quantize_linear(linear: Linear, granularity: Granularity) -> QuantizedLinear:
    """Round a (stack of) kernel(s) [.., in, out] to int8 [.., out, in] with scales [.., out] or one a tile."""
    weight = jnp.swapaxes(linear.kernel[...], -1, -2)
    if granularity == "channel":
        weight_q, scale = kernels.quantize_per_channel(weight)
    elif weight.ndim == 3:
        # Layer by layer, so that a float32 copy of one is held at a time.
        weight_q, scale = jax.lax.map(kernels.quantize_blockwise, weight)
    else:
        weight_q, scale = kernels.quantize_blockwise(weight)
    return QuantizedLinear(weight_q, scale, linear.bias[...])
