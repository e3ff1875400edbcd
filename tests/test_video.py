"""Videos: what is in a frame, what comes out of the file again, in Chromium too, and what is left after an accident."""
import base64
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gs2d import video
from gs2d.gaussians import PARAMETER_NAMES, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.io.pictures import to_pil
from gs2d.init_levels import initialize_scene
from gs2d.loss import psnr
from gs2d.renderer import render
from gs2d.train import TrainConfig, Trainer
from gs2d.video import Layout, VideoRecorder, assemble_video, draw_frame, play, read_frames, record

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


def new_trainer(height: int = 24, width: int = 32, n_iterations: int = 20, n_gaussians: int = 6) -> Trainer:
    truth = GroundTruth.random(n_gaussians, height, width, seed=1)
    config = TrainConfig(n_gaussians=n_gaussians, n_iterations=n_iterations, device="cpu", lr=0.02)
    return Trainer(truth, initialize_scene(truth, "random", n_gaussians, seed=2), config)


# --- frames ---------------------------------------------------------------------------------------


def test_the_plain_render_is_the_picture_pixel_for_pixel():
    trainer = new_trainer()
    trainer.step()
    with torch.no_grad():
        image = render(trainer.scene, 24, 32, trainer.config.blend, trainer.ground_truth.background)
    assert np.array_equal(draw_frame(trainer, caption=False, curve=False), np.asarray(to_pil(image)))


@pytest.mark.parametrize("height, width", [(24, 32), (5, 3), (8, 200), (300, 400), (300, 40), (90, 640)])
@pytest.mark.parametrize("layout", Layout)
def test_frames_keep_their_size_while_numbers_and_curve_grow(layout, height, width):
    trainer = new_trainer(height, width, n_iterations=3)
    for caption, curve in [(True, True), (True, False), (False, True), (False, False)]:
        trainer.steps_done, trainer.history = 0, []
        before = draw_frame(trainer, layout, caption, curve)
        trainer.step()
        after = draw_frame(trainer, layout, caption, curve)
        assert before.dtype == np.uint8 and before.shape == after.shape and before.shape[2] == 3
        assert not np.array_equal(before, after)


def test_side_by_side_holds_the_render_the_target_and_the_error():
    trainer = new_trainer(60, 80)
    frame = draw_frame(trainer, "side_by_side", caption=False, curve=False, scale=1)
    assert frame.shape == (60 + 20, 3 * 80 + 2 * 8, 3)
    shown, target, error = (frame[20:, left:left + 80] for left in (0, 88, 176))
    assert np.array_equal(shown, draw_frame(trainer, caption=False, curve=False))
    assert np.array_equal(target, np.asarray(trainer.ground_truth.to_pil()))
    trainer.ground_truth.image.copy_(torch.from_numpy(shown / 255))  # now the render is right up to rounding
    dark = draw_frame(trainer, "side_by_side", caption=False, curve=False, scale=1)[20:, 176:]
    assert dark.astype(int).sum(-1).max() < error.astype(int).sum(-1).max()
    assert (dark.astype(int) - dark[0, 0]).__abs__().max() <= 12  # viridis at 0 and next to it


def test_the_caption_speaks_of_the_picture_that_is_shown(monkeypatch):
    seen = []
    monkeypatch.setattr(video, "_caption", lambda now, width: seen.append(now) or np.zeros((48, width, 3), np.uint8))
    trainer = new_trainer()
    trainer.step()
    draw_frame(trainer)
    record_of_it = trainer.step()  # renders the picture that was just drawn
    assert (seen[0].step, seen[0].n_gaussians) == (record_of_it.step, record_of_it.n_gaussians)
    assert seen[0].loss == pytest.approx(record_of_it.loss, rel=1e-5) and seen[0].psnr == pytest.approx(record_of_it.psnr, rel=1e-5)


