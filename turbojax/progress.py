"""A progress bar with the time left, moved by a program that runs on the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StepBar:
    """Counts denoising steps. `tick` is compiled into the program; it moves whichever bar is shown at the time."""

    def __init__(self) -> None:
        self._bar: Any = None

    @property
    def shown(self) -> bool:
        return self._bar is not None

    def tick(self, _: object) -> None:
        bar = self._bar
        if bar is not None:
            bar.update()

    def resume(self) -> None:
        """Leave what went by since the last step (compiling, decoding) out of the time left."""
        if self.shown:
            self._bar.set_description("denoising", refresh=False)
            self._bar.unpause()

    @contextmanager
    def show(self, total: int, enabled: bool | None) -> Iterator[None]:
        """Show a bar of `total` steps; None: where somebody watches, that is a terminal or a notebook."""
        if enabled is None:
            enabled = sys.stderr.isatty() or "ipykernel" in sys.modules
        if not enabled:
            yield
            return
        from tqdm import tqdm

        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left"
        self._bar = tqdm(total=total, bar_format=layout, desc="compiling", leave=False, mininterval=0)
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None
