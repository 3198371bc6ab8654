"""What cross-attention needs of a text: made once a text and network, where many steps attend to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from pallas_kernels import TextColumns
from turbojax.config import DiTConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextKeys:
    """K and V of a text, of one layer or with an axis of all layers in front; K is normed as attention takes it.

    last_count: how many equal rows the last one stands for. columns: the same for the kernel that has a form of its
    own, None where there is none. In a compiled program only what its attention reads is computed and held.
    """

    k: Float[Array, "*layers B S H d"]
    v: Float[Array, "*layers B S H d"]
    columns: TextColumns | None
    last_count: int = field(metadata={"static": True})

    def check(self, config: DiTConfig, batch: int, last_count: int) -> None:
        """Raises ValueError unless these are all layers' of such a network, for that batch and count (1: not said)."""
        rows = self.k.shape[2] if self.k.ndim == 5 else "rows"
        want = [config.num_layers, batch, rows, config.num_heads, config.head_dim]
        for name, x in (("k", self.k), ("v", self.v)):
            if list(x.shape) != want:
                raise ValueError(
                    f"{name} of the text keys must be [layers, B, rows, heads, head_dim] = {want}, got "
                    f"{list(x.shape)}: make them by this model's text_keys, from as many samples as there are latents"
                )
        if last_count not in (1, self.last_count):
            raise ValueError(f"last_count is {last_count}, but the text keys were made with {self.last_count}")
