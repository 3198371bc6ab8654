"""A progress bar in bytes, with the time left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(total: int, label: str, show: bool | None = None) -> Iterator[Callable[[int], object]]:
    """Yields a function to call with each number of bytes done. show None: only where a person watches stderr."""
    show = sys.stderr.isatty() if show is None else show
    if not show:
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000, file=sys.stderr) as bar:
        yield bar.update
