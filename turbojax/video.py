"""Clips as files: mp4, gif and contact sheets, with the settings that made them inside.

The settings travel as one line of JSON in the file's comment (mp4, gif) or in its `comment` text chunk (png).
They hold no time and no date, so that the same settings give the same bytes.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from turbojax.errors import UserError

Frames = UInt8[np.ndarray, "T H W 3"]

# libx264's constant rate factor: visually lossless, so that small flat shapes keep crisp edges.
_CRF = "12"
_NO_FFMPEG = "no ffmpeg: pip install imageio-ffmpeg, point IMAGEIO_FFMPEG_EXE at one, or use .gif"


@dataclass(frozen=True)
class Video:
    """One clip: `frames` uint8 [T, H, W, 3] at `fps`, what made it, and the seconds that each stage took.

    metadata: prompt, seed, settings and versions. timings: seconds by stage (load, compile, text, dit, vae, total),
    shared by the clips that were made together.
    """

    frames: Frames
    fps: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write .mp4, .gif or .png (a sheet of all frames); the file appears only when it is whole.

        Raises UserError for any other ending, a folder that is missing or not writable, or no ffmpeg (mp4).
        """
        path = Path(path)
        check_output(path)
        with _whole(path) as partial:
            _WRITERS[path.suffix.lower()](self, partial)
        return path

    def _repr_html_(self) -> str:
        suffix = ".gif" if _ffmpeg() is None else ".mp4"
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder) / f"clip{suffix}").read_bytes()).decode()
        shown = f'width="{max(self.frames.shape[2], 256)}" title="{html.escape(str(self.metadata.get("prompt", "")))}"'
        if suffix == ".gif":
            return f'<img {shown} src="data:image/gif;base64,{data}">'
        return f'<video {shown} controls autoplay loop muted src="data:video/mp4;base64,{data}"></video>'

    def __repr__(self) -> str:
        frames, height, width = self.frames.shape[:3]
        return f"Video({frames} frames of {width}x{height} at {self.fps} fps, {self.metadata.get('prompt', '')!r})"


def read_video(path: str | Path) -> Video:
    """Read an .mp4 or .gif back, with its metadata if this library wrote it.

    Raises UserError for another ending or a file that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise UserError(f"cannot read {path}: expected {' or '.join(_READERS)}")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return _READERS[path.suffix.lower()](path)


def contact_sheet(clips: Sequence[Frames], columns: int = 8) -> UInt8[np.ndarray, "H W 3"]:
    """One row a clip, `columns` frames evenly spaced from the first to the last; clips of one size."""
    rows = [clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)] for clip in clips]
    return _grid(np.concatenate(rows), len(rows[0]))


def check_output(path: Path) -> None:
    """Raise UserError if `path` could not be written: its ending, its folder, or a missing ffmpeg."""
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise UserError(f"cannot write {path}: the name must end in {', '.join(_WRITERS)}")
    with _as_user_error(path):
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
        _partial(path).touch()
        _partial(path).unlink()
    if suffix == ".mp4" and _ffmpeg() is None:
        raise UserError(f"cannot write {path}: {_NO_FFMPEG}")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end, or vanishes on any error."""
    partial = _partial(path)
    with _as_user_error(path):
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """A full disk, a missing permission and a name too long are told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _ffmpeg() -> str | None:
    """The ffmpeg to use, or None where there is none."""
    import imageio_ffmpeg

    try:
        return shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        return None


def _run_ffmpeg(path: Path, *arguments: str, data: bytes = b"") -> tuple[bytes, str]:
    """ffmpeg's standard output and its report on `path`; `data` is its standard input."""
    exe = _ffmpeg()
    if exe is None:
        raise UserError(f"{path}: {_NO_FFMPEG}")
    done = subprocess.run([exe, "-hide_banner", "-y", *arguments], input=data, capture_output=True, check=False)
    report = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise UserError(f"ffmpeg could not process {path}: {report.splitlines()[-1] if report else done.returncode}")
    return done.stdout, report


