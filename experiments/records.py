"""Rows of measurements in a file that a killed run can go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from turbojax.errors import UserError

Row = dict[str, Any]


class Results:
    """`results.jsonl`: one JSON object a line, appended as soon as it is known."""

    def __init__(self, path: Path):
        """Read what is there; half a line at the end, left by a run that was killed, is dropped.

        Raises UserError for a file that holds anything else than rows.
        """
        self.path = path
        self._rows: list[Row] = []
        text = path.read_text() if path.exists() else ""
        whole, _, torn = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(f"{path}: line {number} is no JSON; delete the file to start again") from None
        if torn:
            self._rewrite()

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, all or (but for a crash of the machine) none."""
        rows = list(rows)
        self._rows += rows
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def where(self, **fields: Any) -> list[Row]:
        """Rows that have all of these values, oldest first."""
        wanted = json.loads(json.dumps(fields))  # as they look once they were written: tuples are lists
        return [row for row in self._rows if all(row.get(k) == v for k, v in wanted.items())]

    def drop(self, **fields: Any) -> None:
        """Forget the rows that have all of these values."""
        gone = [id(row) for row in self.where(**fields)]
        if gone:
            self._rows = [row for row in self._rows if id(row) not in gone]
            self._rewrite()

    def _rewrite(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        os.replace(partial, self.path)


def name_of(cell: Mapping[str, Any]) -> str:
    """A file name for a cell of a grid: `steps=4,topk=0.25`."""
    return ",".join(f"{key}={value}" for key, value in cell.items()).replace("/", "_").replace(" ", "-")
