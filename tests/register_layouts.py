"""Which values of a tile each thread of a warpgroup holds, read from a layout's own tables."""

import numpy as np


def held_by_each_thread(layout, shape):
    """[128 threads, registers * values of one], in order: positions row * columns + column."""
    x = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead = x.ndim - len(tile)
        outer = [size // part for size, part in zip(x.shape[lead:], tile, strict=True)]
        x = x.reshape(*x.shape[:lead], *np.ravel(np.column_stack([outer, tile])))
        axes = np.arange(lead, x.ndim)
        x = x.transpose(*range(lead), *axes[::2], *axes[1::2])
    threads = [axis for axis in (*layout.warp_dims, *layout.lane_dims) if isinstance(axis, int)]
    return np.moveaxis(x, threads, range(len(threads))).reshape(128, -1)