def test_every_number_of_the_caption_changes_its_pixels():
    strips = [video._caption(video.StepRecord(*values, 0.0, n, 0.0), 500) for values, n in [
        ((1, 0.5, 20.0), 7), ((2, 0.5, 20.0), 7), ((1, 0.4, 20.0), 7), ((1, 0.5, 21.0), 7), ((1, 0.5, 20.0), 8), ((1, 0.0, math.inf), 7), ((1, 1e-7, 70.0), 7)]]
    assert len({strip.tobytes() for strip in strips}) == len(strips)


def test_the_curve_falls_with_the_loss_and_survives_any_loss():
    falling = video._curve([(k, 0.5 * 0.9**k) for k in range(20)], 40, 200, 72)
    line = (falling == video._LINE).all(-1)
    columns = [np.flatnonzero(line[:, x]).mean() for x in np.flatnonzero(line.any(0))]
    assert columns[0] < columns[len(columns) // 2] < columns[-1]  # down the picture
    assert np.flatnonzero(line.any(0)).max() < 110  # half of the steps are still to come
    for losses in ([], [(0, 0.0)], [(0, math.nan), (1, math.inf)], [(0, 0.3)], [(0, 0.3), (1, 0.3)], [(5, -1.0), (6, 2.0)]):
        assert video._curve(losses, 10, 130, 48).shape == (48, 130, 3)


def test_a_long_history_is_thinned_out_with_both_ends():
    history = [video.StepRecord(k, 1 / (k + 1), 0.0, 0.0, 1, 0.0) for k in range(5000)]
    losses = video._losses(history)
    assert len(losses) == 400 and losses[0][0] == 0 and losses[-1][0] == 4999 and losses == sorted(losses)
    assert video._losses([]) == [] and video._losses(history[:1]) == [(0, 1.0)] and len(video._losses(history[:400])) == 400


def test_a_layout_that_is_none():
    with pytest.raises(ValueError, match="expected one of 'render', 'side_by_side', 'outlines', got 'both'"):
        draw_frame(new_trainer(), "both")
    with pytest.raises(ValueError, match="layout"):
        VideoRecorder("x.webm", layout="both")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_frames_come_back_in_order_with_their_colours(tmp_path, kind):
    path = assemble_video((patches(k) for k in range(30)), f"{tmp_path}/out{kind}")
    frames = list(read_frames(path))
    assert len(frames) == 30 and {frame.shape for frame in frames} == {(120, 200, 3)}
    assert np.abs(at_centres(frames) - expected_colors(30)).max() <= (0 if kind == "/" else 6)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out" + kind.strip("/")]


@pytest.mark.parametrize("kind, size", [(".webm", (34, 18)), (".mp4", (34, 18)), (".gif", (33, 17)), ("/", (33, 17))])
def test_odd_sizes_and_a_single_frame(tmp_path, kind, size):
    with VideoRecorder(f"{tmp_path}/odd{kind}") as recorder:
        recorder.add_frame(np.full((33, 17, 3), 200, np.uint8))
    frame, = read_frames(recorder.path)
    assert recorder.size == size == frame.shape[:2] and recorder.n_frames == 1
    assert np.abs(frame.astype(int) - 200).max() <= 4  # also in the row and column that were added


@pytest.mark.parametrize("kind", KINDS)
def test_one_pixel(tmp_path, kind):
    assert len(list(read_frames(assemble_video(plain(2, 1, 1), f"{tmp_path}/dot{kind}")))) == 2


@pytest.mark.parametrize("fps", [7.5, 24, 30, 50])
def test_a_gif_lasts_as_long_as_it_should(tmp_path, fps):
    with Image.open(assemble_video(plain(40), tmp_path / "x.gif", fps=fps)) as image:
        assert image.info["loop"] == 0  # for ever
        durations = []
        for k in range(image.n_frames):
            image.seek(k)
            durations.append(image.info["duration"])
    assert sum(durations) == pytest.approx(40_000 / fps, abs=10) and max(durations) - min(durations) <= 10


def test_pictures_of_all_kinds_are_frames(tmp_path):
    Image.new("RGB", (48, 32), (10, 20, 30)).save(tmp_path / "a.png")
    tensor = torch.tensor([10, 20, 30]).expand(32, 48, 3) / 255
    pictures = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), tensor, tensor.numpy(), np.asarray(Image.open(tmp_path / "a.png"))]
    for frame in read_frames(assemble_video(pictures, tmp_path / "frames")):
        assert (frame == [10, 20, 30]).all() and frame.shape == (32, 48, 3)
    with VideoRecorder(tmp_path / "clamped") as recorder:
        recorder.add_frame(torch.tensor([[[1.5, -0.5, 0.5]]]))
    assert next(read_frames(tmp_path / "clamped")).tolist() == [[[255, 0, 128]]]


