"""The tuning table: every call finds tiles that the kernels accept, and an unknown one is an error."""

import functools

import pytest

from pallas_kernels._portable_attention import PortableAttention
from pallas_kernels.int8_gemm_hopper import HopperTiles
from pallas_kernels.int8_gemm_portable import PortableTiles
from pallas_kernels.tuning import table, tiles

TILES = {
    "int8_gemm_hopper": HopperTiles,
    "int8_gemm_portable": PortableTiles,
    "attention_portable": functools.partial(PortableAttention, (128, 64), cp_async=False),
}


@pytest.mark.parametrize("kernel", TILES)
def test_every_entry_is_what_the_kernel_takes(kernel):
    for entry in table()[kernel]:
        TILES[kernel](**entry["use"])
    assert table()[kernel][-1]["when"] == {}, "the last entry has to fit every call"


def test_conditions_choose():
    assert tiles("int8_gemm_hopper", granularity="blocks", n=1536)["tile_n"] == 128
    assert tiles("int8_gemm_hopper", granularity="channels", n=1536)["tile_n"] == 256
    assert tiles("int8_gemm_hopper", granularity="channels", n=64)["tile_n"] == 128
    assert tiles("int8_gemm_portable", arch="8.0")["stages"] > tiles("int8_gemm_portable", arch="8.9")["stages"]


def test_an_unknown_kernel_is_named():
    with pytest.raises(LookupError, match="no_such_kernel"):
        tiles("no_such_kernel")
