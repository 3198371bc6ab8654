"""Kernels for video diffusion on JAX: INT8/FP8 attention, sparse-linear attention, W8A8 linear layers."""

from pallas_kernels.int8_linear import int8_linear as int8_linear
from pallas_kernels.norm_modulate_quantize import norm_modulate_quantize as norm_modulate_quantize
from pallas_kernels.quantize import (
    quantize_blockwise as quantize_blockwise,
)
from pallas_kernels.quantize import (
    quantize_per_channel as quantize_per_channel,
)
from pallas_kernels.quantize import (
    quantize_per_token as quantize_per_token,
)
from pallas_kernels.rms_norm_rope import rms_norm_rope as rms_norm_rope
