"""Video files: what comes out of them again, and what is left after an accident."""
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gs2d.io import containers
from gs2d.io.containers import FrameWriter, as_frame, last_frame, read_frames, saved_frames

ROOT = Path(__file__).resolve().parent.parent
FILES = [".webm", ".mp4", ".gif"]
KINDS = [*FILES, "/"]
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128], [255, 255, 0],
                   [0, 255, 255], [255, 0, 255], [200, 120, 60], [30, 60, 120], [90, 180, 90]], np.uint8)
CENTRES = [(25 + 50 * (k % 4), 20 + 40 * (k // 4)) for k in range(12)]  # (x, y) of the patches


def patches(k: int, height: int = 120, width: int = 200) -> np.ndarray:
    "Twelve patches of 40×50 pixels, their colours moved on by k places, on at least 120×200 pixels."
    frame = np.zeros((height, width, 3), np.uint8)
    for (x, y), color in zip(CENTRES, np.roll(COLORS, k, 0)):
        frame[y - 20:y + 20, x - 25:x + 25] = color
    return frame


def at_centres(frames) -> np.ndarray:
    return np.array([[frame[y, x] for x, y in CENTRES] for frame in frames]).astype(int)


def expected_colors(n: int) -> np.ndarray:
    return np.array([np.roll(COLORS, k, 0) for k in range(n)]).astype(int)


def plain(n: int, height: int = 32, width: int = 48) -> list:
    return [np.full((height, width, 3), 20 * k % 256, np.uint8) for k in range(n)]


def write(frames, path, fps: float = 20) -> Path:
    "These frames as a file; nothing is left after an error."
    writer = FrameWriter(path, fps)
    try:
        for frame in frames:
            writer.write(frame)
    except BaseException:
        writer.discard()
        raise
    return writer.finish()


def leftovers(folder: Path) -> list:
    return sorted(entry.name for entry in folder.iterdir())


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frames_come_back_in_order_with_their_colours(tmp_path, kind):
    path = write((patches(k) for k in range(30)), f"{tmp_path}/out{kind}")
    frames = list(read_frames(path))
    assert len(frames) == 30 and {frame.shape for frame in frames} == {(120, 200, 3)}
    assert np.abs(at_centres(frames) - expected_colors(30)).max() <= {".webm": 5, ".mp4": 2, ".gif": 0, "/": 0}[kind]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out" + kind.strip("/")]


@pytest.mark.parametrize("kind, size", [(".webm", (34, 18)), (".mp4", (34, 18)), (".gif", (33, 17)), ("/", (33, 17))])
def test_odd_sizes_and_a_single_frame(tmp_path, kind, size):
    writer = FrameWriter(f"{tmp_path}/odd{kind}")
    assert writer.size is None
    writer.write(np.full((33, 17, 3), 200, np.uint8))
    frame, = read_frames(writer.finish())
    assert writer.size == size == frame.shape[:2] and writer.n_frames == 1
    assert np.abs(frame.astype(int) - 200).max() <= 4  # also in the row and column that were added


@pytest.mark.parametrize("kind", KINDS)
def test_one_pixel(tmp_path, kind):
    assert len(list(read_frames(write(plain(2, 1, 1), f"{tmp_path}/dot{kind}")))) == 2


@pytest.mark.parametrize("fps", [7.5, 24, 30, 50])
def test_a_gif_lasts_as_long_as_it_should(tmp_path, fps):
    with Image.open(write(plain(40), tmp_path / "x.gif", fps=fps)) as image:
        assert image.info["loop"] == 0  # for ever
        durations = []
        for k in range(image.n_frames):
            image.seek(k)
            durations.append(image.info["duration"])
    assert sum(durations) == pytest.approx(40_000 / fps, abs=10) and max(durations) - min(durations) <= 10


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("n, fps", [(30, 20), (6, 12.5), (1, 20), (3, 29.97)])
def test_a_file_says_how_long_it_lasts_and_what_its_colours_mean(tmp_path, suffix, n, fps):
    import av

    with av.open(str(write(plain(n), tmp_path / f"x{suffix}", fps))) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
        assert container.duration / 1e6 == pytest.approx(n / fps, abs=0.002 if suffix != ".gif" else 0.01)
        assert times == pytest.approx([k / fps for k in range(n)], abs=0.001 if suffix != ".gif" else 0.01)
        context = stream.codec_context
        meanings = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        assert suffix == ".gif" or meanings == (1, 6, 6, 6)  # limited range, BT.601


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
def test_a_film_of_training_keeps_its_quality_and_is_small(tmp_path, suffix):
    "Smooth pictures that change slowly, with flat blocks beside them, as frames of training are."
    y, x = np.mgrid[0:256, 0:384] / 256
    frames = []
    for k in range(20):
        waves = [0.5 + 0.4 * np.sin(9 * x + 5 * y + k / 9 + phase) for phase in (0, 2, 4)]
        frame = (np.stack(waves, -1) * 255).astype(np.uint8)
        frame[:128] = frame[:128:4, ::4].repeat(4, 0).repeat(4, 1)  # enlarged pixels
        frames.append(frame)
    path = write(frames, tmp_path / f"x{suffix}")
    errors = [(a.astype(float) - b).__pow__(2).mean() for a, b in zip(read_frames(path), frames)]
    assert 10 * math.log10(255**2 / np.mean(errors)) > 38  # decibels
    assert path.stat().st_size < sum(frame.nbytes for frame in frames) / 30


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_frame_alone(tmp_path, kind):
    path = write((patches(k) for k in range(150)), f"{tmp_path}/x{kind}")
    *_, last = read_frames(path)
    assert np.array_equal(last_frame(path), last)


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "text.webm").write_text("this is no video")
    for read in (last_frame, lambda path: next(read_frames(path))):
        with pytest.raises(ValueError, match="text.webm: expected a video"):
            read(tmp_path / "text.webm")
        with pytest.raises(FileNotFoundError, match="no file at .*none.webm"):
            read(tmp_path / "none.webm")


def test_pictures_of_all_kinds_are_frames(tmp_path):
    Image.new("RGB", (48, 32), (10, 20, 30)).save(tmp_path / "a.png")
    tensor = torch.tensor([10, 20, 30]).expand(32, 48, 3) / 255
    path = tmp_path / "a.png"
    pictures = [path, str(path), Image.open(path), tensor, tensor.numpy(), np.asarray(Image.open(path))]
    for picture in pictures:
        frame = as_frame(picture)
        assert (frame == [10, 20, 30]).all() and frame.shape == (32, 48, 3) and frame.dtype == np.uint8
    assert as_frame(torch.tensor([[[1.5, -0.5, 0.5]]])).tolist() == [[[255, 0, 128]]]
    for wrong in (np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.full((4, 4, 3), math.nan)):
        with pytest.raises(ValueError):
            as_frame(wrong)


def test_a_folder_is_read_in_numeric_order(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for k in (0, 1, 2, 3, 10, 11, 100):
        Image.new("RGB", (16, 16), (2 * k, 0, 0)).save(source / f"frame{k}.png")
    (source / "notes.txt").write_text("not a frame")
    (source / ".hidden.png").write_text("not a frame either")
    assert [int(frame[0, 0, 0]) for frame in read_frames(source)] == [0, 2, 4, 6, 20, 22, 200]
    assert [path.stem[5:] for path in saved_frames(source)] == ["0", "1", "2", "3", "10", "11", "100"]
    for path in source.glob("*.png"):
        path.unlink()
    for name in ("b1.png", "a.png", "10.png", "2.png", "a2b10.png", "a2b9.png", "007.png"):
        (source / name).touch()
    in_order = ["2.png", "007.png", "10.png", "a2b9.png", "a2b10.png", "a.png", "b1.png"]
    assert [path.name for path in saved_frames(source)] == in_order


# --- accidents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_different_sizes(tmp_path, kind):
    message = r"frame 2: expected 32×48 pixels \(height × width\) as in the first frame, got 32×50"
    with pytest.raises(ValueError, match=message):
        write([*plain(2), *plain(1, 32, 50)], f"{tmp_path}/x{kind}")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_interrupt_in_the_middle_of_a_frame(tmp_path, kind, monkeypatch):
    name, n_written = "_Folder" if kind == "/" else "_Encoder", []

    class Interrupted(getattr(containers, name)):
        def write(self, frame):
            if len(n_written) == 3:
                signal.raise_signal(signal.SIGINT)  # before anything of the fourth frame is written
            super().write(frame)
            n_written.append(1)

    monkeypatch.setattr(containers, name, Interrupted)
    before = signal.getsignal(signal.SIGINT)
    writer = FrameWriter(f"{tmp_path}/x{kind}")
    with pytest.raises(KeyboardInterrupt):
        for frame in plain(10):
            writer.write(frame)
    writer.finish()
    assert len(n_written) == 4 and signal.getsignal(signal.SIGINT) is before
    assert len(list(read_frames(tmp_path / ("x" + kind.strip("/"))))) == 4 and len(leftovers(tmp_path)) == 1


FULL_DISK = """
import resource, sys, numpy as np
from gs2d.io.containers import FrameWriter
noise = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), dtype=np.uint8)
for place, limit in zip(sys.argv[1::2], sys.argv[2::2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        writer = FrameWriter(place)
        for frame in noise: writer.write(frame)
        print("saved", writer.finish())
    except OSError as error: print("OSError", error)
"""


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    kinds = [(".webm", 2_000), (".webm", 40_000), (".mp4", 20_000), (".gif", 30_000), ("/", 10_000)]  # and its bytes
    (tmp_path / "x").mkdir()
    for suffix in FILES:
        (tmp_path / f"x{suffix}").write_text("the film of yesterday")
    arguments = [text for kind, limit in kinds for text in (f"{tmp_path}/x{kind}", str(limit))]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(kinds), done.stdout + done.stderr
    for line, (kind, _) in zip(lines, kinds):
        assert line.startswith("OSError") and "nothing was saved" in line and f"{tmp_path}/x{kind}" in line
    assert leftovers(tmp_path) == ["x", "x.gif", "x.mp4", "x.webm"] and leftovers(tmp_path / "x") == []
    assert {(tmp_path / f"x{suffix}").read_text() for suffix in FILES} == {"the film of yesterday"}  # it is still there


@pytest.mark.parametrize("suffix", FILES)
def test_a_file_that_is_cut_short_anywhere_is_an_error(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), dtype=np.uint8)
    whole = write(noise, tmp_path / f"whole{suffix}")
    size = whole.stat().st_size
    limits = [1, 100, 1000, *range(size // 7, size - 200, size // 7), size - 100, size - 1]
    arguments = [text for limit in reversed(limits) for text in (f"{tmp_path}/x{suffix}", str(limit))]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OSError") == len(limits), done.stdout + done.stderr
    assert leftovers(tmp_path) == [whole.name]


def test_an_error_while_closing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(containers, "_put_in_place", fail)
    with pytest.raises(OSError, match="nothing was saved: No space left on device"):
        write(plain(2), tmp_path / "x.webm")
    assert leftovers(tmp_path) == []


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="expected a folder that exists, got .*nowhere"):
        FrameWriter(tmp_path / "nowhere" / "x.webm")
    with pytest.raises(FileNotFoundError, match="expected a folder that exists"):
        FrameWriter(tmp_path / "file" / "x.webm")
    with pytest.raises(ValueError, match=r"ending in \.webm, \.mp4 or \.gif, or a folder .*, got '\.avi'"):
        FrameWriter(tmp_path / "x.avi")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="got one with other things in it"):
        FrameWriter(f"{tmp_path}/precious/")
    assert leftovers(tmp_path) == ["file", "precious"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            FrameWriter(tmp_path / "x.webm")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_of_frames_is_replaced_as_a_whole(tmp_path):
    write(plain(5), tmp_path / "frames")
    write(plain(2), tmp_path / "frames")
    assert leftovers(tmp_path / "frames") == ["frame_00000.png", "frame_00001.png"]
    assert leftovers(tmp_path) == ["frames"]


@pytest.mark.parametrize("suffix", FILES)
def test_files_have_the_usual_permissions(tmp_path, suffix):
    (tmp_path / "usual").write_text("")
    path = write(plain(1), tmp_path / f"x{suffix}")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("wrong, error, message", [
    (dict(fps=0), ValueError, "fps: expected a finite number from 0.1 to 240, got 0"),
    (dict(fps=math.nan), ValueError, "fps"), (dict(fps=1e9), ValueError, "fps"), (dict(fps=True), TypeError, "fps"),
    (dict(fps="20"), TypeError, "fps: expected a number, got '20'"),
    (dict(fps=60, path="x.gif"), ValueError, "at most 50"),
])
def test_wrong_speeds(tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        FrameWriter(tmp_path / wrong.pop("path", "x.webm"), **wrong)
    assert leftovers(tmp_path) == []


def test_no_frames_and_closed_writers(tmp_path):
    with pytest.raises(ValueError, match="expected at least one frame, got none"):
        FrameWriter(tmp_path / "x.webm").finish()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures \(.*\), got none"):
        saved_frames(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="expected a folder of pictures"):
        saved_frames(tmp_path / "none")
    writer = FrameWriter(tmp_path / "x.webm")
    writer.write(plain(1)[0])
    writer.finish()
    with pytest.raises(ValueError, match="expected an open file, got one that is closed"):
        writer.write(plain(1)[0])
    assert leftovers(tmp_path) == ["empty", "x.webm"]


# --- memory ---------------------------------------------------------------------------------------

MANY = """
import resource, sys, numpy as np
from gs2d.io.containers import FrameWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
before = peak()
writer = FrameWriter(sys.argv[1])
for k in range(int(sys.argv[2])):
    writer.write(np.full((512, 768, 3), k // 4 % 256, np.uint8))
writer.finish()
print(peak() - before)
"""


@pytest.mark.parametrize("kind, n", [(".webm", 1000), (".mp4", 300), (".gif", 300)])  # raw: 1,125 MB and 337 MB
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path, kind, n):
    command = [sys.executable, "-c", MANY, str(tmp_path / f"x{kind}"), str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200  # MB, what PyAV itself takes included
