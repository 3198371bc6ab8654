"""The tables name every parameter of every preset, in both directions, and give the shapes that the references have."""

import dataclasses
import itertools
import math

import pytest
from flax import nnx

from convert.tables import DIT, NAMINGS, UMT5, entries, modules
from convert.transforms import TRANSFORMS
from turbojax.checkpoint import abstract_leaves, abstract_module
from turbojax.config import PRESETS, DiTConfig, UMT5Config, VAEConfig
from turbojax.quant import block_linears

COMPONENTS = sorted({c for p in PRESETS.values() for c in (p.dit, p.vae, p.text_encoder)}, key=repr)
IDS = [f"{type(c).__name__}-{getattr(c, 'dim', None) or c.base_dim}" for c in COMPONENTS]
# `sum(p.numel())` of the references' modules on torch's meta device.
PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
}
VAE_PARAMETERS, UMT5_PARAMETERS = 126_892_531, 5_680_910_336


def variants(config):
    """The config, with SLA where it can have it, and with every set of int8 layers that exists: (config, layout)."""
    yield config, {}
    if isinstance(config, DiTConfig):
        sla = dataclasses.replace(config, linear_branch=True)
        yield sla, {}
        yield sla, dict.fromkeys(block_linears(abstract_module(sla)), "block")


@pytest.mark.parametrize("config", COMPONENTS, ids=IDS)
def test_every_parameter_is_mapped_once_in_every_naming(config):
    patch = config.patch_size if isinstance(config, DiTConfig) else ()
    for (variant, layout), naming in itertools.product(variants(config), NAMINGS):
        if naming == "diffusers" and variant != config:
            with pytest.raises(KeyError, match="proj_l"):
                list(entries(variant, naming, layout))
            continue
        ours = abstract_leaves(variant, quantized=layout)
        table = list(entries(variant, naming, layout))
        assert len({entry.source for entry in table}) == len(table)
        rows: dict[str, list] = {}
        count = 0
        for entry in table:
            rows.setdefault(entry.target, []).append(entry.layer)
            leaf = ours[entry.target].shape
            shape = leaf if entry.layer is None else leaf[1:]
            source = TRANSFORMS[entry.transform].source_shapes(shape, patch)[0]
            assert math.prod(source) == math.prod(shape)
            count += math.prod(source)
        assert rows.keys() == ours.keys()
        for target, layers in rows.items():
            assert layers == ([None] if layers == [None] else list(range(ours[target].shape[0]))), target
        assert count == sum(math.prod(leaf.shape) for leaf in ours.values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_reference_has(name):
    preset = PRESETS[name]
    for config, expected in (
        (preset.dit, PARAMETERS[name]),
        (preset.vae, VAE_PARAMETERS),
        (preset.text_encoder, UMT5_PARAMETERS),
    ):
        assert sum(math.prod(leaf.shape) for leaf in abstract_leaves(config).values()) == expected


def test_names_are_unique_in_each_world():
    for table in (DIT, UMT5, modules(VAEConfig())):
        for column in ("wan", "diffusers", "ours"):
            names = [getattr(row, column) for row in table]
            assert len(set(names)) == len(names), column


def test_transforms_undo_themselves():
    import numpy as np

    shapes = {"patch": (16 * 4, 12), "conv": (3, 1, 2, 5, 7), "gamma_video": (6,), "gamma_image": (6,)}
    for name, transform in TRANSFORMS.items():
        shape = shapes.get(name, (4, 6))
        value = np.arange(math.prod(shape)).reshape(shape)
        for source in transform.source_shapes(shape, (1, 2, 2)):
            there = transform.inverse(value, source)
            assert there.shape == source, name
            assert np.array_equal(transform.forward(there, shape), value), name


def test_modules_outside_the_blocks_are_not_stacked():
    state = nnx.state(abstract_module(UMT5Config(num_layers=3)))
    assert all((path[0] == "blocks") == (leaf.shape[0] == 3) for path, leaf in nnx.to_flat_state(state))