def _comment(video: Video) -> str:
    return json.dumps({**video.metadata, "fps": video.fps}, ensure_ascii=False, sort_keys=True)


def _metadata(comment: str) -> dict[str, Any]:
    """What `_comment` wrote; nothing if somebody else wrote the file."""
    try:
        fields = json.loads(comment)
    except json.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _write_mp4(video: Video, path: Path) -> None:
    height, width = video.frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"mp4 needs an even width and height, got {width}x{height}; write .gif or .png")
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{video.fps}", "-i", "-"]
    encoding = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", _CRF, "-movflags", "+faststart"]
    comment = ["-metadata", f"comment={_comment(video)}"]
    _run_ffmpeg(path, *raw, *encoding, *comment, str(path), data=np.ascontiguousarray(video.frames).tobytes())


def _read_mp4(path: Path) -> Video:
    ppm, _ = _run_ffmpeg(path, "-i", str(path), "-f", "image2pipe", "-c:v", "ppm", "-")
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", ppm)
    listing, report = _run_ffmpeg(path, "-i", str(path), "-f", "ffmetadata", "-")
    rate = re.search(r"([\d.]+) fps", report)
    if header is None or rate is None:
        raise UserError(f"cannot read {path}: no video in it")
    width, height = int(header[1]), int(header[2])
    frames = np.frombuffer(ppm, np.uint8).reshape(-1, header.end() + height * width * 3)[:, header.end() :]
    comment = _ffmetadata(listing.decode()).get("comment", "")
    return Video(frames.reshape(-1, height, width, 3).copy(), round(float(rate[1])), _metadata(comment))


def _ffmetadata(listing: str) -> dict[str, str]:
    """The key=value pairs of ffmpeg's ffmetadata format, in which a backslash quotes the next character."""
    pairs, key, text, quoted = {}, None, "", False
    for char in listing:
        if quoted:
            text, quoted = text + char, False
        elif char == "\\":
            quoted = True
        elif char == "=" and key is None:
            key, text = text, ""
        elif char == "\n":
            if key is not None:
                pairs[key] = text
            key, text = None, ""
        else:
            text += char
    return pairs


def _write_gif(video: Video, path: Path) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in video.frames]
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=_gif_ticks(video.fps),
        loop=0,
        comment=_comment(video).encode(),
    )


def _gif_ticks(fps: float) -> int:
    """Milliseconds that a frame is shown: a gif counts in hundredths of a second."""
    return max(1, round(100 / fps)) * 10


def _read_gif(path: Path) -> Video:
    from PIL import Image, ImageSequence, UnidentifiedImageError

    frames, shown = [], []
    try:
        with Image.open(path) as image:
            comment = image.info.get("comment", b"")
            for frame in ImageSequence.Iterator(image):
                frames.append(np.asarray(frame.convert("RGB")))
                shown.append(frame.info.get("duration") or 100)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"cannot read {path}: not a gif") from error
    metadata = _metadata(comment.decode(errors="replace"))
    fps = metadata.get("fps") or round(1000 / math.gcd(*shown))
    # Frames that equal the one before were stored as one that is shown longer.
    repeats = [round(milliseconds / _gif_ticks(fps)) for milliseconds in shown]
    return Video(np.repeat(np.stack(frames), repeats, axis=0), fps, metadata)


def _write_sheet(video: Video, path: Path) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", _comment(video))
    columns = math.ceil(math.sqrt(len(video.frames)))
    Image.fromarray(_grid(video.frames, columns)).save(path, pnginfo=info)


def _grid(frames: Frames, columns: int, gap: int = 2) -> UInt8[np.ndarray, "H W 3"]:
    """Frames in reading order on white, `gap` pixels apart."""
    count, height, width, _ = frames.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


_WRITERS: Mapping[str, Callable[[Video, Path], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_sheet,
}
_READERS: Mapping[str, Callable[[Path], Video]] = {".mp4": _read_mp4, ".gif": _read_gif}
