"""Frames of a training run, written to a file that a browser plays"""
# The suffix names the kind: .webm (VP9, by OpenCV), .mp4 (H.264, by PyAV), .gif (by Pillow), none (a folder of PNGs).
# Frames are (H, W, 3) uint8, RGB, row 0 on top. They are encoded as they come, under a temporary name that becomes the real
# one at the end. Nothing here reaches into the training loop: a recorder looks at a Trainer between two steps. No sound.
import base64
import errno
import html
import math
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from fractions import Fraction
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .gaussians import Gaussians2D
from .ground_truth import load_picture, to_pil
from .loss import psnr
from .renderer import render
from .train import StepRecord, Trainer, TrainResult


def _as_frame(picture) -> np.ndarray:
    "(H, W, 3) uint8, RGB, from a uint8 array of that shape, a float picture (clamped), a Pillow image or a path."
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
        return np.ascontiguousarray(picture)
    if isinstance(picture, Tensor) and picture.is_floating_point():
        return np.array(to_pil(picture).convert("RGB"))
    return np.array(to_pil(load_picture(picture)))


def _even(frame: np.ndarray) -> np.ndarray:
    "The frame with its last column and row repeated where their number is odd."
    height, width = frame.shape[:2]
    if height % 2 == width % 2 == 0:
        return frame
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


@contextmanager
def _without_stderr() -> Iterator[None]:
    "Drop what a C library prints to stderr meanwhile."
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Webm:
    "VP9 through OpenCV."

    def __init__(self, path: Path, height: int, width: int, fps: Fraction):
        import cv2

        self.path = path
        with _without_stderr():  # OpenCV tells everybody that it does not know the tag of VP9, and goes on
            self.writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"VP90"), float(fps), (width, height))
        if not self.writer.isOpened():
            raise OSError(f"OpenCV {cv2.__version__} could not start a VP9 video of {height}×{width} pixels; .gif works without it")

    def write(self, frame: np.ndarray) -> None:
        self.writer.write(frame[..., ::-1])

    def close(self) -> None:
        self.writer.release()
        found, announced = self.path.stat().st_size, _webm_length(self.path)  # OpenCV says nothing when the disk is full
        if found != announced:
            raise OSError(errno.ENOSPC, f"expected {announced:,} bytes in the file, got {found:,}; is the disk full?")


def _webm_length(path: Path) -> int:
    "The length that a .webm file says it has: a header and a segment, each with its size after a name of four bytes; 0 if cut short."
    with open(path, "rb") as file:
        start = file.read(256)
    end = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if start[end:end + 4] != name or len(start) < end + 12:
            return 0
        n_bytes = 9 - start[end + 4].bit_length()  # leading zeros of the first byte, plus 1
        size = int.from_bytes(start[end + 4:end + 4 + n_bytes], "big") - (1 << 7 * n_bytes)
        end += 4 + n_bytes + size
    return end


class _Mp4:
    "H.264 through PyAV."

    def __init__(self, path: Path, height: int, width: int, fps: Fraction):
        av = _import_av()
        self.container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self.stream = self.container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "fast"})
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        context = self.stream.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 6, 6, 6  # limited range, BT.601
        self.frame_from = av.VideoFrame.from_ndarray

    def write(self, frame: np.ndarray) -> None:
        picture = self.frame_from(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", src_color_range="JPEG", dst_colorspace="ITU601", dst_color_range="MPEG")
        for packet in self.stream.encode(picture):
            self.container.mux(packet)

    def close(self) -> None:
        try:
            for packet in self.stream.encode():
                self.container.mux(packet)
        finally:
            self.container.close()


def _import_av():
    try:
        import av
    except ImportError:
        raise ImportError("expected PyAV for .mp4 (H.264): pip install 'gs2d[video]'. Without it, .webm plays in every browser") from None
    return av


class _Gif:
    "A looping GIF, frame by frame, with 256 colours of its own for each."

    def __init__(self, path: Path, height: int, width: int, fps: Fraction):
        self.file, self.fps, self.n_frames = open(path, "wb"), fps, 0
        forever = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
        self.file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0) + forever)

    def write(self, frame: np.ndarray) -> None:
        from PIL.GifImagePlugin import getdata

        k, self.n_frames = self.n_frames, self.n_frames + 1
        hundredths = round((k + 1) * 100 / self.fps) - round(k * 100 / self.fps)  # GIF counts in 1/100 s; round the sum, not each
        image = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
        self.file.write(b"".join(getdata(image, duration=10 * hundredths, include_color_table=True)))

    def close(self) -> None:
        with self.file:
            self.file.write(b"\x3b")