def test_a_folder_is_read_in_numeric_order(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for k in (0, 1, 2, 3, 10, 11, 100):
        Image.new("RGB", (16, 16), (2 * k, 0, 0)).save(source / f"frame{k}.png")
    (source / "notes.txt").write_text("not a frame")
    (source / ".hidden.png").write_text("not a frame either")
    stored = list(read_frames(assemble_video(source, tmp_path / "sorted")))
    assert [int(frame[0, 0, 0]) for frame in stored] == [0, 2, 4, 6, 20, 22, 200]
    names = [Path(name) for name in ("b1.png", "a.png", "10.png", "2.png", "a2b10.png", "a2b9.png", "a²1.png", "007.png")]
    assert [path.name for path in sorted(names, key=video._numeric_order)] == ["2.png", "007.png", "10.png", "a2b9.png", "a2b10.png", "a.png", "a²1.png", "b1.png"]


# --- in a browser ---------------------------------------------------------------------------------

WATCH = """async ([data, kind, fps, count, points]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(new Blob([bytes], {type: kind}));
  await new Promise((ok, bad) => { video.onloadeddata = ok; video.onerror = () => bad(new Error(video.error.message)); });
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext("2d", {willReadFrequently: true}), frames = [];
  let shown = -1;
  const note = (now, about) => { shown = about.mediaTime; video.requestVideoFrameCallback(note); };
  video.requestVideoFrameCallback(note);
  for (let k = 0; k < count; k++) {
    const there = new Promise(ok => { video.onseeked = ok; });
    video.currentTime = (k + 0.5) / fps;
    await there;
    for (const end = performance.now() + 5000; Math.abs(shown - k / fps) > 0.5 / fps; await new Promise(ok => setTimeout(ok, 4)))
      if (performance.now() > end) throw new Error(`frame ${k} was not shown, the last one was of ${shown} s`);
    context.drawImage(video, 0, 0);
    frames.push(points.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3)));
  }
  return {duration: video.duration, size: [video.videoHeight, video.videoWidth], frames};
}"""


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium")
    assert browser_path, "these tests need Chromium: `make browser` installs it"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield browser.new_page()
        browser.close()


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
@pytest.mark.parametrize("height, width, fps, n", [(120, 200, 20, 30), (131, 201, 12.5, 6), (1080, 1920, 20, 3), (120, 200, 20, 1)])
def test_it_plays_in_chromium(page, tmp_path, suffix, height, width, fps, n):
    path = assemble_video([patches(k, height, width) for k in range(n)], tmp_path / f"x{suffix}", fps=fps)
    data = base64.b64encode(path.read_bytes()).decode()
    seen = page.evaluate(WATCH, [data, f"video/{suffix[1:]}", fps, n, CENTRES])
    assert seen["size"] == [height + height % 2, width + width % 2]
    assert seen["duration"] == pytest.approx(n / fps, abs=0.002)  # so there is no frame more
    assert np.abs(np.array(seen["frames"]) - expected_colors(n)).max() <= 12  # of 255; neighbouring frames differ by far more


def test_the_player_plays_from_a_link_and_embedded(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assemble_video([patches(k) for k in range(4)], "my film.webm")
    linked, embedded = play("my film.webm")._repr_html_(), play("my film.webm", embed=True)._repr_html_()
    assert "data:video" not in linked and str(tmp_path) not in linked and len(linked) < 20_000
    for markup in (linked, embedded):
        (tmp_path / "page.html").write_text(f"<!doctype html>{markup}")
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("document.querySelector('video').readyState >= 2")
        assert page.evaluate("(v => [v.videoWidth, v.videoHeight, v.duration])(document.querySelector('video'))") == [200, 120, 0.2]
    assert play(assemble_video(plain(2), "x.gif"))._repr_html_().startswith('<img src="x.gif"')


def test_what_cannot_be_played(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file at none.webm"):
        play("none.webm")
    with pytest.raises(ValueError, match=r"expected a \.webm, \.mp4 or \.gif file, got '\.png'"):
        play("x.png")
    Path("text.webm").write_text("this is no video")
    with pytest.raises(ValueError, match="expected a video"):
        play("text.webm")
    Path("sub").mkdir()
    path = assemble_video(plain(1), tmp_path / "x.webm")
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(ValueError, match="embed=True"):
        play(path)


# --- the recorder ---------------------------------------------------------------------------------


def test_which_steps_become_frames(tmp_path):
    trainer = new_trainer(n_iterations=10)
    with VideoRecorder(tmp_path / "frames", every=4, caption=False, curve=False) as recorder:
        took = [recorder.add(trainer)] + [recorder.add(trainer) for _ in trainer]
        assert not recorder.add(trainer)  # the same moment is not taken twice
    assert [step for step, yes in enumerate(took) if yes] == [0, 4, 8, 10] and recorder.n_frames == 4
    *_, last = read_frames(tmp_path / "frames")
    assert np.array_equal(last, draw_frame(trainer, caption=False, curve=False))


@pytest.mark.parametrize("n_iterations, frames", [(20, 21), (2000, 201)])
def test_without_every_a_video_lasts_at_most_about_ten_seconds(tmp_path, n_iterations, frames):
    trainer = new_trainer(4, 4, n_iterations=n_iterations)
    trainer.step = lambda: setattr(trainer, "steps_done", trainer.steps_done + 1)
    with VideoRecorder(tmp_path / "x.gif", caption=False, curve=False) as recorder:
        recorder.add(trainer)
        for _ in trainer:
            recorder.add(trainer)
    assert recorder.n_frames == frames


def test_filming_changes_nothing(tmp_path):
    seen, unseen = new_trainer(), new_trainer()
    result = record(seen, tmp_path / "x.webm", every=3, layout="side_by_side")
    for _ in unseen:
        pass
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(result.scene, name), getattr(unseen.scene, name))
    assert [step[:5] for step in result.history] == [step[:5] for step in unseen.history]
    assert len(list(read_frames(tmp_path / "x.webm"))) == 8


def test_the_last_frame_of_a_video_is_the_result(tmp_path):
    result = record(new_trainer(64, 96, n_iterations=40), tmp_path / "x.webm", every=10, caption=False, curve=False)
    *_, last = read_frames(tmp_path / "x.webm")
    assert psnr(torch.from_numpy(last / 255), result.image.clamp(0, 1).double()) > 30


def test_record_shows_a_bar_when_asked(tmp_path, capsys):
    record(new_trainer(n_iterations=3), tmp_path / "a.gif")
    assert capsys.readouterr().err == ""
    record(new_trainer(n_iterations=3), tmp_path / "b.gif", progress=True)
    assert "3/3" in capsys.readouterr().err


def test_recording_in_a_background_thread(tmp_path):
    trainer, failures = new_trainer(), []

    def film():
        try:
            record(trainer, tmp_path / "x.webm", every=5)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=film)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive() and not failures and len(list(read_frames(tmp_path / "x.webm"))) == 5


# --- accidents ------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_different_sizes(tmp_path, kind):
    with pytest.raises(ValueError, match=r"frame 2: expected 32×48 pixels \(height × width\) as in the first frame, got 32×50"):
        assemble_video([*plain(2), *plain(1, 32, 50)], f"{tmp_path}/x{kind}")
    assert leftovers(tmp_path) == []
    for name, width in (("one.png", 48), ("two.png", 50)):
        Image.new("RGB", (width, 32)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"two\.png: expected 32×48"):
        assemble_video([tmp_path / "one.png", tmp_path / "two.png"], f"{tmp_path}/x{kind}")
    assert leftovers(tmp_path) == ["one.png", "two.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_loop_leaves_a_video_that_plays_up_to_there(tmp_path, kind):
    trainer = new_trainer()
    with pytest.raises(KeyboardInterrupt):
        with VideoRecorder(f"{tmp_path}/x{kind}", every=2) as recorder:
            for _ in trainer:
                recorder.add(trainer)
                if trainer.steps_done == 11:
                    raise KeyboardInterrupt
    assert recorder.n_frames == 5 == len(list(read_frames(recorder.path))) and len(leftovers(tmp_path)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_interrupt_in_the_middle_of_a_frame(tmp_path, kind, monkeypatch):
    writer, n_written = video._WRITERS["" if kind == "/" else kind], []

    class Interrupted(writer):
        def write(self, frame):
            if len(n_written) == 3:
                signal.raise_signal(signal.SIGINT)  # before anything of the fourth frame is written
            super().write(frame)
            n_written.append(1)

    monkeypatch.setitem(video._WRITERS, "" if kind == "/" else kind, Interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        assemble_video(plain(10), f"{tmp_path}/x{kind}")
    assert len(n_written) == 4 and signal.getsignal(signal.SIGINT) is before
    assert len(list(read_frames(tmp_path / ("x" + kind.strip("/"))))) == 4 and len(leftovers(tmp_path)) == 1


def test_ctrl_c_ends_record_with_a_result_and_a_video(tmp_path, capsys):
    trainer = new_trainer()
    step = trainer.step

    def interrupted():
        if trainer.steps_done == 7:
            raise KeyboardInterrupt
        return step()

    trainer.step = interrupted
    result = record(trainer, tmp_path / "x.webm", every=1, progress=True)
    assert len(result.history) == 7 and len(list(read_frames(tmp_path / "x.webm"))) == 8
    assert "interrupted after 7 of 20 steps" in capsys.readouterr().err


def test_an_error_in_the_loop_keeps_what_was_filmed(tmp_path):
    with pytest.raises(FloatingPointError):
        with VideoRecorder(tmp_path / "x.webm") as recorder:
            recorder.add_frame(plain(1)[0])
            raise FloatingPointError
    assert len(list(read_frames(tmp_path / "x.webm"))) == 1
    with pytest.raises(FloatingPointError):
        with VideoRecorder(tmp_path / "y.webm"):
            raise FloatingPointError
    assert leftovers(tmp_path) == ["x.webm"]


FULL_DISK = """
import resource, sys, numpy as np
from gs2d.video import assemble_video
noise = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), dtype=np.uint8)
for place, limit in zip(sys.argv[1::2], sys.argv[2::2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try: print("saved", assemble_video(noise, place))
    except OSError as error: print("OSError", error)
"""


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    kinds = [(".webm", 2_000), (".webm", 40_000), (".mp4", 20_000), (".gif", 30_000), ("/", 10_000)]  # and bytes that fit in a file
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


def test_a_webm_that_was_cut_short_is_noticed(tmp_path):
    path = assemble_video(plain(5), tmp_path / "x.webm")
    whole = path.read_bytes()
    assert video._webm_length(path) == len(whole)
    for length in (0, 3, 20, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert video._webm_length(path) in (-1, len(whole))  # never `length`


def test_an_error_while_closing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_put_in_place", fail)
    with pytest.raises(OSError, match="nothing was saved: No space left on device"):
        assemble_video(plain(2), tmp_path / "x.webm")
    assert leftovers(tmp_path) == []


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="expected a folder that exists, got .*nowhere"):
        VideoRecorder(tmp_path / "nowhere" / "x.webm")
    with pytest.raises(FileNotFoundError, match="expected a folder that exists"):
        VideoRecorder(tmp_path / "file" / "x.webm")
    with pytest.raises(ValueError, match=r"ending in \.webm, \.mp4 or \.gif, or a folder .*, got '\.avi'"):
        VideoRecorder(tmp_path / "x.avi")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="got one with other things in it"):
        VideoRecorder(f"{tmp_path}/precious/")
    assert leftovers(tmp_path) == ["file", "precious"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            VideoRecorder(tmp_path / "x.webm")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_of_frames_is_replaced_as_a_whole(tmp_path):
    assemble_video(plain(5), tmp_path / "frames")
    assemble_video(plain(2), tmp_path / "frames")
    assert leftovers(tmp_path / "frames") == ["frame_00000.png", "frame_00001.png"] and leftovers(tmp_path) == ["frames"]


@pytest.mark.parametrize("suffix", FILES)
def test_files_have_the_usual_permissions(tmp_path, suffix):
    (tmp_path / "usual").write_text("")
    path = assemble_video(plain(1), tmp_path / f"x{suffix}")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_mp4_without_pyav_says_what_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"gs2d\[video\].*\.webm"):
        VideoRecorder(tmp_path / "x.mp4")
    assert len(list(read_frames(assemble_video(plain(2), tmp_path / "x.webm")))) == 2


@pytest.mark.parametrize("wrong, error, message", [
    (dict(every=0), ValueError, "every: expected at least 1, got 0"), (dict(every=2.5), TypeError, "every: expected a whole number"),
    (dict(every=True), TypeError, "every"), (dict(scale=-1), ValueError, "scale: expected at least 1"),
    (dict(fps=0), ValueError, "fps: expected 0.1 to 240"), (dict(fps=math.nan), ValueError, "fps"), (dict(fps=1e9), ValueError, "fps"),
    (dict(fps="20"), TypeError, "fps: expected a number, got '20'"), (dict(fps=60, path="x.gif"), ValueError, "at most 50"),
])
def test_wrong_arguments(tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        VideoRecorder(tmp_path / wrong.pop("path", "x.webm"), **wrong)
    assert leftovers(tmp_path) == []


def test_no_frames_and_closed_recorders(tmp_path):
    with pytest.raises(ValueError, match="expected at least one frame, got none"):
        assemble_video([], tmp_path / "x.webm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures \(.*\), got none"):
        assemble_video(tmp_path / "empty", tmp_path / "x.webm")
    with pytest.raises(FileNotFoundError, match="expected a folder of pictures"):
        assemble_video(tmp_path / "none", tmp_path / "x.webm")
    recorder = VideoRecorder(tmp_path / "x.webm")
    recorder.add_frame(plain(1)[0])
    assert recorder.close() == recorder.close() == tmp_path / "x.webm"
    with pytest.raises(ValueError, match="expected an open recorder"):
        recorder.add_frame(plain(1)[0])
    for wrong in (np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.full((4, 4, 3), math.nan)):
        with pytest.raises(ValueError):
            assemble_video([wrong], tmp_path / "y.webm")
    assert leftovers(tmp_path) == ["empty", "x.webm"]


# --- memory ---------------------------------------------------------------------------------------

MANY = """
import resource, sys, numpy as np
from gs2d.video import VideoRecorder
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
before = peak()
with VideoRecorder(sys.argv[1]) as recorder:
    for k in range(int(sys.argv[2])):
        recorder.add_frame(np.full((512, 768, 3), k // 4 % 256, np.uint8))
print(peak() - before)
"""


@pytest.mark.parametrize("kind, n", [(".webm", 1000), (".mp4", 300), (".gif", 300)])  # raw: 1,125 MB and 337 MB
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path, kind, n):
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path / f"x{kind}"), str(n)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200  # MB, what OpenCV or PyAV itself takes included
