"""Shards that torch wrote are read to the bit, in an order that the seed and the step alone decide."""

import tarfile

import numpy as np
import pytest
from golden import seeded

from turbojax.errors import UserError
from turbojax.train import shards
from turbojax.train.shards import ShardClips, epoch_order, find_shards, index_shard, read_negative

FOLDER = seeded.GOLDEN / "shards"


def values(sample, shape, step):
    """The formula of golden/make_shards.py."""
    return (((np.arange(np.prod(shape)) * step + 37 * sample) % 255 - 127) / 64).reshape(shape).astype(np.float32)


def clips(**options):
    return ShardClips(find_shards(f"{FOLDER}/*.tar"), read_negative(FOLDER / "negative.pt"), seed=1, **options)


def test_samples_are_what_torch_saved():
    them = clips()
    assert len(them.entries) == 9
    for sample in range(9):
        latents, text = them.read(sample)
        expected = values(sample, (4, 8), 5)
        expected[3:] = 0
        np.testing.assert_array_equal(
            latents.astype(np.float32), values(sample, (16, 3, 4, 4), 7).transpose(1, 2, 3, 0)
        )
        np.testing.assert_array_equal(text.astype(np.float32), expected)
        assert them.prompt(sample) == f"clip number {sample}"
    np.testing.assert_array_equal(them.empty[0].astype(np.float32), values(99, (4, 8), 5))


def test_frames_are_cut_and_batches_stacked():
    drawn = clips(frames=2).draw(0, 2)
    assert drawn.latents.shape == (2, 2, 4, 4, 16)
    assert drawn.context.shape == (2, 4, 8)


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    them = clips(window=2)
    seen = [row for step in range(6) for row in them.rows(step, 3)]  # two epochs of nine
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9))
    assert seen[:9] != seen[9:]


def test_samples_are_shuffled_within_a_window_of_shards_only():
    counts = [4] * 6
    order = epoch_order(counts, seed=0, epoch=0, window=2)
    windows = [{int(sample) // 4 for sample in order[i : i + 8]} for i in range(0, 24, 8)]
    assert all(len(window) == 2 for window in windows)
    assert set.union(*windows) == set(range(6))
    assert not np.array_equal(np.sort(order[:8]), order[:8])


def test_a_resumed_run_sees_the_samples_that_come_next():
    whole, resumed = clips(), clips()
    for step in range(5):
        latents = whole.draw(step, 2).latents
        if step >= 3:
            np.testing.assert_array_equal(resumed.draw(step, 2).latents, latents)


def test_another_seed_gives_another_order():
    other = ShardClips(find_shards(f"{FOLDER}/*.tar"), clips().empty, seed=2)
    assert other.rows(0, 9) != clips().rows(0, 9)


def test_mistakes_are_told_with_the_shard_and_the_sample(tmp_path):
    with pytest.raises(UserError, match="no file is called"):
        find_shards(f"{tmp_path}/*.tar")
    with pytest.raises(UserError, match="3 latent frames, not 4"):
        clips(frames=4).draw(0, 1)
    (tmp_path / "text.tar").write_text("no tar at all")
    with pytest.raises(UserError, match="not an uncompressed tar"):
        index_shard(tmp_path / "text.tar")
    with tarfile.open(FOLDER / "shard_000000.tar") as whole, tarfile.open(tmp_path / "part.tar", "w") as part:
        for info in whole.getmembers()[1:]:
            part.addfile(info, whole.extractfile(info))
    with pytest.raises(UserError, match=r"sample 000000000 lacks 000000000\.latent\.pt"):
        index_shard(tmp_path / "part.tar")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((FOLDER / "shard_000002.tar").read_bytes())
    entry = index_shard(cut)[0]
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut short inside 000000007\.latent\.pt"):
        entry.tensor(shards.LATENTS)
