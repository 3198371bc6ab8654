"""Tables, intervals and pictures in one style."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiments.strips import sheet
from turbojax.train import evaluate

COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#718096", "#b7791f", "#c53030")
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "figure.constrained_layout.use": True,
}


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean, by resampling; (mean, mean) for a single value."""
    data = np.asarray(values, float)
    low, high = evaluate.bootstrap(len(data), lambda rows: float(data[rows].mean()))
    return low, high


def with_bootstrap(values: Sequence[float], digits: int = 1) -> str:
    low, high = bootstrap(values)
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def with_wilson(hits: int, count: int) -> str:
    """A share in percent with its 95% Wilson interval."""
    low, high = evaluate.wilson(hits, count)
    return f"{100 * hits / count:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], notes: str = "") -> None:
    """Rows with the same fields as a markdown table, numbers to the right; `notes` go below it."""
    columns = list(rows[0])
    numeric = [all(isinstance(row[c], int | float) for row in rows) for c in columns]
    lines = [columns, ["---:" if n else "---" for n in numeric], *([str(row[c]) for c in columns] for row in rows)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines) + (f"\n{notes}\n" if notes else "")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
    print(text)


def figure(rows: int, columns: int, width: float = 3.4, height: float = 2.8) -> tuple[Figure, np.ndarray]:
    """A grid of axes, always [rows, columns]."""
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)


def save(fig: Figure, path: Path) -> None:
    """Write a PNG of at most 256 colours: a third of the bytes, and no difference to see in a plot."""
    partial = path.with_name("." + path.name)
    with plt.rc_context(STYLE):
        fig.savefig(partial, format="png")
    plt.close(fig)
    with Image.open(partial) as image:
        image.convert("RGB").quantize(256).save(partial, format="png", optimize=True)
    os.replace(partial, path)


def heat_map(
    axes: Axes, values: Float[np.ndarray, "rows columns"], rows: Sequence[Any], columns: Sequence[Any],
    *, title: str, xlabel: str, ylabel: str, digits: int = 2, cmap: str = "viridis",
) -> None:  # fmt: skip
    """A coloured matrix with its numbers written in it."""
    image = axes.imshow(values, cmap=cmap, aspect="auto")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    axes.set_yticks(range(len(rows)), [str(r) for r in rows])
    axes.spines[:].set_visible(False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            red, green, blue, _ = image.to_rgba(value)
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=ink, fontsize=8)


def write_sheet(path: Path, strips: Mapping[tuple[str, str], UInt8[np.ndarray, "h w 3"]], title: str) -> None:
    """Write labelled strips (`strips.sheet`) at half size."""
    partial = path.with_name("." + path.name)
    sheet(strips, title, 0.5).quantize(256).save(partial, format="png", optimize=True)
    os.replace(partial, path)
