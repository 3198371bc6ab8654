"""A model as files hold it: its config, and its parameters by name, unread until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from convert.tensors import Leaf
from turbojax.config import ComponentConfig


@dataclass(frozen=True)
class Component:
    """A model's shape and its parameters by dotted path, each read on demand.

    dtype: compute dtype that a load gives unless told otherwise; None: the module's own default.
    """

    config: ComponentConfig
    leaves: Mapping[str, Leaf]
    dtype: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves.values())
