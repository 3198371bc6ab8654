"""Settings of every test. Being here also puts this folder on the import path: tests share `golden.seeded`."""

import os
import shutil
import tempfile
from collections.abc import Iterator

# The Mosaic interpreter's callbacks block threads of XLA's pool, which is as large as the machine: on few cores it
# would wait for itself.
os.environ.setdefault("NPROC", "16")

# Many tests compile the same programs, some in processes of their own, and compiling is most of what tests do. The
# first process of a run makes the folder, removes it, and hands its name down.
COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="turbojax-tests-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jaxtyping import config, install_import_hook  # noqa: E402

# Where arrays pass, every call is held from here on against the shapes and types in its signature.
CHECKED = (
    "pallas_kernels", "turbojax.attention", "turbojax.models", "turbojax.pipeline", "turbojax.programs",
    "turbojax.quant", "turbojax.samplers", "turbojax.sharding", "turbojax.tokenizer", "turbojax.train",
)  # fmt: skip
install_import_hook(CHECKED, "beartype.beartype")

from turbojax.host_memory import keep_freed_memory  # noqa: E402

keep_freed_memory()


def pytest_configure(config: pytest.Config) -> None:
    # Small shapes compile for longer than they run: half of the time goes into optimising code that runs once. The
    # slow suite runs what XLA makes for users.
    if "not slow" in config.getoption("markexpr"):
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_unconfigure() -> None:
    if COMPILED is not None:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True)
def compilation_cache_as_it_was() -> Iterator[None]:
    """A command run inside a test may move it for the whole process: the next test must not see that."""
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