class _Folder:
    "PNGs named by their number."

    def __init__(self, path: Path, height: int, width: int, fps: Fraction):
        self.path, self.n_frames = path, 0

    def write(self, frame: np.ndarray) -> None:
        Image.fromarray(frame).save(self.path / f"frame_{self.n_frames:05d}.png", compress_level=3)
        self.n_frames += 1

    def close(self) -> None:
        pass


_WRITERS = {".webm": _Webm, ".mp4": _Mp4, ".gif": _Gif, "": _Folder}
MAX_GIF_FPS = 50  # browsers slow a GIF down whose frames last less than 2/100 s


def _checked_fps(fps) -> Fraction:
    "Frames per second as a fraction that every container can hold, or a clear error."
    if isinstance(fps, bool) or not hasattr(fps, "__float__"):
        raise TypeError(f"fps: expected a number, got {fps!r}")
    if not (math.isfinite(fps) and 0.1 <= fps <= 240):
        raise ValueError(f"fps: expected 0.1 to 240 frames per second, got {fps}")
    return Fraction(fps).limit_denominator(1001)


def _kind_of(path: str | os.PathLike) -> str:
    "The suffix that decides the kind of file, \"\" for a folder, or a clear error."
    text, path = os.fspath(path), Path(path)
    if text.endswith(("/", os.sep)) or path.is_dir():
        return ""
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(f"{path}: expected a path ending in .webm, .mp4 or .gif, or a folder for PNGs (ending in /), got {path.suffix!r}")
    return suffix


_FRAME_NAME = re.compile(r"frame_\d+\.png")


class _Output:
    "Frames on their way to a file or folder that appears whole at the end, or not at all."

    def __init__(self, path: str | os.PathLike, fps: float):
        self.kind, self.path, self.fps = _kind_of(path), Path(path).absolute(), _checked_fps(fps)
        self.writer, self.temporary, self.size, self.n_frames = None, None, None, 0
        if self.kind == ".mp4":
            _import_av()
        if self.kind == ".gif" and self.fps > MAX_GIF_FPS:
            raise ValueError(f"{self.path.name}: expected at most {MAX_GIF_FPS} frames per second in a GIF, got {fps}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"expected an existing folder for {self.path.name}, got {self.path.parent}")
        if self.path.is_dir() and not all(_FRAME_NAME.fullmatch(entry.name) for entry in self.path.iterdir()):
            raise FileExistsError(f"expected a folder that is new, empty, or holds frames only, got {self.path}")
        with tempfile.TemporaryFile(dir=self.path.parent) as file:  # find out now, not after the training
            file.write(b"\0")

    def write(self, frame: np.ndarray, name: str) -> None:
        "Encode one frame; an error removes what there is."
        size = frame.shape[:2]
        if self.size is not None and size != self.size:
            raise ValueError("{}: expected {}×{} pixels (height × width) as in the first frame, got {}×{}".format(name, *self.size, *size))
        try:
            frame = _even(frame) if self.kind in (".webm", ".mp4") else frame
            if self.writer is None:
                self._open(*frame.shape[:2])
                self.size = size
            self.writer.write(frame)
            self.n_frames += 1
        except Exception as error:
            self.discard()
            raise self._explained(error) from error

    def _open(self, height: int, width: int) -> None:
        umask = os.umask(0)
        os.umask(umask)
        if self.kind:
            handle, name = tempfile.mkstemp(prefix=f".{self.path.stem}.", suffix=self.kind, dir=self.path.parent)
            os.close(handle)
        else:
            name = tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.chmod(name, (0o666 if self.kind else 0o777) & ~umask)
        self.temporary = Path(name)
        self.writer = _WRITERS[self.kind](self.temporary, height, width, self.fps)

    def _explained(self, error: Exception) -> Exception:
        "The same error with the path that was asked for instead of the temporary one."
        if isinstance(error, OSError):
            return OSError(error.errno or errno.EIO, f"nothing was saved: {error.strerror or error}", str(self.path))
        return error

    def finish(self) -> None:
        "Close the file and give it its name; an error removes it."
        try:
            self.writer.close()
            if self.kind or not self.path.exists():
                os.replace(self.temporary, self.path)
            else:
                old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
                os.replace(self.path, old)
                os.replace(self.temporary, self.path)
                shutil.rmtree(old)
        except Exception as error:
            self.writer = None
            self.discard()
            raise self._explained(error) from error
        self.writer = self.temporary = None

    def discard(self) -> None:
        "Remove what was written so far."
        writer, self.writer = self.writer, None
        try:
            if writer is not None:
                writer.close()
        except Exception:
            pass  # it is about to go anyway
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True) if self.temporary.is_dir() else self.temporary.unlink(missing_ok=True)
            self.temporary = None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    "Hold a Ctrl-C back until the block is done: half a frame would spoil the file."
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed = []
    signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])


