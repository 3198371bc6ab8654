"""The results page, made from what the experiments wrote and from what their docstrings say of it.

    python -m experiments.results > docs/results.md                        # a second; no model is loaded

An experiment's outputs are kept in experiments/results/NAME: table.md and other tables, pictures, results.jsonl.
    python -m experiments.NAME --out experiments/results/NAME
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs"
ORDER = (
    "sparsity_steps", "ladder", "attention_error", "attention_mass", "quantisation", "sampler", "training",
    "merge_vs_sequential",
)  # fmt: skip
INTRO = """\
# What the experiments found

Made by `python -m experiments.results > docs/results.md` from the files in `experiments/results`; each part opens with
its question and the command that made it. Everything runs on two CPU cores with the shipped model, and takes
`--model DIR` for converted weights and `--quick` for a smoke run.
"""


def section(name: str, results: Path) -> str:
    """One experiment: its docstring as text, then its tables and pictures."""
    doc = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    title, _, text = doc.partition("\n")
    # Commands are indented in a docstring; on a page they stand in a fence.
    text = re.sub(
        r"(?:^    .*\n?)+", lambda m: "```\n" + re.sub(r"(?m)^    ", "", m[0].rstrip()) + "\n```\n", text, flags=re.M
    )
    parts = [f"## {title.rstrip('.')}", text.strip()]
    # The main table first.
    parts += [path.read_text().strip() for path in sorted(results.glob("*.md"), key=lambda p: (p.stem != "table", p))]
    for path in sorted(results.glob("*.png")):
        where = path.relative_to(PAGE.parent).as_posix()
        parts.append(f"![{title.rstrip('.')}: {path.stem}](../{where})")
    return "\n\n".join(parts) + "\n"


def page() -> str:
    """All experiments that have results, in order; the others by name."""
    folders = {name: HERE / "results" / name for name in ORDER}
    there = [name for name, folder in folders.items() if (folder / "table.md").exists()]
    missing = [f"`experiments.{name}`" for name in folders if name not in there]
    note = f"\nNot run in full yet: {', '.join(missing)}.\n" if missing else ""
    return INTRO + note + "".join("\n" + section(name, folders[name]) for name in there)


if __name__ == "__main__":
    print(page(), end="")
