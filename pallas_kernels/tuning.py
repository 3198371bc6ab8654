"""The table of tiles and stages, tuning.json: which a kernel takes on which GPU, for which shape.

    "KERNEL": [{"when": CONDITIONS, "use": TILES}, ...]

The first entry whose conditions all hold is taken. A condition names a fact of the call ("arch", "m", "n",
"granularity", ...) and gives the value it must have, or {"min": a, "max": b}, either of which may be missing.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from pallas_kernels.dispatch import gpu_arch


def tiles(kernel: str, **facts: Any) -> dict[str, Any]:
    """What `kernel` should use. facts: of this call; "arch" ("9.0") is added. Raises LookupError if nothing fits."""
    facts = {"arch": "{}.{}".format(*gpu_arch())} | facts
    entries = table().get(kernel, [])
    for entry in entries:
        if all(_holds(facts.get(name), condition) for name, condition in entry["when"].items()):
            return entry["use"]
    raise LookupError(f"tuning.json: none of {len(entries)} entries of {kernel!r} fits {facts}")


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """tuning.json as it stands."""
    return json.loads((Path(__file__).parent / "tuning.json").read_text())


def _holds(fact: Any, condition: Any) -> bool:
    if not isinstance(condition, dict):
        return fact == condition
    return fact is not None and condition.get("min", fact) <= fact <= condition.get("max", fact)
