"""Kernels for video diffusion on JAX: INT8/FP8 attention, sparse-linear attention, W8A8 linear layers."""

from pallas_kernels.block_map import sla_block_map as sla_block_map
from pallas_kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.dense_attention import dense_attention as dense_attention
from pallas_kernels.int8_linear import int8_linear as int8_linear
from pallas_kernels.int8_linear import measures_rows as measures_rows
from pallas_kernels.int8_linear import rounds_rows as rounds_rows
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
from pallas_kernels.rotary import Rotary as Rotary
from pallas_kernels.rotary import turned as turned
from pallas_kernels.sage_attention import sage_attention as sage_attention
from pallas_kernels.sparse_linear_attention import rotates_queries as rotates_queries
from pallas_kernels.sparse_linear_attention import sparse_linear_attention as sparse_linear_attention
from pallas_kernels.text_attention import TextColumns as TextColumns
from pallas_kernels.text_attention import text_attention as text_attention
from pallas_kernels.text_attention import text_columns as text_columns