class Layout(str, Enum):
    "What a frame shows of a trainer, above the caption and the curve."

    RENDER = "render"  # the picture as it is now
    SIDE_BY_SIDE = "side_by_side"  # the picture, its target, and where they differ
    OUTLINES = "outlines"  # every Gaussian's ellipse at two standard deviations, over the dimmed picture


_BACKDROP, _PANEL, _TEXT, _FAINT, _LINE = (22, 24, 29), (34, 37, 45), (240, 240, 240), (150, 156, 168), (86, 180, 233)
_GAP, _TITLE_HEIGHT, _CELL_WIDTH, _ROW_HEIGHT, _MIN_CURVE_WIDTH = 8, 20, 92, 48, 130
ERROR_FULL_SCALE = 0.25  # the mean absolute error over the channels that gets the brightest colour


@cache
def _font(size: int):
    "DejaVu Sans, which matplotlib brings: the same letters on every machine."
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _colormap() -> np.ndarray:
    "(256, 3) uint8: viridis."
    import matplotlib

    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255 + 0.5).astype(np.uint8)


def _outlined(image: np.ndarray, scene: Gaussians2D, n_std: float = 2.0) -> np.ndarray:
    "(H, W, 3) the picture, dimmed, with each Gaussian's ellipse in a light version of its colour."
    import cv2

    values = (scene.means, n_std * scene.scales, scene.rotations, scene.colors[:, :3].clamp(0, 1).expand(-1, 3))
    means, radii, angles, colors = (value.detach().cpu().double().nan_to_num().numpy() for value in values)
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    along, across = radii[:, :1] * np.cos(turn), radii[:, 1:] * np.sin(turn)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    x, y = means[:, :1] + cos * along - sin * across, means[:, 1:] + sin * along + cos * across
    height, width = image.shape[:2]
    pixels = np.stack([(x - scene.domain.x_dim[0]) * width / scene.domain.width, (scene.domain.y_dim[1] - y) * height / scene.domain.height], -1)
    corners = ((pixels - 0.5).clip(-8192, 8192) * 16).round().astype(np.int32)  # in 1/16 pixel; pixel (0, 0) has its centre at (½, ½)
    canvas = image // 3
    for corner, color in zip(corners, (127 + 128 * colors).tolist()):
        cv2.polylines(canvas, [corner], True, color, 1, cv2.LINE_AA, 4)
    return canvas


