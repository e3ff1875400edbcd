"""Films: what is in a frame, which steps become frames, that they play, and what is left after an accident."""
import base64
import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gs2d.gaussians import PARAMETER_NAMES
from gs2d.ground_truth import GroundTruth
from gs2d.io.pictures import to_pil
from gs2d.init_levels import initialize_scene
from gs2d.io.containers import read_frames
from gs2d.loss import psnr
from gs2d.renderer import render
from gs2d.show import views
from gs2d.show.film import Layout, VideoRecorder, assemble_video, draw_frame, film, play, record
from gs2d.train import TrainConfig, Trainer
from test_containers import CENTRES, KINDS, expected_colors, leftovers, patches, plain


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
    empty = lambda now, width: seen.append(now) or np.zeros((48, width, 3), np.uint8)
    monkeypatch.setattr(views, "draw_caption", empty)
    trainer = new_trainer()
    trainer.step()
    draw_frame(trainer)
    record_of_it = trainer.step()  # renders the picture that was just drawn
    assert (seen[0].step, seen[0].n_gaussians) == (record_of_it.step, record_of_it.n_gaussians)
    assert seen[0].loss == pytest.approx(record_of_it.loss, rel=1e-5)
    assert seen[0].psnr == pytest.approx(record_of_it.psnr, rel=1e-5)


def test_a_layout_that_is_none():
    with pytest.raises(ValueError, match="expected one of 'render', 'side_by_side', 'outlines', got 'both'"):
        draw_frame(new_trainer(), "both")
    with pytest.raises(ValueError, match="layout"):
        VideoRecorder("x.webm", layout="both")


# --- in a browser ---------------------------------------------------------------------------------

