"""Clips survive the trip through a file, files are whole or absent, and the metadata travels inside."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.video import Video, check_output, contact_sheet, read_video

METADATA = {"prompt": 'a "red" circle; 100% = right \\ #1\nnew line, 红', "seed": 3, "settings": {"steps": 4}}


def _moving_square(frames: int = 5, height: int = 48, width: int = 64) -> np.ndarray:
    clip = np.full((frames, height, width, 3), 20, np.uint8)
    for t in range(frames):
        clip[t, 8:32, 4 + 8 * t : 28 + 8 * t] = (220, 40, 40)
    return clip


@pytest.fixture
def video() -> Video:
    return Video(_moving_square(), fps=8, metadata=METADATA)


@pytest.mark.parametrize(("suffix", "psnr"), [(".mp4", 30.0), (".gif", 40.0)])
def test_frames_and_metadata_survive_a_file(video, tmp_path, suffix, psnr):
    # mp4 halves the chroma resolution, which costs most on the square's red edge; a gif has 256 colours.
    back = read_video(video.save(tmp_path / f"clip{suffix}"))
    assert back.frames.shape == video.frames.shape
    assert back.frames.dtype == np.uint8
    error = np.square(back.frames.astype(float) - video.frames).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > psnr
    assert back.fps == 8
    assert back.metadata == {**METADATA, "fps": 8}


def test_a_still_gif_keeps_its_frames(tmp_path):
    still = Video(np.repeat(_moving_square(1), 6, axis=0), fps=8)
    assert read_video(still.save(tmp_path / "still.gif")).frames.shape == (6, 48, 64, 3)


def test_the_same_clip_gives_the_same_bytes(video, tmp_path):
    for suffix in (".mp4", ".gif", ".png"):
        a, b = (video.save(tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
        assert a == b, suffix


def test_png_sheet_holds_every_frame_and_the_metadata(video, tmp_path):
    from PIL import Image

    with Image.open(video.save(tmp_path / "sheet.png")) as image:
        assert '"seed": 3' in image.info["comment"]
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 48 + 2, 3 * 64 + 2 * 2, 3)  # 5 frames in 3 columns, 2 pixels between
    np.testing.assert_array_equal(sheet[50:, 66:130], video.frames[4])


def test_contact_sheet_has_a_row_for_each_clip_from_first_to_last_frame():
    clips = [_moving_square(9), 255 - _moving_square(9)]
    sheet = contact_sheet(clips, columns=3)
    assert sheet.shape == (2 * 48 + 2, 3 * 64 + 4, 3)
    np.testing.assert_array_equal(sheet[:48, :64], clips[0][0])
    np.testing.assert_array_equal(sheet[50:, 132:], clips[1][8])


def test_shows_itself_in_a_notebook(video):
    shown = video._repr_html_()
    assert shown.startswith("<video ")
    assert "&quot;red&quot;" in shown
    assert "data:video/mp4;base64,AAAA" in shown


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    odd = Video(np.zeros((3, 15, 16, 3), np.uint8), fps=8)
    with pytest.raises(UserError, match=r"even width and height, got 16x15"):
        odd.save(tmp_path / "odd.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing_behind(video, tmp_path, monkeypatch):
    def full(image, partial, **options):
        partial.write_bytes(b"GIF89a")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(UserError, match=r"cannot write .*clip\.gif: No space left on device"):
        video.save(tmp_path / "clip.gif")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_that_was_there(video, tmp_path, monkeypatch):
    path = video.save(tmp_path / "clip.gif")
    before = path.read_bytes()

    def interrupted(image, partial, **options):
        partial.write_bytes(b"GIF89a")
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.Image.Image.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Video(255 - video.frames, fps=8).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_permissions_that_the_user_gives_new_files(video, tmp_path):
    (tmp_path / "plain").touch()
    saved = video.save(tmp_path / "clip.gif")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"must end in \.mp4, \.gif, \.png"):
        check_output(tmp_path / "clip.avi")
    with pytest.raises(UserError, match=r"there is no folder .*missing"):
        check_output(tmp_path / "missing" / "clip.mp4")
    (tmp_path / "taken.gif").mkdir()
    with pytest.raises(UserError, match=r"taken\.gif: it is a folder"):
        check_output(tmp_path / "taken.gif")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.fspath(tmp_path / "no-such-ffmpeg"))
    with pytest.raises(UserError, match=r"clip\.mp4: no ffmpeg"):
        check_output(tmp_path / "clip.mp4")
    check_output(tmp_path / "clip.gif")


def test_refuses_a_folder_that_takes_no_files():
    # /proc refuses new files to everyone, so this holds for root too.
    with pytest.raises(UserError, match=r"cannot write /proc/clip\.gif"):
        check_output(Path("/proc/clip.gif"))


def test_refuses_what_it_cannot_read(tmp_path):
    (tmp_path / "text.gif").write_text("not a gif")
    (tmp_path / "text.mp4").write_text("not a video")
    for name, message in [
        ("text.gif", "not a gif"),
        ("text.mp4", "text.mp4: .*Invalid data"),
        ("gone.gif", "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            read_video(tmp_path / name)
    with pytest.raises(UserError, match=r"expected \.mp4 or \.gif"):
        read_video(tmp_path / "clip.avi")


def test_mp4_plays_everywhere(video, tmp_path):
    """Browsers and phones play H.264 in 4:2:0 and nothing richer."""
    import imageio_ffmpeg

    path = video.save(tmp_path / "clip.mp4")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "h264" in report
    assert "yuv420p" in report