def _heat(image: Tensor, target: Tensor) -> np.ndarray:
    "(H, W, 3) the error of each pixel in colour."
    error = (image.clamp(0, 1) - target.clamp(0, 1)).abs().mean(-1)
    return _colormap()[(error * (255 / ERROR_FULL_SCALE)).clamp(0, 255).round().byte().cpu().numpy()]


def _panels(trainer: Trainer, image: Tensor, target: Tensor, layout: Layout, scale: int) -> list[tuple[str, np.ndarray]]:
    "The pictures of a layout, enlarged, each with its title."
    enlarged = lambda frame: frame.repeat(scale, 0).repeat(scale, 1)
    shown = enlarged(_as_frame(image))
    if layout is Layout.SIDE_BY_SIDE:
        return [("render", shown), ("target", enlarged(_as_frame(target))), (f"error, 0 to {ERROR_FULL_SCALE:g}", enlarged(_heat(image, target)))]
    return [("", _outlined(shown, trainer.scene) if layout is Layout.OUTLINES else shown)]


def _arranged(panels: list[tuple[str, np.ndarray]], min_width: int) -> np.ndarray:
    "The panels on one canvas: in a row, or under each other when they are more than twice as wide as high."
    height, width = panels[0][1].shape[:2]
    if len(panels) == 1:
        canvas = np.full((height, max(width, min_width), 3), _BACKDROP, np.uint8)
        left = (canvas.shape[1] - width) // 2
        canvas[:, left:left + width] = panels[0][1]
        return canvas
    columns = 1 if width > 2 * height else len(panels)
    rows = len(panels) // columns
    canvas = np.full((rows * (height + _TITLE_HEIGHT), max(columns * width + (columns - 1) * _GAP, min_width), 3), _BACKDROP, np.uint8)
    for k, (title, panel) in enumerate(panels):
        top, left = k // columns * (height + _TITLE_HEIGHT), k % columns * (width + _GAP)
        canvas[top + _TITLE_HEIGHT:top + _TITLE_HEIGHT + height, left:left + width] = panel
        canvas[top:top + _TITLE_HEIGHT, left:left + width] = _title(title, width, bar=title.startswith("error"))
    return canvas