WATCH = """async ([data, kind, fps, count, points]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(new Blob([bytes], {type: kind}));
  await new Promise((ok, bad) => {
    video.onloadeddata = ok;
    video.onerror = () => bad(new Error(video.error.message));
  });
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
    const end = performance.now() + 5000, pause = () => new Promise(ok => setTimeout(ok, 4));
    for (; Math.abs(shown - k / fps) > 0.5 / fps; await pause())
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
        arguments = ["--no-sandbox", "--disable-gpu", *quiet]
        browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
        yield browser.new_page()
        browser.close()


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
@pytest.mark.parametrize("height, width, fps, n", [
    (120, 200, 20, 30), (131, 201, 12.5, 6), (1080, 1920, 20, 3), (120, 200, 20, 1)])
def test_it_plays_in_chromium(page, tmp_path, suffix, height, width, fps, n):
    path = assemble_video([patches(k, height, width) for k in range(n)], tmp_path / f"x{suffix}", fps=fps)
    data = base64.b64encode(path.read_bytes()).decode()
    seen = page.evaluate(WATCH, [data, f"video/{suffix[1:]}", fps, n, CENTRES])
    assert seen["size"] == [height + height % 2, width + width % 2]
    assert seen["duration"] == pytest.approx(n / fps, abs=0.002)  # so there is no frame more
    assert np.abs(np.array(seen["frames"]) - expected_colors(n)).max() <= 12  # neighbours differ by far more


def test_the_player_plays_from_a_link_and_embedded(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assemble_video([patches(k) for k in range(4)], "my film.webm")
    linked, embedded = play("my film.webm")._repr_html_(), play("my film.webm", embed=True)._repr_html_()
    assert "data:video" not in linked and str(tmp_path) not in linked and len(linked) < 20_000
    for markup in (linked, embedded):
        (tmp_path / "page.html").write_text(f"<!doctype html>{markup}")
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("document.querySelector('video').readyState >= 2")
        about = page.evaluate("(v => [v.videoWidth, v.videoHeight, v.duration])(document.querySelector('video'))")
        assert about == [200, 120, 0.2]
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

    def work():
        try:
            record(trainer, tmp_path / "x.webm", every=5)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive() and not failures and len(list(read_frames(tmp_path / "x.webm"))) == 5


def test_a_film_passes_every_record_on_and_adds_the_first_frame(tmp_path):
    trainer = new_trainer()
    records = list(film(tmp_path / "x.gif", every=5, caption=False, curve=False)(trainer, iter(trainer)))
    assert records == trainer.history and len(records) == 20
    frames = list(read_frames(tmp_path / "x.gif"))
    assert len(frames) == 5 and not np.array_equal(frames[0], frames[-1])


def test_two_films_of_one_run(tmp_path):
    trainer = new_trainer()
    records = film(tmp_path / "b.gif", every=10)(trainer, film(tmp_path / "a.gif", every=5)(trainer, iter(trainer)))
    assert len(list(records)) == 20
    assert [len(list(read_frames(tmp_path / name))) for name in ("a.gif", "b.gif")] == [5, 3]


def test_a_film_is_for_one_run_and_of_a_finished_run_shows_its_end(tmp_path):
    wrap, trainer = film(tmp_path / "x.gif"), new_trainer(n_iterations=2)
    for _ in trainer:
        pass
    assert list(wrap(trainer, iter(trainer))) == [] and len(list(read_frames(tmp_path / "x.gif"))) == 1
    with pytest.raises(ValueError, match="expected an open recorder"):
        list(wrap(new_trainer(), iter([])))
    assert leftovers(tmp_path) == ["x.gif"]


def test_a_film_is_checked_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder that exists"):
        film(tmp_path / "nowhere" / "x.webm")


# --- accidents ------------------------------------------------------------------------------------


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


def closed_early(records, trainer):
    for _ in records:
        if trainer.steps_done == 11:
            records.close()


def left_alone(records, trainer):
    for _ in records:
        if trainer.steps_done == 11:
            return


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", [closed_early, left_alone])
def test_a_film_whose_listener_goes_away_plays_up_to_there(tmp_path, kind, leave):
    trainer = new_trainer()
    leave(film(f"{tmp_path}/x{kind}", every=2)(trainer, iter(trainer)), trainer)
    name, = leftovers(tmp_path)
    assert len(list(read_frames(tmp_path / name))) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_a_film_of_a_run_that_fails_plays_up_to_there(tmp_path, error):
    trainer = new_trainer()

    def failing():
        for step in trainer:
            if step.step == 10:
                raise error
            yield step

    with pytest.raises(error):
        list(film(tmp_path / "x.webm", every=2)(trainer, failing()))
    assert len(list(read_frames(tmp_path / "x.webm"))) == 6


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


@pytest.mark.parametrize("wrong, error, message", [
    (dict(every=0), ValueError, "every: expected a whole number of at least 1, got 0"),
    (dict(every=2.5), TypeError, "every: expected a whole number"), (dict(every=True), TypeError, "every"),
    (dict(scale=-1), ValueError, "scale: expected a whole number of at least 1"),
    (dict(fps=0), ValueError, "fps: expected"), (dict(fps=60, path="x.gif"), ValueError, "at most 50"),
])
def test_wrong_arguments(tmp_path, wrong, error, message):
    path = tmp_path / wrong.pop("path", "x.webm")
    for make in (VideoRecorder, film):
        with pytest.raises(error, match=message):
            make(path, **wrong)
    assert leftovers(tmp_path) == []


# --- frames that are there already -----------------------------------------------------------------


def test_pictures_of_all_kinds_become_a_film(tmp_path):
    Image.new("RGB", (48, 32), (10, 20, 30)).save(tmp_path / "a.png")
    path, tensor = tmp_path / "a.png", torch.tensor([10, 20, 30]).expand(32, 48, 3) / 255
    pictures = [path, str(path), Image.open(path), tensor]
    for frame in read_frames(assemble_video(pictures, tmp_path / "frames")):
        assert (frame == [10, 20, 30]).all() and frame.shape == (32, 48, 3)
    with VideoRecorder(tmp_path / "clamped") as recorder:
        recorder.add_frame(torch.tensor([[[1.5, -0.5, 0.5]]]))
    assert next(read_frames(tmp_path / "clamped")).tolist() == [[[255, 0, 128]]]


def test_a_folder_becomes_a_film_in_numeric_order(tmp_path):
    (tmp_path / "source").mkdir()
    for k in (0, 1, 2, 10, 11):
        Image.new("RGB", (16, 16), (2 * k, 0, 0)).save(tmp_path / "source" / f"frame{k}.png")
    stored = read_frames(assemble_video(tmp_path / "source", tmp_path / "sorted"))
    assert [int(frame[0, 0, 0]) for frame in stored] == [0, 2, 4, 20, 22]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_different_sizes(tmp_path, kind):
    with pytest.raises(ValueError, match=r"frame 2: expected 32×48 pixels"):
        assemble_video([*plain(2), *plain(1, 32, 50)], f"{tmp_path}/x{kind}")
    for name, width in (("one.png", 48), ("two.png", 50)):
        Image.new("RGB", (width, 32)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"two\.png: expected 32×48"):
        assemble_video([tmp_path / "one.png", tmp_path / "two.png"], f"{tmp_path}/x{kind}")
    assert leftovers(tmp_path) == ["one.png", "two.png"]


def test_ctrl_c_while_assembling_leaves_what_is_there(tmp_path):
    def interrupted():
        yield from plain(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble_video(interrupted(), tmp_path / "x.webm")
    assert len(list(read_frames(tmp_path / "x.webm"))) == 4 and leftovers(tmp_path) == ["x.webm"]


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
