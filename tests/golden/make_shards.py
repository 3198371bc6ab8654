"""Make golden/shards/*.tar and negative.pt: a training set in TurboDiffusion's layout, written by torch itself.

Needs torch:  python tests/golden/make_shards.py
"""

import io
import tarfile

import seeded
import torch

FOLDER = seeded.GOLDEN / "shards"


def values(sample: int, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Numbers that bfloat16 holds exactly, different in every sample and place."""
    count = torch.arange(torch.tensor(shape).prod().item())
    return (((count * step + 37 * sample) % 255 - 127) / 64).reshape(shape).to(torch.bfloat16)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


FOLDER.mkdir(exist_ok=True)
sample = 0
for shard, count in enumerate((3, 4, 2)):
    with tarfile.open(FOLDER / f"shard_{shard:06d}.tar", "w") as archive:
        for _ in range(count):
            text = values(sample, (4, 8), 5)
            text[3:] = 0
            add(archive, f"{sample:09d}.latent.pt", saved(values(sample, (16, 3, 4, 4), 7)))
            add(archive, f"{sample:09d}.embed.pt", saved(text))
            add(archive, f"{sample:09d}.prompt.txt", f"clip number {sample}\n".encode())
            sample += 1
torch.save(values(99, (4, 8), 5), FOLDER / "negative.pt")
