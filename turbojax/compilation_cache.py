"""Compiled programs kept on disk, so that a new process starts where the last one left off."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path


def use_compilation_cache() -> Path | None:
    """Let JAX keep its compiled programs in the user's cache folder; returns the folder.

    None if the user chose another place (JAX_COMPILATION_CACHE_DIR) or the folder cannot be written: JAX then does
    as it would have done. Sets JAX's own global options, so it is for programs (the command line, a notebook), and
    the library never calls it by itself.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "turbojax" / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def _machine() -> str:
    """Changes with the processor: code compiled for one must not run on another that shares the home folder."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.MULTILINE)
    identity = "\n".join([platform.machine(), platform.processor(), *sorted(set(lines))])
    return f"{platform.machine()}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