@cache
def _title(text: str, width: int, bar: bool) -> np.ndarray:
    "A line of text above a panel, with the colours of the error map at its right end if there is room."
    line = Image.new("RGB", (width, _TITLE_HEIGHT), _BACKDROP)
    draw = ImageDraw.Draw(line)
    draw.text((4, _TITLE_HEIGHT // 2), text, _FAINT, _font(12), anchor="lm")
    pixels = np.array(line)
    if bar and width > 104 + 64 + 4:
        pixels[6:14, width - 68:width - 4] = _colormap()[::4]
    return pixels


def _caption_cells(record: StepRecord) -> list[tuple[str, str]]:
    loss = f"{record.loss:.4f}" if record.loss == 0 or record.loss >= 1e-3 else f"{record.loss:.1e}"
    decibels = "∞ dB" if math.isinf(record.psnr) else f"{record.psnr:.2f} dB"
    return [("step", f"{record.step:,}"), ("loss", loss), ("PSNR", decibels), ("Gaussians", f"{record.n_gaussians:,}")]


def _caption_strip(cells: list[tuple[str, str]], width: int) -> np.ndarray:
    "The numbers, each under its name, in as many columns as fit; they stay in place from frame to frame."
    columns = 4 if width >= 4 * _CELL_WIDTH else 2
    strip = Image.new("RGB", (width, _ROW_HEIGHT * (len(cells) // columns)), _BACKDROP)
    draw = ImageDraw.Draw(strip)
    for k, (name, value) in enumerate(cells):
        x, y = k % columns * (width // columns) + 8, k // columns * _ROW_HEIGHT
        draw.text((x, y + 18), name, _FAINT, _font(11), anchor="ls")
        draw.text((x, y + 37), value, _TEXT, _font(15), anchor="ls")
    return np.array(strip)


def _curve_strip(losses: list[tuple[int, float]], n_iterations: int, width: int, height: int) -> np.ndarray:
    "The loss so far, on a logarithmic axis, over the steps of the whole run."
    import cv2

    strip = np.full((height, width, 3), _BACKDROP, np.uint8)
    left, top, right, bottom = 4, 4, width - 5, height - 5
    strip[top:bottom + 1, left:right + 1] = _PANEL
    points = [(step, math.log(loss)) for step, loss in losses if loss > 0 and math.isfinite(loss)]
    if points:
        step, value = np.array(points).T
        low, high = value.min(), max(value.max(), value.min() + 0.1)
        x = left + 6 + step / max(n_iterations, step.max(), 1) * (right - left - 12)
        y = bottom - 6 - (value - low) / (high - low) * (bottom - top - 12)
        line = (np.stack([x, y], -1) * 16).round().astype(np.int32)
        cv2.polylines(strip, [line], False, _LINE, 2, cv2.LINE_AA, 4)
        cv2.circle(strip, tuple(line[-1].tolist()), 3 * 16, _TEXT, -1, cv2.LINE_AA, 4)
    picture = Image.fromarray(strip)
    ImageDraw.Draw(picture).text((right - 6, top + 6), "loss, log scale", _FAINT, _font(10), anchor="rt")
    return np.array(picture)


def _losses(history: list[StepRecord], most: int = 400) -> list[tuple[int, float]]:
    "The losses of a run, thinned out to at most `most` of them, the first and the last included."
    n = len(history)
    chosen = range(n) if n <= most else (round(k * (n - 1) / (most - 1)) for k in range(most))
    return [(history[k].step, history[k].loss) for k in chosen]


def draw_frame(
    trainer: Trainer,
    layout: Layout | str = Layout.RENDER,
    caption: bool = True,  # step, loss, PSNR and number of Gaussians, of the picture that is shown
    curve: bool = True,  # the loss so far
    scale: int | None = None,  # video pixels across a picture's pixel; None enlarges small pictures so that the text fits
) -> np.ndarray:  # (H, W, 3) uint8, RGB
    "One frame of a video: the trainer as it is now. The plain render, without caption and curve, is the picture pixel for pixel."
    truth, config, layout = trainer.ground_truth, trainer.config, _layout(layout)
    words = caption or curve or layout is Layout.SIDE_BY_SIDE
    if scale is None:
        scale = math.ceil(256 / max(truth.height, truth.width)) if words or layout is Layout.OUTLINES else 1
    with torch.no_grad():
        image = render(trainer.scene, truth.height, truth.width, config.blend, truth.background)
        target = truth.image.to(image)
        now = StepRecord(trainer.steps_done, config.loss(image, target).item(), psnr(image, target).item(), 0.0, len(trainer.scene), 0.0) if words else None
        parts = [_arranged(_panels(trainer, image, target, layout, scale), 2 * _CELL_WIDTH if caption or curve else 0)]
    width = parts[0].shape[1]
    losses = _losses(trainer.history) + [(now.step, now.loss)] if curve else []
    draw_curve = lambda width, height: _curve_strip(losses, config.n_iterations, width, height)
    if caption and curve and width >= 4 * _CELL_WIDTH + _MIN_CURVE_WIDTH:
        beside = max(_MIN_CURVE_WIDTH, width - 6 * _CELL_WIDTH)
        parts.append(np.hstack([_caption_strip(_caption_cells(now), width - beside), draw_curve(beside, _ROW_HEIGHT)]))
    else:
        parts += [_caption_strip(_caption_cells(now), width)] * caption + ([draw_curve(width, 72)] if curve else [])
    return np.vstack(parts)


def _layout(value) -> Layout:
    try:
        return Layout(value)
    except ValueError:
        raise ValueError(f"layout: expected one of {', '.join(repr(member.value) for member in Layout)}, got {value!r}") from None


def _checked_count(name: str, value) -> int | None:
    "`value` as a whole number of at least 1, or None, or a clear error."
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number or None, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


class VideoRecorder:
    """A video of a trainer, made by looking at it between its steps. Use it as a context manager around your own loop.

    The file appears under its name when the block ends, also after Ctrl-C or an error in the loop: it then plays up to there.
    When the file itself cannot be written, there is an OSError, and no file. Not for two threads at once.
    """

    def __init__(
        self,
        path: str | os.PathLike,  # .webm, .mp4 (needs PyAV), .gif, or a folder for PNGs; replaced in one step if it exists
        every: int | None = None,  # steps from one frame to the next; None: as many as make about ten seconds
        fps: float = 20,  # frames per second when it plays
        layout: Layout | str = Layout.RENDER,
        caption: bool = True,  # the rest is as in `draw_frame`
        curve: bool = True,
        scale: int | None = None,
    ):
        self.every, scale = _checked_count("every", every), _checked_count("scale", scale)
        self._look = dict(layout=_layout(layout), caption=bool(caption), curve=bool(curve), scale=scale)
        self._output = _Output(path, fps)
        self._seen, self._closed = None, False
        self.path, self.fps = Path(path), float(self._output.fps)

    @property
    def n_frames(self) -> int:
        "Frames added so far."
        return self._output.n_frames

    @property
    def size(self) -> tuple[int, int] | None:
        "(height, width) of the video, in pixels; None before the first frame. In .webm and .mp4 odd sizes grow by one."
        if self._output.size is None:
            return None
        odd = 2 if self._output.kind in (".webm", ".mp4") else 1
        return tuple(side + side % odd for side in self._output.size)

    def add(self, trainer: Trainer) -> bool:
        "Add a frame if one is due: at every multiple of `every` steps, and at the last step. Says whether it did."
        done, total = trainer.steps_done, trainer.config.n_iterations
        if self.every is None:
            self.every = max(1, round(total / (10 * self.fps)))
        if (done % self.every and done < total) or self._seen == (id(trainer), done):
            return False
        self.add_frame(draw_frame(trainer, **self._look))
        self._seen = (id(trainer), done)
        return True

    def add_frame(
        self,
        picture,  # (H, W, 3) uint8, a float picture in [0, 1], a Pillow image or a path; all of one size
        name: str | None = None,  # what an error calls it
    ) -> None:
        "Add any picture as the next frame."
        if self._closed:
            raise ValueError(f"{self.path}: expected an open recorder, got one that is closed")
        frame = _as_frame(picture)
        with _uninterrupted():
            self._output.write(frame, name or f"frame {self.n_frames}")

    def close(self) -> Path:
        "Finish the file and give it its name. Closing twice is harmless."
        if not self._closed:
            self._closed = True
            if self._output.writer is None:
                raise ValueError(f"{self.path}: expected at least one frame, got none; nothing was saved")
            with _uninterrupted():
                self._output.finish()
        return self.path

    def __enter__(self) -> "VideoRecorder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self._output.writer is None:
            self._closed = True
        self.close()

    def __repr__(self) -> str:
        return f"VideoRecorder({str(self.path)!r}, {self.n_frames} frames, {self.fps:g} a second)"


def record(
    trainer: Trainer,
    path: str | os.PathLike,  # as for `VideoRecorder`, and so is the rest
    every: int | None = None,
    fps: float = 20,
    layout: Layout | str = Layout.RENDER,
    caption: bool = True,
    curve: bool = True,
    scale: int | None = None,
    progress: bool = False,  # a bar on stderr
) -> TrainResult:
    "Take all remaining steps and make a video of them. Ctrl-C ends both early; the result and the video hold what was reached."
    from tqdm.auto import tqdm

    with ExitStack() as stack:
        recorder = stack.enter_context(VideoRecorder(path, every, fps, layout, caption, curve, scale))
        bar = stack.enter_context(tqdm(total=trainer.config.n_iterations, initial=trainer.steps_done, disable=not progress, unit="step"))
        try:
            recorder.add(trainer)
            for step in trainer:
                recorder.add(trainer)
                bar.set_postfix_str(f"loss {step.loss:.4f}  PSNR {step.psnr:.2f} dB", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            if progress:
                bar.write(f"interrupted after {trainer.steps_done} steps: the video plays up to there", file=sys.stderr)
    return trainer.result()


_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def _numeric_order(path: Path) -> list:
    "A sorting key under which frame2 comes before frame10."
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", path.name)]


def _saved_frames(folder: Path) -> list[Path]:
    "The pictures of a folder, in the order of the numbers in their names."
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of pictures, got {folder}")
    found = sorted((path for path in folder.iterdir() if path.suffix.lower() in _PICTURES and not path.name.startswith(".")), key=_numeric_order)
    if not found:
        raise ValueError(f"{folder}: expected pictures ({', '.join(_PICTURES)}), got none")
    return found


def assemble_video(
    frames: str | os.PathLike | Iterable,  # a folder of pictures, or the pictures: arrays, tensors, Pillow images, paths
    path: str | os.PathLike,  # .webm, .mp4, .gif, or a folder for PNGs
    fps: float = 20,
) -> Path:
    "Frames that are already there, as a video. A folder's pictures come in numeric order: frame2 before frame10."
    pictures = _saved_frames(Path(frames)) if isinstance(frames, (str, os.PathLike)) else frames
    recorder = VideoRecorder(path, fps=fps)
    try:
        for k, picture in enumerate(pictures):
            name = os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else f"frame {k}"
            recorder.add_frame(picture, name)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            recorder._output.discard()
        elif recorder.n_frames:
            recorder.close()
        raise
    return recorder.close()


def read_frames(
    path: str | os.PathLike,  # a video, a GIF, or a folder of pictures
) -> Iterator[np.ndarray]:  # (H, W, 3) uint8, RGB
    "The frames of a file, one after the other, as they come out of the decoder."
    path = Path(path)
    if path.is_dir():
        yield from map(_as_frame, _saved_frames(path))
        return
    if not path.is_file():
        raise FileNotFoundError(f"expected a video, got no file at {path}")
    if path.suffix.lower() == ".gif":
        with Image.open(path) as image:
            for k in range(image.n_frames):
                image.seek(k)
                yield np.array(image.convert("RGB"))
        return
    import cv2

    video = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise ValueError(f"{path}: expected a video, got something that OpenCV cannot open")
        while True:
            there, frame = video.read()
            if not there:
                return
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        video.release()


class _Player:
    "What `play` returns: HTML for Jupyter."

    def __init__(self, markup: str, name: str):
        self.markup, self.name = markup, name

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return f"<player of {self.name}>"


def play(
    path: str | os.PathLike,  # .webm, .mp4 or .gif, in or under the notebook's folder unless it is embedded
    embed: bool = False,  # put the bytes into the notebook: it grows by the video, but plays anywhere (Colab needs it)
    width: int | None = None,  # of the player, in pixels; None takes the video's
) -> _Player:
    "A player for a notebook. It refers to the file by its relative path, and keeps one small still of the last frame."
    path = Path(path)
    last = None
    for last in read_frames(path):
        pass
    kinds = {".webm": "video/webm", ".mp4": "video/mp4", ".gif": "image/gif"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a .webm, .mp4 or .gif file, got {path.suffix!r}")
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if embed else _relative(path)
    width = width or last.shape[1]
    if kind == "image/gif":
        return _Player(f'<img src="{source}" width="{width}" alt="{html.escape(path.name)}">', path.name)
    still = BytesIO()
    Image.fromarray(last).save(still, "JPEG", quality=70)
    poster = f"data:image/jpeg;base64,{base64.b64encode(still.getvalue()).decode()}"
    return _Player(f'<video src="{source}" poster="{poster}" width="{width}" controls loop muted></video>', path.name)


def _relative(path: Path) -> str:
    "The path as a link from the folder of the notebook."
    from urllib.parse import quote

    try:
        return quote(path.resolve().relative_to(Path.cwd().resolve()).as_posix())
    except ValueError:
        raise ValueError(f"{path.name}: expected a file in the notebook's folder or under it, which the browser can reach; or embed=True") from None
