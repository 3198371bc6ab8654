"""TurboDiffusion's training set: tar shards of latents, text features and prompts, read without torch.

    shard_000000.tar    000000000.latent.pt   [C, t, h, w]     normalised latents of the VAE, bfloat16
                        000000000.embed.pt    [rows, text_dim] the text encoder's output, padded with zeros
                        000000000.prompt.txt
                        000000001.latent.pt ...

Which samples a step sees is a function of the seed and the step alone, so a run goes on at the very sample where it
stopped. Only headers are read at first; then a batch at a time, the next one while the step runs.
"""

from __future__ import annotations

import glob
import itertools
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from convert.tensors import MappedFile
from convert.torch_file import read_torch
from turbojax.errors import UserError
from turbojax.train.student import Drawn

LATENTS, TEXT, PROMPT = "latent.pt", "embed.pt", "prompt.txt"


class Member(NamedTuple):
    """Bytes [offset, offset + size) of a tar file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """Where one sample lies; parts: by what follows the first dot of a member's name."""

    shard: Path
    key: str
    parts: dict[str, Member]

    def read(self, part: str) -> bytes:
        member = self.parts[part]
        with self.shard.open("rb") as file:
            file.seek(member.offset)
            content = file.read(member.size)
        if len(content) != member.size:
            raise UserError(f"{self.shard}: cut short inside {self.key}.{part}")
        return content

    def tensor(self, part: str) -> np.ndarray:
        name = Path(f"{self.shard}:{self.key}.{part}")
        return only_tensor(read_torch(MappedFile(name, self.read(part))), name)


def only_tensor(tensors: dict, name: Path) -> np.ndarray:
    if len(tensors) != 1:
        raise UserError(f"{name}: holds {len(tensors)} tensors, not one")
    return next(iter(tensors.values())).array()


def find_shards(pattern: str) -> list[Path]:
    """Files that a pattern such as 'data/*.tar' names, sorted. Raises UserError if there are none."""
    found = sorted(Path(name) for name in glob.glob(pattern))
    if not found:
        raise UserError(f"no file is called {pattern!r}; --shards takes a pattern such as 'DIR/*.tar', in quotes")
    return found


def index_shard(shard: Path) -> list[Entry]:
    """The samples of a shard in its own order. Raises UserError for what is no tar file, or lacks a part."""
    parts: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                folder, _, name = info.name.rpartition("/")
                key, _, part = name.partition(".")
                if info.isfile():
                    parts.setdefault(f"{folder}/{key}" if folder else key, {})[part] = Member(
                        info.offset_data, info.size
                    )
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: not an uncompressed tar file: {error}") from error
    for key, found in parts.items():
        if missing := {LATENTS, TEXT} - found.keys():
            raise UserError(f"{shard}: sample {key} lacks {key}.{min(missing)}")
    return [Entry(shard, key, found) for key, found in parts.items()]


def epoch_order(counts: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """Every sample once: shards in random order, and the samples of `window` shards at a time shuffled together."""
    rng = np.random.default_rng((seed, epoch))
    starts = [0, *itertools.accumulate(counts)]
    shards = rng.permutation(len(counts))
    order = []
    for first in range(0, len(shards), window):
        together = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
        order.append(rng.permutation(np.concatenate(together)))
    return np.concatenate(order)


class ShardClips:
    """Latents and text features from shards, as the SLA and rCM stages draw them.

    empty: the text features that guidance leaves out, [1, rows, text_dim]. frames: latent frames kept of each sample
    (None: all). window: shards whose samples are shuffled together (a shard of the reference has 256).
    """

    def __init__(
        self,
        shards: Sequence[Path],
        empty: Float[np.ndarray, "1 L D"],
        *,
        seed: int,
        frames: int | None = None,
        window: int = 4,
    ):
        self.empty, self.seed, self.frames, self.window = empty, seed, frames, window
        indices = [index_shard(shard) for shard in shards]
        self.entries = [entry for index in indices for entry in index]
        if not self.entries:
            raise UserError(f"{shards[0]}: the shards hold no samples")
        self._counts = [len(index) for index in indices]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._readers = ThreadPoolExecutor(4)
        self._ahead: tuple[tuple[int, int], list[Future]] | None = None

    def rows(self, step: int, count: int) -> list[int]:
        """Which samples step `step` sees; a batch may reach over the end of an epoch."""
        chosen = []
        for position in range(step * count, (step + 1) * count):
            epoch, offset = divmod(position, len(self.entries))
            if self._order[0] != epoch:
                self._order = epoch, epoch_order(self._counts, self.seed, epoch, self.window)
            chosen.append(int(self._order[1][offset]))
        return chosen

    def draw(self, step: int, count: int) -> Drawn:
        """Step `step`'s samples: latents [B,t,h,w,C] and text features [B,L,D], in the dtypes of the files."""
        samples = [future.result() for future in self._started(step, count)]
        self._ahead = (step + 1, count), self._start(step + 1, count)
        latents, context = ([sample[i] for sample in samples] for i in range(2))
        return Drawn(_stacked(latents, "latents"), _stacked(context, "text features"))

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents [t,h,w,C] and text features [L,D] of one sample."""
        entry = self.entries[row]
        latents, text = entry.tensor(LATENTS), entry.tensor(TEXT)
        if latents.ndim != 4 or text.ndim != 2:
            raise UserError(
                f"{entry.shard}: sample {entry.key} has latents of {list(latents.shape)}, not [C, t, h, w], or text "
                f"features of {list(text.shape)}, not [rows, text_dim]"
            )
        if self.frames is not None and latents.shape[1] < self.frames:
            raise UserError(
                f"{entry.shard}: sample {entry.key} has {latents.shape[1]} latent frames, not {self.frames}"
            )
        return np.ascontiguousarray(latents[:, : self.frames].transpose(1, 2, 3, 0)), text

    def prompt(self, row: int) -> str:
        """What a sample shows; empty where the shard does not tell."""
        entry = self.entries[row]
        return entry.read(PROMPT).decode("utf-8").strip() if PROMPT in entry.parts else ""

    def _started(self, step: int, count: int) -> list[Future]:
        if self._ahead is not None and self._ahead[0] == (step, count):
            return self._ahead[1]
        return self._start(step, count)

    def _start(self, step: int, count: int) -> list[Future]:
        return [self._readers.submit(self.read, row) for row in self.rows(step, count)]


def read_negative(path: Path) -> Float[np.ndarray, "1 L D"]:
    """The text features of the negative prompt, as the reference keeps them: one tensor [rows, text_dim] in a .pt."""
    text = only_tensor(read_torch(path), path)
    if text.ndim != 2:
        raise UserError(f"{path}: text features must be [rows, text_dim], got {list(text.shape)}")
    return text[None]


def _stacked(arrays: list[np.ndarray], what: str) -> np.ndarray:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise UserError(f"a batch needs {what} of one shape; these shards have {sorted(shapes)}")
    return np.stack(arrays)
