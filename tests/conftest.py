"""Settings of every test. Being here also puts this folder on the import path: tests share `golden.seeded`."""

import os
from collections.abc import Iterator

# The Mosaic interpreter's callbacks block threads of XLA's pool, which is as large as the machine: on few cores it
# would wait for itself.
os.environ.setdefault("NPROC", "16")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import config, install_import_hook

# Where arrays pass, every call is held from here on against the shapes and types in its signature.
CHECKED = (
    "pallas_kernels", "turbojax.attention", "turbojax.models", "turbojax.pipeline", "turbojax.programs",
    "turbojax.quant", "turbojax.samplers", "turbojax.sharding", "turbojax.tokenizer", "turbojax.train",
)  # fmt: skip
install_import_hook(CHECKED, "beartype.beartype")

from turbojax.host_memory import keep_freed_memory  # noqa: E402

keep_freed_memory()


@pytest.fixture(autouse=True)
def no_compilation_cache_left_on() -> Iterator[None]:
    """A command run inside a test may switch it on for the process: the next test must not see that."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    if before != {name: getattr(jax.config, name) for name in names}:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For a test of what is told to users: they run without the checks of signatures, and make mistakes."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
